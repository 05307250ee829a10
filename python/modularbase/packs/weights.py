"""A pack's weights in memory: numpy arrays by the names of docs/pack-format.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from modularbase.errors import PackFormatError
from modularbase.packs.manifest import Manifest, Quantisation
from modularbase.types import FloatArray

WeightType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k"]

PROFILE = "profile.centroids"
MAX_CENTROIDS = 64
MAX_PROBE = 64

_TOKEN_GATE = ("token_gate.weight", "token_gate.bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackGeometry:
    """The shape of a pack; see docs/pack-format.md."""

    n_embd: int
    d_inner: int
    d_ff: int
    n_expert: int = 8
    n_expert_used: int = 2
    sites: tuple[int, ...]
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Probe:
    """Token ids to try a pack on, and the relative change of the final hidden state at each."""

    tokens: tuple[int, ...]
    effect: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackWeights:
    """A whole pack.

    Attributes:
        geometry: Its shape.
        tensors: Arrays by their names in the file. Shapes are numpy's: the reverse of the file's.
            Token gates and `profile.centroids` are optional.
        manifest: What it says of itself; `quantisation` gives the types in the file.
        scale: Factor of the pack's output.
        probe: What it should do to a base, where known.
    """

    geometry: PackGeometry
    tensors: Mapping[str, FloatArray]
    manifest: Manifest
    scale: float = 1.0
    probe: Probe | None = None


def tensor_shapes(geometry: PackGeometry) -> dict[str, tuple[int, ...]]:
    """Names of all tensors of a site that are not optional, with numpy's shapes, site by site."""
    g = geometry
    one_site = {
        "in.weight": (g.d_inner, g.n_embd),
        "norm.weight": (g.d_inner,),
        "router.weight": (g.n_expert, g.d_inner),
        "expert_gate.weight": (g.n_expert, g.d_ff, g.d_inner),
        "expert_up.weight": (g.n_expert, g.d_ff, g.d_inner),
        "expert_down.weight": (g.n_expert, g.d_inner, g.d_ff),
        "out.weight": (g.n_embd, g.d_inner),
    }
    return {
        f"site.{i}.{name}": shape for i in range(len(g.sites)) for name, shape in one_site.items()
    }


def check_tensors(weights: PackWeights, file: str) -> None:
    """Refuses missing, unknown and misshapen tensors.

    Raises:
        PackFormatError: Naming the tensor.
    """
    expected = tensor_shapes(weights.geometry) | _optional_shapes(weights)
    for name in sorted(expected.keys() | weights.tensors.keys()):
        shape, array = expected.get(name), weights.tensors.get(name)
        if shape is None:
            raise PackFormatError(file, name, "no such tensor in a pack of this geometry", "one")
        if array is None:
            raise PackFormatError(file, name, f"a tensor of shape {list(shape)}", "none")
        if array.shape != shape:
            raise PackFormatError(file, f"{name} shape", str(list(shape)), str(list(array.shape)))


def type_of(name: str, quantisation: Quantisation) -> WeightType:
    """The type a tensor has in the file."""
    part = name.split(".")[-2]
    if part.startswith("expert_"):
        return quantisation.experts
    return quantisation.adapters if part in ("in", "out") else "f32"


def _optional_shapes(weights: PackWeights) -> dict[str, tuple[int, ...]]:
    n_embd = weights.geometry.n_embd
    shapes: dict[str, tuple[int, ...]] = {}
    for gate in _gates(weights):
        shapes |= {f"{gate}.{_TOKEN_GATE[0]}": (n_embd,), f"{gate}.{_TOKEN_GATE[1]}": (1,)}
    profile = weights.tensors.get(PROFILE)
    if profile is not None:
        n_centroids = profile.shape[0] if profile.ndim else 0
        shapes[PROFILE] = (min(max(n_centroids, 1), MAX_CENTROIDS), n_embd)
    return shapes


def _gates(weights: PackWeights) -> Iterator[str]:
    for i in range(len(weights.geometry.sites)):
        if any(f"site.{i}.{part}" in weights.tensors for part in _TOKEN_GATE):
            yield f"site.{i}"
