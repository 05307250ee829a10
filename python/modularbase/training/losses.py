"""Losses behind the output head, in chunks of rows, so that a batch's logits are never all held."""

from __future__ import annotations

from typing import Any

import torch

# Rows of logits held at once: 128 rows of a vocabulary of 50 000 in F32 are 26 MB.
_CHUNK_ROWS = 128


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over rows of -ln p(target), in nats.

    Args:
        hidden: Final states, behind the output norm [n_rows, n_embd].
        head: Output matrix [n_vocab, n_embd]; gets no gradient.
        targets: Token ids [n_rows].
    """
    head = _narrowed(head)
    return _HeadLoss.apply(hidden, head, targets, head, 1.0)


def kl_to_base(hidden: torch.Tensor, head: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Sum over rows of KL(base || pack), in nats.

    Args:
        hidden: Final states with the pack [n_rows, n_embd].
        head: Output matrix [n_vocab, n_embd]; gets no gradient.
        base: Final states of the plain base [n_rows, n_embd]; get no gradient.
    """
    head = _narrowed(head)
    return _HeadLoss.apply(hidden, head, base, head, 1.0)


def kl_to_teacher(
    hidden: torch.Tensor,
    head: torch.Tensor,
    states: torch.Tensor,
    teacher_head: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Sum over rows of T^2 KL(teacher || pack) of both distributions at temperature T, in nats.

    Args:
        hidden: Final states with the pack [n_rows, n_embd].
        head: Output matrix [n_vocab, n_embd]; gets no gradient.
        states: Final states of the teacher [n_rows, its n_embd]; get no gradient.
        teacher_head: Its output matrix [n_vocab, its n_embd]; gets no gradient.
        temperature: T.
    """
    heads = _narrowed(head), _narrowed(teacher_head)
    return _HeadLoss.apply(hidden, heads[0], states, heads[1], temperature)


class _HeadLoss(torch.autograd.Function):
    """Computes the gradient together with the loss, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        aim: torch.Tensor,
        aim_head: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """Sums the loss; aim is token ids (cross-entropy) or states for aim_head (KL)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, len(hidden), _CHUNK_ROWS):
            rows = slice(first, first + _CHUNK_ROWS)
            log_p = _log_softmax(hidden[rows] @ head.T, wide, temperature)  # [n, n_vocab]
            if aim.is_floating_point():
                log_q = _log_softmax(aim[rows] @ aim_head.T, wide, temperature)
                q = log_q.exp()
                total += temperature**2 * (q * (log_q - log_p)).sum()
                difference = log_p.exp_().sub_(q)
                if temperature != 1:  # T^2, and 1/T of the logits
                    difference *= temperature
            else:
                ids = aim[rows, None]
                total -= log_p.gather(1, ids).sum()
                difference = log_p.exp_()
                difference.scatter_add_(1, ids, torch.full_like(ids, -1, dtype=wide))
            if grad is not None:
                grad[rows] = difference.to(head.dtype) @ head
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scales what forward found."""
        (grad,) = ctx.saved_tensors
        return outer[0].to(grad.dtype) * grad, None, None, None, None


def _log_softmax(logits: torch.Tensor, dtype: torch.dtype, temperature: float) -> torch.Tensor:
    wide = logits.to(dtype)
    return (wide if temperature == 1 else wide / temperature).log_softmax(dim=-1)


def _narrowed(head: torch.Tensor) -> torch.Tensor:
    """The head in autocast's type, converted once instead of for every chunk."""
    kind = head.device.type
    return head.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else head
