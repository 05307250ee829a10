"""Packs in training for the tiny base, and what a process without torch publishes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from modularbase.packs.channel_info import ChannelInfo
from modularbase.packs.weights import PackGeometry, tensor_shapes
from modularbase.training.channel import Array, TensorSpec, WeightChannelWriter

N_EMBD = 96  # of the tiny base

GEOMETRY = PackGeometry(
    n_embd=N_EMBD, d_inner=256, d_ff=256, n_expert=2, n_expert_used=1, sites=(1, 2)
)


def info(**changes: Any) -> dict[str, Any]:
    """What the channel of such a pack says."""
    shape = {name: getattr(GEOMETRY, name) for name in PackGeometry.__dataclass_fields__}
    said = ChannelInfo(**{**shape, "expert_type": "f16"}).model_dump(mode="json")
    return {**said, **changes}


def specs() -> list[TensorSpec]:
    """Its tensors."""
    return [
        TensorSpec(name, "f16" if len(shape) > 1 and "router" not in name else "f32", shape)
        for name, shape in tensor_shapes(GEOMETRY).items()
    ]


def writer(name: str, said: Mapping[str, Any] | None = None) -> WeightChannelWriter:
    """A channel for such a pack."""
    return WeightChannelWriter(name, specs(), info() if said is None else said)


def fill(channel: WeightChannelWriter, seed: int) -> None:
    """Random weights into the idle buffer: each seed another pack, all with a visible effect."""
    random = np.random.default_rng(seed)
    for name in channel.tensors:
        array: Array = channel.array(name)
        size = 1.0 if name.endswith("norm.weight") else array.shape[-1] ** -0.5
        array[...] = random.standard_normal(array.shape) * size


def publish(channel: WeightChannelWriter, seed: int) -> int:
    """Shows a pack of random weights; returns its generation."""
    fill(channel, seed)
    return channel.publish()
