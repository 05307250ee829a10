"""Which versions of which packs go together: resolvelib over manifests, with readable conflicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from packaging.version import Version
from resolvelib import AbstractProvider, BaseReporter, ResolutionImpossible, Resolver
from resolvelib.resolvers import RequirementInformation

from modularbase.errors import DependencyError, PackIncompatibleError
from modularbase.packs.manifest import Manifest, PackRequirement


class PackSource(Protocol):
    """Where manifests of packs are found: a store, a folder, an index."""

    def versions(self, pack_id: str) -> Sequence[Manifest]:
        """All known versions of a pack, in any order; none when it is unknown."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """Packs that go together, dependencies before those that need them."""

    packs: tuple[Manifest, ...]
    needed_by: Mapping[str, tuple[str, ...]]  # pack id -> ids of the packs that asked for it


class _Provider(AbstractProvider[PackRequirement, Manifest, str]):
    def __init__(self, source: PackSource, roots: Iterable[str], base: BaseVersion | None) -> None:
        self._source = source
        self._roots = set(roots)
        self._base = base

    def identify(self, requirement_or_candidate: PackRequirement | Manifest) -> str:
        return requirement_or_candidate.id

    def get_preference(self, identifier: str, *args: Any, **kwargs: Any) -> Any:
        # What the user named first; then by name, so that equal inputs give equal answers.
        return identifier not in self._roots, identifier

    def find_matches(
        self,
        identifier: str,
        requirements: Mapping[str, Iterator[PackRequirement]],
        incompatibilities: Mapping[str, Iterator[Manifest]],
    ) -> Sequence[Manifest]:
        wanted = list(requirements[identifier])
        excluded = {manifest.version for manifest in incompatibilities[identifier]}
        suitable = [
            manifest
            for manifest in self._source.versions(identifier)
            if manifest.version not in excluded
            and (self._base is None or self._base.suits(manifest))
            and all(requirement.accepts(manifest.version) for requirement in wanted)
        ]
        # The newest first; a pre-release only where no release suits.
        return sorted(suitable, key=preference, reverse=True)

    def is_satisfied_by(self, requirement: PackRequirement, candidate: Manifest) -> bool:
        return requirement.accepts(candidate.version)

    def get_dependencies(self, candidate: Manifest) -> Iterable[PackRequirement]:
        return candidate.dependencies


@dataclass(frozen=True, slots=True)
class BaseVersion:
    """The base that packs must suit."""

    id: str
    version: str

    def suits(self, manifest: Manifest) -> bool:
        """Whether a pack says that it was made for this base."""
        return manifest.base_id == self.id and manifest.suits_base(self.version)

    def check(self, manifest: Manifest) -> None:
        """Raises a PackIncompatibleError unless a pack was made for this base."""
        if manifest.base_id != self.id:
            raise PackIncompatibleError(manifest.id, "base_id", manifest.base_id, self.id)
        if not manifest.suits_base(self.version):
            required = " or ".join(manifest.base_compatibility) or "no version"
            raise PackIncompatibleError(
                manifest.id, "base_compatibility", required, f"{self.id} {self.version}"
            )


def resolve(
    requirements: Sequence[PackRequirement], source: PackSource, base: BaseVersion | None
) -> Resolution:
    """Chooses a version of every pack that the requirements need, directly or not.

    Args:
        requirements: What is asked for.
        source: Where manifests are found.
        base: The base they must suit; None where it is not known yet: then a pack and what it
            needs must at least be for the same one.

    Raises:
        DependencyError: A pack is unknown, no set of versions satisfies everybody, packs that
            would be chosen declare a conflict, or packs need each other in a circle.
    """
    provider = _Provider(source, [requirement.id for requirement in requirements], base)
    resolver: Resolver[PackRequirement, Manifest, str] = Resolver(provider, BaseReporter())
    try:
        result = resolver.resolve(requirements, max_rounds=10_000)
    except ResolutionImpossible as error:
        raise DependencyError(_explain(error.causes, source, base)) from error
    chosen = dict(result.mapping)
    needed_by = {
        pack_id: tuple(sorted(m.id for m in chosen.values() if _needs(m, pack_id)))
        for pack_id in chosen
    }
    _refuse_conflicts(chosen)
    _refuse_other_bases(chosen)
    return Resolution(tuple(_ordered(chosen)), needed_by)


def preference(manifest: Manifest) -> tuple[bool, Version]:
    """The greatest is the one to take: the newest, a pre-release only where no release is."""
    version = Version(manifest.version)
    return not version.is_prerelease, version


def _needs(manifest: Manifest, pack_id: str) -> bool:
    return any(dependency.id == pack_id for dependency in manifest.dependencies)


def _ordered(chosen: Mapping[str, Manifest]) -> Iterator[Manifest]:
    done: set[str] = set()
    path: list[str] = []

    def visit(pack_id: str) -> Iterator[Manifest]:
        if pack_id in done:
            return
        if pack_id in path:
            circle = " -> ".join([*path[path.index(pack_id) :], pack_id])
            raise DependencyError(f"packs need each other in a circle: {circle}")
        path.append(pack_id)
        for dependency in chosen[pack_id].dependencies:
            yield from visit(dependency.id)
        path.pop()
        done.add(pack_id)
        yield chosen[pack_id]

    for pack_id in sorted(chosen):
        yield from visit(pack_id)


def _refuse_conflicts(chosen: Mapping[str, Manifest]) -> None:
    for manifest in chosen.values():
        for conflict in manifest.conflicts:
            other = chosen.get(conflict.id)
            if other is not None and conflict.accepts(other.version):
                raise DependencyError(
                    f"{_named(manifest)} declares a conflict with {conflict}, and {_named(other)} "
                    "would be loaded beside it: leave one of them out"
                )


def _refuse_other_bases(chosen: Mapping[str, Manifest]) -> None:
    for manifest in chosen.values():
        for other in (chosen[dependency.id] for dependency in manifest.dependencies):
            if other.base_id != manifest.base_id:
                raise DependencyError(
                    f"{_named(manifest)} is for base {manifest.base_id} and needs {_named(other)}, "
                    f"which is for {other.base_id}: name the base they shall suit"
                )


def _explain(
    causes: Iterable[RequirementInformation[PackRequirement, Manifest]],
    source: PackSource,
    base: BaseVersion | None,
) -> str:
    asked: dict[str, list[str]] = {}
    for requirement, parent in causes:
        who = "you ask for" if parent is None else f"{_named(parent)} needs"
        asked.setdefault(requirement.id, []).append(f"{who} {requirement}")
    return "; ".join(
        f"no version of {pack_id} suits: {' and '.join(dict.fromkeys(reasons))}"
        f" ({_known(source.versions(pack_id), base)})"
        for pack_id, reasons in asked.items()
    )


def _known(versions: Sequence[Manifest], base: BaseVersion | None) -> str:
    if not versions:
        return "no such pack is known"
    suitable = [m.version for m in versions if base is None or base.suits(m)]
    if base is not None and not suitable:
        bases = sorted({manifest.base_id for manifest in versions})
        return f"known versions are not for base {base.id} {base.version} but {', '.join(bases)}"
    return "known: " + ", ".join(sorted(suitable, key=Version))


def _named(manifest: Manifest) -> str:
    return f"{manifest.id} {manifest.version}"
