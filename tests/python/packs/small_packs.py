"""The smallest packs the format allows, for tests that need whole files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modularbase.packs.archive import write_archive
from modularbase.packs.manifest import Manifest, PackRequirement, Quantisation
from modularbase.packs.pack_file import write_pack
from modularbase.packs.weights import PackGeometry, PackWeights, tensor_shapes
from modularbase.types import FloatArray

GEOMETRY = PackGeometry(n_embd=32, d_inner=256, d_ff=256, n_expert=2, n_expert_used=1, sites=(3,))


def small_manifest(
    name: str = "python_code@1.0.0", needs: Sequence[str] = (), **changes: Any
) -> Manifest:
    """A manifest by ID@VERSION; `needs` are "id specifiers", `title` is its name."""
    pack_id, _, version = name.partition("@")
    given: dict[str, Any] = {
        "id": pack_id,
        "version": version,
        "name": changes.pop("title", pack_id),
        "domain": "test",
        "licence": "CC0-1.0",
        "base_id": "smollm2-135m",
        "quantisation": Quantisation(experts="q8_0"),
        "dependencies": tuple(
            PackRequirement(id=need.partition(" ")[0], version=need.partition(" ")[2])
            for need in needs
        ),
    }
    return Manifest(**given | changes)


def small_tensors(seed: int = 0, geometry: PackGeometry = GEOMETRY) -> dict[str, FloatArray]:
    """Random arrays for every tensor that is not optional."""
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(shape, dtype=np.float32)
        for name, shape in tensor_shapes(geometry).items()
    }


def small_weights(
    name: str = "python_code@1.0.0", needs: Sequence[str] = (), seed: int = 0, **changes: Any
) -> PackWeights:
    """A whole pack."""
    manifest = small_manifest(name, needs, **changes)
    return PackWeights(geometry=GEOMETRY, tensors=small_tensors(seed), manifest=manifest)


def small_gguf(path: Path, name: str = "python_code@1.0.0", **options: Any) -> Path:
    """Writes a pack file."""
    write_pack(path, small_weights(name, **options))
    return path


def small_archive(folder: Path, name: str = "python_code@1.0.0", **options: Any) -> Path:
    """Writes an archive, named ID-VERSION.mbpack."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name.replace('@', '-')}.mbpack"
    gguf = small_gguf(folder / f".{target.stem}.part", name, **options)
    write_archive(target, gguf, f"# {name}\n")
    gguf.unlink()
    return target
