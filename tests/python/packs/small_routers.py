"""Random router packs."""

from __future__ import annotations

import numpy as np

from modularbase.packs.router_file import HeadName, LinearHead, RoutedPack, RouterWeights
from tests.python.packs.small_packs import small_manifest

N_EMBD = 32
PACKS = (RoutedPack("python_code", "1.0.0"), RoutedPack("医疗问答包", "0.2.0"))


BOTH: tuple[HeadName, ...] = ("router", "fusion")


def small_router(heads: tuple[HeadName, ...] = BOTH) -> RouterWeights:
    """Random heads for two packs."""
    random = np.random.default_rng(0)

    def head(n_outputs: int, temperature: float) -> LinearHead:
        weight = random.standard_normal((n_outputs, N_EMBD), dtype=np.float32)
        return LinearHead(weight, random.standard_normal(n_outputs, np.float32), temperature)

    both: dict[HeadName, LinearHead] = {"router": head(3, 1.5), "fusion": head(2, 1.0)}
    return RouterWeights(
        manifest=small_manifest("router@1.0.0", type="router"),
        layer=2,
        pooling="mean",
        packs=PACKS,
        heads={name: both[name] for name in heads},
    )
