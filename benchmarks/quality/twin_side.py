"""Perplexities in PyTorch: of LoRA adapters, and of packs to compare with the engine's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.ours import installed_base
from benchmarks.quality.corpora import measured_blocks
from modularbase.gguf_file import read_metadata
from modularbase.packs.pack_file import read_pack
from modularbase.packs.project import read_config
from modularbase.packs.weights import PackGeometry
from modularbase.training.base_model import load_base
from modularbase.training.data import TokenBlocks
from modularbase.training.losses import cross_entropy
from modularbase.training.objective import before_last
from modularbase.training.pack_module import PackModule
from modularbase.training.twin import Twin

FinalStates = Callable[[torch.Tensor], torch.Tensor]
"""From token ids [n_seq, n_tokens] to states behind the output norm [n_seq, n_tokens, n_embd]."""

_BATCH_BLOCKS = 8


def mean_loss(blocks: TokenBlocks, final_states: FinalStates, head: torch.Tensor) -> float:
    """Cross-entropy in nats a token.

    Args:
        blocks: Text that is learnt from its second token on.
        final_states: The model up to its output norm.
        head: Its output matrix [n_vocab, n_embd].
    """
    total, n_targets = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(blocks), _BATCH_BLOCKS):
            ids = torch.from_numpy(blocks.ids[first : first + _BATCH_BLOCKS]).to(head.device)
            targets = ids[:, 1:].flatten()
            total += float(cross_entropy(before_last(final_states(ids)), head, targets))
            n_targets += len(targets)
    return total / n_targets


def perplexities(
    final_states: FinalStates, head: torch.Tensor, texts: Mapping[str, TokenBlocks] | None = None
) -> Mapping[str, float]:
    """Perplexity of texts in F32; None: of all that are measured."""
    texts = measured_blocks() if texts is None else texts
    return {name: math.exp(mean_loss(found, final_states, head)) for name, found in texts.items()}


def new_pack(project: Path) -> PackModule:
    """A pack of a project's geometry, before training."""
    said = read_config(project).geometry
    n_embd = int(str(read_metadata(installed_base())["llama.embedding_length"]))
    geometry = PackGeometry(
        n_embd=n_embd,
        d_inner=said.d_inner,
        d_ff=said.d_ff,
        n_expert=said.n_expert,
        n_expert_used=said.n_expert_used,
        sites=said.sites,
        norm_eps=said.norm_eps,
    )
    return PackModule(geometry, scale=said.scale, token_gates=said.token_gates)


def twin_perplexities(
    packs: Mapping[str, Path], device: str, texts: Mapping[str, TokenBlocks] | None = None
) -> Mapping[str, Mapping[str, float]]:
    """Perplexity of texts under the base and under each pack.

    Args:
        packs: Pack files by name.
        device: Where to compute.
        texts: None: all that are measured.
    """
    found: dict[str, Mapping[str, float]] = {}
    for name, path in packs.items():
        weights = read_pack(path)
        pack = PackModule(
            weights.geometry,
            scale=weights.scale,
            token_gates="site.0.token_gate.weight" in weights.tensors,
        )
        pack.load_arrays(weights.tensors)
        twin = Twin(load_base(installed_base()).to(device), pack.to(device))

        def final(ids: torch.Tensor, twin: Twin = twin, *, with_pack: bool = True) -> torch.Tensor:
            return twin.forward_from(twin.enter(ids), with_pack=with_pack).final

        if not found:
            found["base"] = perplexities(partial(final, with_pack=False), twin.head, texts)
        found[name] = perplexities(final, twin.head, texts)
    return found
