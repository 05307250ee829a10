"""A pack file's contents as plain F32 arrays, read with the gguf package and nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from modularbase.packs.manifest import Manifest, parse_manifest

F32: type = np.float32
KEY = "modularbase-pack."


@dataclass(frozen=True, slots=True)
class SiteValues:
    """One site's weights in F32, the output dimension first; docs/pack-format.md names them."""

    w_in: NDArray[Any]  # [d_inner, n_embd]
    norm: NDArray[Any]  # [d_inner]
    router: NDArray[Any]  # [n_expert, d_inner]
    expert_gate: NDArray[Any]  # [n_expert, d_ff, d_inner]
    expert_up: NDArray[Any]  # [n_expert, d_ff, d_inner]
    expert_down: NDArray[Any]  # [n_expert, d_inner, d_ff]
    w_out: NDArray[Any]  # [n_embd, d_inner]
    token_gate: NDArray[Any] | None  # [n_embd]
    token_bias: float


@dataclass(frozen=True, slots=True)
class PackValues:
    """What a pack file holds: the numbers a reference computes with."""

    path: Path
    manifest: Manifest
    layers: tuple[int, ...]  # base layer of each site
    n_expert_used: int
    norm_eps: float
    scale: float
    adapter_type: str
    expert_type: str
    sites: tuple[SiteValues, ...]

    def site_at(self, layer: int) -> SiteValues | None:
        """The site on a layer of the base, if the pack has one there."""
        return self.sites[self.layers.index(layer)] if layer in self.layers else None


def read_pack(path: Path) -> PackValues:
    """Reads a sound pack file, dequantising every tensor."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(name: str) -> Any:
        return reader.fields[KEY + name].contents()

    layers = tuple(int(layer) for layer in value("sites"))
    return PackValues(
        path=path,
        manifest=parse_manifest(value("manifest"), str(path)),
        layers=layers,
        n_expert_used=int(value("n_expert_used")),
        norm_eps=float(value("norm_eps")),
        scale=float(value("scale")),
        adapter_type=tensors["site.0.in.weight"].tensor_type.name.lower(),
        expert_type=tensors["site.0.expert_gate.weight"].tensor_type.name.lower(),
        sites=tuple(_site(tensors, i) for i in range(len(layers))),
    )


def _site(tensors: Mapping[str, Any], index: int) -> SiteValues:
    def values(name: str) -> NDArray[Any]:
        tensor = tensors[f"site.{index}.{name}"]
        plain: NDArray[Any] = np.array(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=F32
        )
        return plain

    has_gate = f"site.{index}.token_gate.weight" in tensors
    return SiteValues(
        w_in=values("in.weight"),
        norm=values("norm.weight"),
        router=values("router.weight"),
        expert_gate=values("expert_gate.weight"),
        expert_up=values("expert_up.weight"),
        expert_down=values("expert_down.weight"),
        w_out=values("out.weight"),
        token_gate=values("token_gate.weight") if has_gate else None,
        token_bias=float(values("token_gate.bias")[0]) if has_gate else 0.0,
    )
