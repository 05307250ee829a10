"""Packs with random weights: of the right shapes, with a visible effect, and no knowledge."""

from __future__ import annotations

import numpy as np

from modularbase.packs.manifest import Manifest
from modularbase.packs.weights import PackGeometry, PackWeights, tensor_shapes
from modularbase.types import FloatArray


def random_weights(
    manifest: Manifest, geometry: PackGeometry, *, seed: int, strength: float = 0.1
) -> PackWeights:
    """A pack that changes what a base says without saying anything itself.

    Args:
        manifest: What it is called and which types its file has.
        geometry: Its shape.
        seed: Equal seeds give equal packs.
        strength: Size of what it adds, relative to its normalised inner state.
    """
    random = np.random.default_rng(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> FloatArray:
        if name.endswith("norm.weight"):
            return np.ones(shape, np.float32)
        scale = shape[-1] ** -0.5 * (strength if name.endswith("out.weight") else 1.0)
        values: FloatArray = random.standard_normal(shape, np.float32)
        values *= np.float32(scale)
        return values

    tensors = {name: tensor(name, shape) for name, shape in tensor_shapes(geometry).items()}
    return PackWeights(geometry=geometry, tensors=tensors, manifest=manifest)
