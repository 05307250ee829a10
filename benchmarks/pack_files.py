"""Random packs of the two geometries that the targets name, kept between runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.paths import CACHE
from modularbase.engine import Engine
from modularbase.packs.manifest import ExpertType, Manifest, Quantisation
from modularbase.packs.pack_file import write_pack
from modularbase.packs.random_pack import random_weights
from modularbase.packs.scaffold import default_sites
from modularbase.packs.weights import PackGeometry

WIDTHS = {"S": 256, "M": 512}
N_SITES = 8


def pack_file(
    engine: Engine, seed: int, size: str = "S", experts: ExpertType = "q4_0"
) -> tuple[str, Path]:
    """Returns name and file of a random pack for the engine's base, made when it is missing."""
    name = f"bench_{size}_{experts}_{seed}".lower()
    path = CACHE / "packs" / f"{engine.base.id}-{name}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        info = engine.info
        geometry = PackGeometry(
            n_embd=info["n_embd"],
            d_inner=WIDTHS[size],
            d_ff=WIDTHS[size],
            sites=default_sites(info["n_layer"]),
        )
        manifest = Manifest(
            id=name,
            version="1.0.0",
            name=name,
            domain="benchmark",
            licence="CC0-1.0",
            base_id=engine.base.id,
            quantisation=Quantisation(experts=experts),
        )
        write_pack(path, random_weights(manifest, geometry, seed=seed))
    return name, path


def load_packs(engine: Engine, n: int, size: str = "S") -> list[str]:
    """Loads n packs of INT4 experts; returns their names."""
    names = []
    for seed in range(n):
        name, path = pack_file(engine, seed, size)
        engine.packs.load(str(path))
        names.append(name)
    return names


def bytes_read_per_token(n_embd: int, size: str) -> float:
    """Returns what one token reads of an INT4 pack: adapters, 2 of 8 experts, router and norms."""
    width = WIDTHS[size]
    adapters = 2 * 2 * n_embd * width
    experts = 2 * 3 * width * width * 18 / 32  # Q4_0: 18 bytes for 32 weights
    small = 4 * (width + 8 * width + n_embd)
    return N_SITES * (adapters + experts + small)


def memcpy_us(n_bytes: int, n_sources: int) -> float:
    """Returns the time of copying so many bytes, each time from another of some buffers.

    A pack that is loaded was not used just now: its bytes are in memory, not in the CPU's caches.
    """
    sources = [np.full(n_bytes, i, np.uint8) for i in range(n_sources)]
    target = np.zeros(n_bytes, np.uint8)
    return 1e6 * statistics.median(
        _seconds(partial(np.copyto, target, source)) for source in sources * 8
    )


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
