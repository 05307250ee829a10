"""Attention against PyTorch's own: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from modularbase.training.attention import attend


def inputs(n_head_kv: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value of two sequences of nine tokens."""
    draw = torch.Generator().manual_seed(0)
    heads = (6, n_head_kv, n_head_kv)
    made = [torch.randn(2, n, 9, 16, generator=draw, dtype=torch.float64) for n in heads]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def results(parts: list[torch.Tensor], found: torch.Tensor) -> list[torch.Tensor]:
    """Values and the gradients of a weighted sum of them."""
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    return [found, *torch.autograd.grad((found * weights).sum(), parts)]


# F64 leaves the last bits of 53; BF16 has 8, and sums of nine products.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("n_head_kv", [1, 2, 6])
def test_values_and_gradients_are_those_of_pytorch(
    n_head_kv: int, dtype: torch.dtype, atol: float
) -> None:
    query, key, value = parts = inputs(n_head_kv, dtype)
    found, nothing = attend(torch.nn.Module(), query, key, value, None, scaling=0.3)
    assert nothing is None and found.dtype == dtype
    theirs = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    expected = results(parts, theirs.transpose(1, 2))
    for mine, other in zip(results(parts, found), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=atol, rtol=0)
