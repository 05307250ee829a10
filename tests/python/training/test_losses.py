"""Losses in chunks against the same written plainly."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from modularbase.training.losses import cross_entropy, kl_to_base

N_ROWS, N_EMBD, N_VOCAB = 300, 24, 50  # rows of three chunks, the last one short


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States with the pack, of the base, and the head."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((N_ROWS, N_EMBD), (N_ROWS, N_EMBD), (N_VOCAB, N_EMBD))
    hidden, base, head = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return hidden.requires_grad_(), base, head


def check(found: torch.Tensor, expected: torch.Tensor, hidden: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(3 * loss, hidden)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_cross_entropy(states: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    hidden, _, head = states
    targets = torch.randint(N_VOCAB, (N_ROWS,), generator=torch.Generator().manual_seed(1))
    expected = functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    check(cross_entropy(hidden, head, targets), expected, hidden)


def test_kl(states: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    hidden, base, head = states
    p, q = (functional.log_softmax(rows @ head.T, dim=-1) for rows in (hidden, base))
    expected = functional.kl_div(p, q, reduction="sum", log_target=True)
    check(kl_to_base(hidden, head, base), expected, hidden)
    same = kl_to_base(hidden, head, hidden.detach())
    assert same.item() == pytest.approx(0, abs=1e-9)


def test_under_autocast_the_sum_stays_wide(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    hidden, base, head = (tensor.detach().float() for tensor in states)
    exact = kl_to_base(hidden, head, base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = kl_to_base(hidden, head, base)
    assert narrow.dtype == torch.float32
    assert float(narrow) == pytest.approx(float(exact), rel=0.02) and narrow != exact
