"""Tiny packs for a tiny base: as files, installed, and at work in an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modularbase import Engine, Generation, PackRequest, PackUse, Result
from modularbase.packs.install import install
from modularbase.packs.manifest import PackRequirement
from modularbase.packs.spec import parse_spec
from modularbase.packs.store import InstalledPack
from modularbase.types import Packs
from tests.tools.tiny_models import N_EMBD
from tests.tools.tiny_packs import write_tiny_pack
from tests.tools.tiny_requests import BITWISE_ROWS, ids

BASE_ID = "tiny-packs"  # the base of `pack_model`
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
WAIT_S = 300  # far above what anything here takes; a hang fails instead of stalling the run
PROMPT = ids(5)


def pack_file(
    folder: Path,
    name: str = "code",
    *,
    needs: Sequence[str] = (),
    conflicts: Sequence[str] = (),
    fallback: Sequence[str] = (),
    base_id: str = BASE_ID,
    manifest: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Writes the smallest pack that suits the tiny base.

    Args:
        folder: Where to.
        name: ID or ID@VERSION; it also decides the weights.
        needs: Its dependencies, as `parse_spec` reads them.
        conflicts: What it does not go with.
        fallback: Ids of packs to try where it fails.
        base_id: The base it says it was made for.
        manifest: Other fields of the manifest.
        **options: As for `write_tiny_pack`.
    """
    pack_id, _, version = name.partition("@")
    version = version or "1.0.0"
    fields: dict[str, Any] = {
        "id": pack_id,
        "version": version,
        "base_id": base_id,
        "dependencies": _requirements(needs),
        "conflicts": _requirements(conflicts),
        "fallback": tuple(fallback),
        **(manifest or {}),
    }
    shape: dict[str, Any] = {"n_embd": N_EMBD, "sites": (1, 2), "n_expert": 2, "n_expert_used": 1}
    seed = int.from_bytes(name.encode(), "little")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{pack_id}-{version}.gguf"
    write_tiny_pack(path, **{**shape, "seed": seed, **options}, manifest=fields)
    return path


def install_pack(folder: Path, name: str = "code", **options: Any) -> InstalledPack:
    """Writes a pack as `pack_file` does and installs it; what it needs must be there."""
    return install([str(pack_file(folder, name, **options))])[-1]


def spoil(pack: InstalledPack) -> str:
    """Makes an installed pack another than the one on record; returns its name."""
    content = bytearray(pack.path.read_bytes())
    content[-1] ^= 1
    pack.path.write_bytes(content)
    return pack.manifest.id


def answer(engine: Engine, packs: Packs = None, **options: Any) -> Result:
    """A short greedy answer, the same bits whatever else runs (see BITWISE_ROWS)."""
    assert len(PROMPT) <= BITWISE_ROWS
    arguments: dict[str, Any] = {"max_tokens": 16, **GREEDY, **options}
    return engine.submit(PROMPT, packs=packs, **arguments).result(WAIT_S)


def never(pack: str) -> PackRequest:
    """A request for one pack and nothing else."""
    return PackRequest(packs=(PackUse(pack),), fallback="never")


def tokens(engine: Engine, packs: Packs = None, **options: Any) -> list[int]:
    """The token ids of `answer`, for which nothing may have been given up."""
    result = answer(engine, packs, **options)
    assert result.fallbacks == ()
    return result.token_ids


@contextmanager
def leased(engine: Engine, packs: Packs) -> Iterator[Generation]:
    """A request that runs with these packs as long as the block does."""
    endless = engine.submit(PROMPT, packs=packs, max_tokens=32_000, **GREEDY)
    try:
        next(iter(endless))
        yield endless
        assert not endless.finished(), "it was to outlast the block"
    finally:
        endless.cancel()
        eventually(endless.finished)


def eventually(condition: Callable[[], object]) -> None:
    """Waits for what other threads are about to do."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.001)


def _requirements(specs: Sequence[str]) -> tuple[PackRequirement, ...]:
    return tuple(parse_spec(spec) for spec in specs)
