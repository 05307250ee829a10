"""Random packs as files, and the numbers that lie in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from modularbase.packs.manifest import Manifest
from tests.tools.pack_values import F32, KEY, PackValues, read_pack

NORM_EPS = 1e-5

# Spread of the router's logits: the chosen experts differ from row to row, and ties are rare.
_ROUTER_SPREAD = 2.0
# Size of y where the weights are drawn as below: z has rms 1, two experts add about as much.
_Y_RMS = 1.4

_LEAST: dict[str, Any] = {
    "id": "tiny_pack",
    "version": "1.0.0",
    "name": "Tiny pack",
    "domain": "testing",
    "licence": "CC0-1.0",
    "base_id": "tiny",
}


@dataclass(frozen=True, slots=True)
class _Shape:
    n_embd: int
    d_inner: int
    d_ff: int
    n_expert: int
    strength: float
    token_gates: bool


def write_tiny_pack(
    path: Path,
    *,
    n_embd: int,
    sites: Sequence[int],
    d_inner: int = 256,
    d_ff: int = 256,
    n_expert: int = 8,
    n_expert_used: int = 2,
    adapter_type: str = "f16",
    expert_type: str = "q4_0",
    seed: int = 0,
    token_gates: bool = False,
    scale: float = 1.0,
    strength: float = 0.3,
    manifest: Mapping[str, Any] | None = None,
) -> PackValues:
    """Writes a random pack and returns the values that lie in the file.

    Args:
        path: Where the pack goes.
        n_embd: Width of the base.
        sites: Base layers, ascending.
        d_inner: Width of z.
        d_ff: Width inside an expert.
        n_expert: Experts a site has.
        n_expert_used: Experts a token uses.
        adapter_type: "f16", "bf16" or "f32".
        expert_type: "q4_k", "q4_0", "q8_0" or "f16".
        seed: Of the weights.
        token_gates: Whether the sites have token gates.
        scale: s_p.
        strength: About the root mean square of a site's output at scale 1; 0 is the identity.
        manifest: Fields of the manifest that differ from the least one.
    """
    shape = _Shape(n_embd, d_inner, d_ff, n_expert, strength, token_gates)
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "modularbase-pack")
    writer.add_uint32(KEY + "format_version", 1)
    for name in ("n_embd", "d_inner", "d_ff", "n_expert"):
        writer.add_uint32(KEY + name, getattr(shape, name))
    writer.add_uint32(KEY + "n_expert_used", n_expert_used)
    writer.add_array(KEY + "sites", list(sites))
    writer.add_float32(KEY + "norm_eps", NORM_EPS)
    writer.add_float32(KEY + "scale", scale)
    quantisation = {"experts": expert_type, "adapters": "bf16" if adapter_type == "bf16" else "f16"}
    fields = {**_LEAST, "quantisation": quantisation, **(manifest or {})}
    writer.add_string(KEY + "manifest", Manifest.model_validate(fields).to_json())
    types = {"adapter": adapter_type, "expert": expert_type, "plain": "f32"}
    for i in range(len(sites)):
        for name, role, values in _random_site(shape, draw):
            kind = gguf.GGMLQuantizationType[types[role].upper()]
            writer.add_tensor(f"site.{i}.{name}", _stored(values, kind, draw), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_pack(path)


def _random_site(
    shape: _Shape, draw: np.random.Generator
) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Tensors as (name, role, values), scaled so that z, the experts and y are of size 1."""

    def normal(*dims: int, std: float) -> NDArray[Any]:
        values: NDArray[Any] = draw.standard_normal(dims, dtype=F32) * F32(std)
        return values

    n_embd, d_inner, d_ff, n_expert = shape.n_embd, shape.d_inner, shape.d_ff, shape.n_expert
    yield "in.weight", "adapter", normal(d_inner, n_embd, std=n_embd**-0.5)
    yield "norm.weight", "plain", 1 + normal(d_inner, std=0.1)
    yield "router.weight", "plain", normal(n_expert, d_inner, std=_ROUTER_SPREAD * d_inner**-0.5)
    for name in ("expert_gate.weight", "expert_up.weight"):
        yield name, "expert", normal(n_expert, d_ff, d_inner, std=d_inner**-0.5)
    # silu(a) * b of normal a and b has rms 0.6; two experts with gates that sum to 1 about 0.7.
    yield "expert_down.weight", "expert", normal(n_expert, d_inner, d_ff, std=2.4 * d_ff**-0.5)
    out_std = shape.strength * d_inner**-0.5 / _Y_RMS
    yield "out.weight", "adapter", normal(n_embd, d_inner, std=out_std)
    if shape.token_gates:
        yield "token_gate.weight", "plain", normal(n_embd, std=n_embd**-0.5)
        yield "token_gate.bias", "plain", normal(1, std=0.5)


def _stored(values: NDArray[Any], kind: Any, draw: np.random.Generator) -> NDArray[Any]:
    if kind == gguf.GGMLQuantizationType.Q4_K:
        return _random_q4_k(values, draw)
    stored: NDArray[Any] = gguf.quants.quantize(values, kind)
    return stored


def _random_q4_k(like: NDArray[Any], draw: np.random.Generator) -> NDArray[Any]:
    """Random Q4_K blocks of the shape and spread of `like`, since gguf cannot quantise to Q4_K.

    A block of 256 is F16 d, F16 dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles:
    value = d * scale * nibble - dmin * minimum.
    """
    n = like.size // 256
    scales = draw.integers(16, 64, (n, 8), dtype=np.uint8)
    # Near the scales, so that the values have mean 0, yet others: mixing them up must show.
    minima = np.clip(scales + draw.integers(-8, 9, (n, 8)), 0, 63).astype(np.uint8)
    packed = np.empty((n, 12), np.uint8)
    packed[:, :4] = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    packed[:, 4:8] = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    packed[:, 8:] = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    # Nibbles 0..15 have mean 7.5 and deviation 4.6; the scales have rms 42.
    d = (like.std() / (4.6 * 42) * draw.uniform(0.8, 1.2, (n, 1))).astype(np.float16)
    d_min = (7.5 * d.astype(F32)).astype(np.float16)
    nibbles = draw.integers(0, 256, (n, 128), dtype=np.uint8)
    blocks = np.concatenate([d.view(np.uint8), d_min.view(np.uint8), packed, nibbles], axis=1)
    return blocks.reshape(*like.shape[:-1], -1)
