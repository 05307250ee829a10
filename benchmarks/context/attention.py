"""Attention to slots that may have a bias, which also shows the queries it was asked.

Slots before the new tokens are seen by all of them, whatever positions they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

NAME = "modularbase-context"
"""What a model's configuration calls it."""

_ROWS = 512  # at a time, which bounds the memory for scores


@dataclass(frozen=True)
class Pass:
    """One pass through the model.

    Attributes:
        biases: Of each layer's slots [n_head_kv, n_slots], added to scores; None: nothing.
        queries: Filled with each layer's rotated queries [n_head, n_tokens, head_dim].
    """

    biases: Sequence[torch.Tensor | None] = ()
    queries: list[torch.Tensor] = field(default_factory=list)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    this_pass: Pass,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attends to all slots, and to new tokens up to one's own; in transformers' form.

    Args:
        module: The layer's attention.
        query: [1, n_head, n_tokens, head_dim].
        key: [1, n_head_kv, n_slots + n_tokens, head_dim].
        value: As key.
        attention_mask: None.
        scaling: Of the scores.
        this_pass: What belongs to the pass.

    Returns:
        [1, n_tokens, n_head, head_dim], and None for the scores.
    """
    assert attention_mask is None
    this_pass.queries.append(query[0])
    _, n_head, n_tokens, head_dim = query.shape
    n_head_kv, n_all = key.shape[1], key.shape[2]
    n_slots = n_all - n_tokens
    bias = this_pass.biases[module.layer_idx] if this_pass.biases else None
    grouped = query[0].view(n_head_kv, n_head // n_head_kv, n_tokens, head_dim) * scaling
    mixed = torch.empty(1, n_tokens, n_head, head_dim)
    for first in range(0, n_tokens, _ROWS):
        rows = grouped[:, :, first : first + _ROWS]
        n_rows = rows.shape[2]
        scores = rows @ key[0, :, None].mT  # [n_head_kv, n_group, n_rows, n_all]
        if bias is not None:
            scores[..., : bias.shape[1]] += bias[:, None, None]
        later = torch.ones(n_rows, n_all, dtype=torch.bool).triu(n_slots + first + 1)
        shares = scores.masked_fill_(later, -torch.inf).softmax(dim=-1)
        part = (shares @ value[0, :, None]).view(n_head, n_rows, head_dim)
        mixed[0, first : first + n_rows] = part.transpose(0, 1)
    return mixed, None


AttentionInterface.register(NAME, attend)
