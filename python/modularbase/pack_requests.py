"""From what a caller says about packs to what the runtime is asked for, and back to the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from modularbase.engine_packs import EnginePacks
from modularbase.errors import (
    DependencyError,
    HistoryError,
    InvalidRequestError,
    ModularBaseError,
    PackNotFoundError,
)
from modularbase.packs.generation_table import Hold
from modularbase.packs.manifest import Manifest
from modularbase.packs.residency import Generation
from modularbase.packs.spec import parse_spec
from modularbase.types import Fallback, PackRequest, Packs, PackUse, UsedPack

_log = logging.getLogger(__name__)

_MAX_PACKS = 4
_TIMEOUT_S = 60.0  # for a pack's first load, where the request has no timeout


class Predictor(Protocol):
    """Learns which packs a user needs (see `modularbase.routing.predictor`)."""

    def record(self, user: str, packs: Sequence[str]) -> None:
        """The user has used these packs."""

    def predict_next_packs(self, user: str, n: int) -> Sequence[Prediction]:
        """What may come next, the likeliest first."""

    def acted_on(self, user: str, packs: Sequence[str]) -> None:
        """These predictions were preloaded."""


class Prediction(Protocol):
    """A pack that may come next."""

    @property
    def pack(self) -> str:
        """Its name."""


@dataclass(frozen=True, slots=True)
class PackChoice:
    """Packs that a request may run with, each with its generation; none is the plain base."""

    uses: tuple[tuple[PackUse, Generation], ...] = ()

    def used(self) -> tuple[UsedPack, ...]:
        """As the result tells it."""
        return tuple(
            UsedPack(g.manifest.id, g.manifest.version, g.digest, use.weight)
            for use, g in self.uses
        )


@dataclass(frozen=True, slots=True)
class PreparedPacks:
    """A request's choices in order of preference, and what was given up before it was queued."""

    request: PackRequest
    choices: tuple[PackChoice, ...]
    fallbacks: tuple[Fallback, ...] = ()
    hold: Hold | None = None  # on all generations of the choices

    def __enter__(self) -> PreparedPacks:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """The request has ended: its generations may go."""
        if self.hold is not None:
            self.hold.release()

    def outcome(
        self, choice: int, errors: Sequence[str]
    ) -> tuple[tuple[UsedPack, ...], tuple[Fallback, ...]]:
        """The packs that were used, and all that were given up."""
        late = tuple(
            Fallback(tuple(str(g) for _, g in given_up.uses), error)
            for given_up, error in zip(self.choices, errors, strict=False)
        )
        used = self.choices[choice].used() if 0 <= choice < len(self.choices) else ()
        return used, self.fallbacks + late


def parse_packs(packs: Packs) -> PackRequest:
    """Reads the `packs` argument of a request.

    Raises:
        InvalidRequestError: It is none of the documented forms.
    """
    if isinstance(packs, PackRequest):
        return replace(packs, packs=_uses(packs.packs))
    return PackRequest(packs=_uses(packs))


def _uses(packs: object) -> tuple[PackUse, ...]:
    if packs is None or packs == "none":
        return ()
    if isinstance(packs, str):
        return (_use(packs),)
    if not isinstance(packs, Sequence):
        raise InvalidRequestError("packs", "names, PackUse, a PackRequest or 'none'", repr(packs))
    if len(packs) > _MAX_PACKS:
        raise InvalidRequestError("packs", f"at most {_MAX_PACKS}", str(len(packs)))
    return tuple(_use(use) for use in packs)


def _use(use: object) -> PackUse:
    if isinstance(use, str):
        use = PackUse(use)
    if not isinstance(use, PackUse) or not isinstance(use.pack, str):
        raise InvalidRequestError("packs", "names or PackUse", repr(use))
    parse_spec(use.pack)
    return use


_BASE = PackChoice()


class PackPreparer:
    """Makes a request's packs ready: loads them the first time, and falls back where it may."""

    def __init__(
        self,
        packs: EnginePacks,
        default_packs: Sequence[str] = (),
        predictor: Predictor | None = None,
        n_preload: int = 2,
    ) -> None:
        """Args: the engine's packs; its default chain; what is preloaded after each request."""
        self._packs = packs
        self._default = tuple(PackUse(pack) for pack in default_packs)
        self._predictor = predictor
        self._n_preload = n_preload

    def prepare(self, request: PackRequest, timeout_s: float | None) -> PreparedPacks:
        """The choices of a request.

        Args:
            request: What is asked for.
            timeout_s: The request's; once it is over, nothing else is tried.

        Raises:
            ModularBaseError: A pack cannot be had, and the request allows no fallback for that.
        """
        if not request.packs:
            return PreparedPacks(request, ())
        deadline = time.monotonic() + (_TIMEOUT_S if timeout_s is None else timeout_s)
        hold = self._packs.hold()
        try:
            first = self._choice(request.packs, deadline, hold)
        except ModularBaseError as error:
            is_over = timeout_s is not None and time.monotonic() >= deadline
            if is_over or not _may_fall_back(request, error):
                raise
            return self._fall_back(request, error, deadline, hold)
        if request.fallback == "never":
            return PreparedPacks(request, (first,), (), hold)
        chain = self._known_chain(first, hold)
        return PreparedPacks(request, (first, *chain, _BASE), (), hold)

    def predict(self, request: PackRequest) -> None:
        """Learns from a request that has been queued, and preloads what may come after it."""
        if self._predictor is None or not request.user:
            return  # what nobody has done teaches nothing
        names = [parse_spec(use.pack).id for use in request.packs]
        try:
            self._predictor.record(request.user, names)
            predicted = self._predictor.predict_next_packs(request.user, self._n_preload)
            others = [p.pack for p in predicted if p.pack not in names]
            acted = [pack for pack in others if self._packs.guess(pack)]
            if acted:
                self._predictor.acted_on(request.user, acted)
        except HistoryError as error:  # a hint that is missing costs time, not an answer
            _log.warning("no prediction of packs: %s", error)

    def _choice(self, uses: Sequence[PackUse], deadline: float, hold: Hold) -> PackChoice:
        ready = [(use, self._packs.ready(use, deadline, hold)) for use in uses]
        _refuse_conflicts([generation.manifest for _, generation in ready])
        return PackChoice(tuple(ready))

    def _fall_back(
        self, request: PackRequest, error: ModularBaseError, deadline: float, hold: Hold
    ) -> PreparedPacks:
        given_up = [Fallback(tuple(use.pack for use in request.packs), str(error))]
        for uses in self._chain(request.packs):
            try:
                choice = self._choice(uses, deadline, hold)
            except ModularBaseError as reason:
                given_up.append(Fallback(tuple(use.pack for use in uses), str(reason)))
                continue
            return PreparedPacks(request, (choice, _BASE), tuple(given_up), hold)
        return PreparedPacks(request, (_BASE,), tuple(given_up), hold)

    def _chain(self, uses: Sequence[PackUse]) -> list[tuple[PackUse, ...]]:
        chain: list[tuple[PackUse, ...]] = []
        for use in uses:
            manifest = self._packs.manifest(use.pack)
            if manifest is not None:
                chain += [(PackUse(other),) for other in manifest.fallback]
        return [*chain, self._default] if self._default else chain

    def _known_chain(self, first: PackChoice, hold: Hold) -> list[PackChoice]:
        """What would answer if the first choice failed later: only what is known already."""
        chain = []
        for uses in self._chain([use for use, _ in first.uses]):
            found = [(use, self._packs.find(use.pack, hold)) for use in uses]
            known = tuple((use, generation) for use, generation in found if generation)
            if len(known) == len(found):
                chain.append(PackChoice(known))
        return chain


def _may_fall_back(request: PackRequest, error: ModularBaseError) -> bool:
    if isinstance(error, PackNotFoundError):
        return request.fallback == "always"
    return request.fallback != "never"


def _refuse_conflicts(manifests: Sequence[Manifest]) -> None:
    for manifest in manifests:
        for conflict in manifest.conflicts:
            for other in manifests:
                if conflict.id == other.id and conflict.accepts(other.version):
                    raise DependencyError(
                        f"{manifest.id} {manifest.version} declares a conflict with {conflict}: "
                        "use one of them at a time"
                    )
