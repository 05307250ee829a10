"""Whether a pack does to the base what it should: one that does nothing is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from modularbase.errors import PackFormatError
from modularbase.packs.weights import Probe
from modularbase.types import FloatArray

GENERIC_TOKENS = tuple(range(1, 8))
"""Run where a pack has no probe of its own: any tokens show whether it does something.

Seven, which a step computes row by row: in whatever steps they run, beside whatever, an identity
gives the base's very bits (see `kTileSpanRows` in the runtime).
"""

# Bases of other types round differently; another pack, or another base, is far outside.
_TOLERANCE = 0.25


def stored_probe(metadata: Mapping[str, Any]) -> Probe | None:
    """The probe in a pack file's metadata, which has been checked."""
    tokens = metadata.get("modularbase-pack.probe.tokens")
    effect = metadata.get("modularbase-pack.probe.effect")
    if tokens is None or effect is None:
        return None
    return Probe(tuple(int(t) for t in tokens), tuple(float(e) for e in effect))


def check_finite(file: str, effect: FloatArray) -> None:
    """Refuses a pack that breaks the numbers.

    Raises:
        PackFormatError: Naming the file.
    """
    if not np.isfinite(effect).all():
        raise PackFormatError(file, "probe", "finite states", "NaN or infinity")


def check_effect(file: str, effect: FloatArray, stored: Probe | None) -> None:
    """Checks what a pack did to the final hidden states.

    Args:
        file: Named in the error.
        effect: Relative size of the change at each token.
        stored: What it did when it was made, if that is known.

    Raises:
        PackFormatError: It does nothing, or something else, or breaks the numbers.
    """
    check_finite(file, effect)
    if not effect.any():
        raise PackFormatError(file, "probe", "a pack that changes the base", "no effect at all")
    if stored is None:
        return
    expected = np.asarray(stored.effect, np.float32)
    difference = float(np.linalg.norm(effect - expected) / max(np.linalg.norm(expected), 1e-9))
    if not difference <= _TOLERANCE:
        found = f"one that is {100 * difference:.0f} % away"
        raise PackFormatError(file, "probe", "the effect it was stored with", found)
