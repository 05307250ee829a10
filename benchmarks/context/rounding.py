"""ggml's rounding of keys and values, and the rotation that llama.cpp puts before it."""

from __future__ import annotations

import math

import torch

BLOCK = 32  # values that share a scale
Q4_0_BITS = 4 + 16 / BLOCK
Q8_0_BITS = 8 + 16 / BLOCK


def q8_0(rows: torch.Tensor) -> torch.Tensor:
    """Values [..., n] behind block_q8_0, n a multiple of 32."""
    blocks = _blocks(rows)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    # roundf: halves go away from zero.
    scaled = blocks * _inverse(scale)
    levels = scaled.sign() * (scaled.abs() + 0.5).floor()
    return (levels * _stored(scale)).view_as(rows)


def q4_0(rows: torch.Tensor) -> torch.Tensor:
    """Values [..., n] behind block_q4_0, n a multiple of 32: the largest value becomes -8."""
    blocks = _blocks(rows)
    largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    scale = largest / -8
    levels = (blocks * _inverse(scale) + 8.5).floor().clamp(0, 15) - 8
    return (levels * _stored(scale)).view_as(rows)


def rotate(rows: torch.Tensor) -> torch.Tensor:
    """Values [..., n] times a Hadamard matrix over parts of n, which is its own inverse.

    The parts are as long as the largest power of two, at most 128, that divides n.
    """
    size = math.gcd(rows.shape[-1], 128)
    parts = rows.reshape(-1, size)
    return (parts @ _hadamard(size)).view(rows.shape)


def _hadamard(size: int) -> torch.Tensor:
    """Sylvester's, scaled to be orthogonal."""
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(size)


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    if rows.shape[-1] % BLOCK:
        raise ValueError(f"rows: expected a multiple of {BLOCK} values, found {rows.shape[-1]}")
    return rows.reshape(*rows.shape[:-1], -1, BLOCK)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, scale, 1 / scale)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """Levels come from the exact scale, values from the one in the block, which is F16."""
    return scale.half().float()
