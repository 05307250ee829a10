"""Causal attention whose backward pass is fast on a CPU.

PyTorch's fused attention keeps no scores, which long sequences need, and on a CPU takes a quarter
of a training step's backward pass to compute them again. The blocks of a run are short: here the
scores are held, and all is batched products. Elsewhere PyTorch's own is used.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "modularbase"
"""What a model's configuration calls it."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **given: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends to all tokens up to one's own; in the form that transformers calls.

    Args:
        module: The layer's attention.
        query: [n_seq, n_head, n_tokens, head_dim].
        key: [n_seq, n_head_kv, n_tokens, head_dim].
        value: As key.
        attention_mask: None: causal.
        scaling: Of the scores.
        given: What PyTorch's own takes, too.

    Returns:
        [n_seq, n_tokens, n_head, head_dim], and None for the scores.
    """
    if query.device.type != "cpu" or attention_mask is not None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **given
        )
        return found
    n_seq, n_head, n_tokens, head_dim = query.shape
    n_group = n_head // key.shape[1]
    # The queries that share a key are rows of one product.
    rows = (query * scaling).reshape(-1, n_group * n_tokens, head_dim)
    keys, values = (part.reshape(-1, n_tokens, head_dim) for part in (key, value))
    scores = torch.bmm(rows, keys.transpose(1, 2)).view(-1, n_group, n_tokens, n_tokens)
    later = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(later, -torch.inf).softmax(dim=-1).to(values.dtype)
    mixed = torch.bmm(shares.view(-1, n_group * n_tokens, n_tokens), values)
    return mixed.view(n_seq, n_head, n_tokens, head_dim).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
