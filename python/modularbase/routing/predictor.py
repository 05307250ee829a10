"""Which packs a user will want next, learned from what that user did before."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from modularbase.errors import InvalidRequestError
from modularbase.routing.history import PackHistory, PredictorStats, Turn

HALF_LIFE_S = 3 * 24 * 3600.0

# Prior of the transitions, in turns: a transition seen once counts as much as two that the
# frequencies promise.
_PRIOR_TURNS = 0.5


@dataclass(frozen=True, slots=True)
class Prediction:
    """A pack that may come next, and how likely the user's history makes it."""

    pack: str
    probability: float


class PackPredictor:
    """Learns from each user's own history which packs come next; users never see each other's.

    Prediction is off where there is no predictor: who uses one holds `PackPredictor | None`.

    Safe to use from several threads and processes on one file.
    """

    def __init__(
        self,
        path: Path,
        *,
        half_life_s: float = HALF_LIFE_S,
        max_uses_per_user: int = 512,
        max_users: int = 1024,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Opens the history, or begins one.

        Args:
            path: The SQLite file.
            half_life_s: Age at which a turn counts half.
            max_uses_per_user: Older ones are forgotten.
            max_users: Those who have not come back for longest are forgotten.
            now: The time in seconds, where a call names none.

        Raises:
            HistoryError: The file cannot be used, or a newer release wrote it.
        """
        for field, value in (
            ("half_life_s", half_life_s),
            ("max_uses_per_user", max_uses_per_user),
            ("max_users", max_users),
        ):
            if not (value > 0 and math.isfinite(value)):
                raise InvalidRequestError(field, "a number above 0", str(value))
        self._half_life_s = half_life_s
        self._now = now
        self._history = PackHistory(path, max_uses_per_user=max_uses_per_user, max_users=max_users)

    def __enter__(self) -> PackPredictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._history.close()

    def record(self, user: str, packs: Sequence[str], at: float | None = None) -> None:
        """Learns that a request used packs, and judges the predictions acted upon by it.

        A request without packs teaches nothing and judges nothing.
        """
        _check_names(user, packs)
        if packs:
            self._history.add(user, packs, self._time(at))

    def predict_next_packs(self, user: str, n: int, at: float | None = None) -> list[Prediction]:
        """The n likeliest packs of the user's next turn, the likeliest first.

        The formula is that of `next_pack_probabilities`. Equal probabilities are ordered by name.
        """
        _check_names(user, ())
        if n < 0:
            raise InvalidRequestError("n", "a number of packs, 0 or more", str(n))
        turns = self._history.turns(user)
        probabilities = next_pack_probabilities(turns, self._time(at), self._half_life_s)
        ordered = sorted(probabilities.items(), key=lambda item: (-item[1], item[0]))
        return [Prediction(pack, probability) for pack, probability in ordered[:n]]

    def acted_on(self, user: str, packs: Sequence[str]) -> None:
        """Notes that predicted packs were loaded.

        The user's next turn says of each whether it was a hit or a waste.
        """
        _check_names(user, packs)
        if packs:
            self._history.add_pending(user, packs)

    def stats(self) -> PredictorStats:
        """What became of the predictions acted upon, over all users remembered."""
        return self._history.stats()

    def forget(self, user: str) -> None:
        """Removes all that is known of a user, counters included."""
        self._history.forget(user)

    def _time(self, at: float | None) -> float:
        seconds = self._now() if at is None else at
        if not math.isfinite(seconds):
            raise InvalidRequestError("at", "a time in seconds", str(seconds))
        return seconds


def next_pack_probabilities(
    turns: Sequence[Turn], at: float, half_life_s: float
) -> Mapping[str, float]:
    """How likely each pack is in the turn after the last; sums to 1 unless there are no turns.

    With w_i = 2^(-age of turn i / half life), and a turn's packs P_i sharing it equally,
    u_i(p) = [p in P_i] / |P_i|:

        frequency     F(p)   = sum_i w_i u_i(p) / sum_i w_i
        transitions   N_q(p) = sum_i w_i+1 [q in P_i] u_i+1(p)
        backed off    T_q(p) = (N_q(p) + k F(p)) / (sum_p N_q(p) + k)
        probability   P(p)   = mean of T_q(p) over the packs q of the last turn

    k = 0.5 turns. So a pack never followed yet, or only long ago, leaves the word to F.
    """
    if not turns:
        return {}
    newest = max(turn.at for turn in turns)
    # Ages against the newest turn, so that a long absence does not turn F into 0 / 0.
    weights = [_decay(newest - turn.at, half_life_s) for turn in turns]
    frequency = _normalised(_shares(turns, weights))
    absence = _decay(at - newest, half_life_s)
    probabilities: dict[str, float] = defaultdict(float)
    last = turns[-1].packs
    for pack in last:
        after = [i for i in range(1, len(turns)) if pack in turns[i - 1].packs]
        seen = _shares([turns[i] for i in after], [absence * weights[i] for i in after])
        n_seen = sum(seen.values())
        for follower, prior in frequency.items():
            backed_off = (seen.get(follower, 0.0) + _PRIOR_TURNS * prior) / (n_seen + _PRIOR_TURNS)
            probabilities[follower] += backed_off / len(last)
    return probabilities


def _decay(age_s: float, half_life_s: float) -> float:
    # A clock set back makes turns lie in the future: they count as new.
    return math.pow(2.0, -max(age_s, 0.0) / half_life_s)


def _shares(turns: Sequence[Turn], weights: Sequence[float]) -> dict[str, float]:
    shares: dict[str, float] = defaultdict(float)
    for turn, weight in zip(turns, weights, strict=True):
        for pack in turn.packs:
            shares[pack] += weight / len(turn.packs)
    return shares


def _normalised(shares: Mapping[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _check_names(user: str, packs: Sequence[str]) -> None:
    for field, name in [("user", user), *(("packs", pack) for pack in packs)]:
        try:
            name.encode()  # half a surrogate pair cannot be stored
        except UnicodeEncodeError as error:
            raise InvalidRequestError(field, "text", repr(name)) from error
        if not name:
            raise InvalidRequestError(field, "a name", "an empty string")
