"""The engine's twin in PyTorch: a frozen base with one pack that learns.

Nothing below the first site depends on the pack, so that half runs without gradients and keeps no
activations; `enter` and `forward_from` cut there, so that its results can be kept or come from
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from modularbase.training.pack_module import PackModule, SiteOutput


@dataclass(frozen=True, slots=True)
class TwinOutput:
    """A forward through the upper half.

    Attributes:
        final: States behind the output norm [n_seq, n_tokens, n_embd].
        balance: Mean load-balance loss over the sites; 0 without the pack.
        z_loss: Mean router z-loss over the sites; 0 without the pack.
    """

    final: torch.Tensor
    balance: torch.Tensor
    z_loss: torch.Tensor


class Twin:
    """A base and a pack on it; not for several threads."""

    def __init__(self, base: PreTrainedModel, pack: PackModule) -> None:
        """Attaches the pack, which is then part of every forward that asks for it.

        Args:
            base: Frozen, as `load_base` gives it.
            pack: Its geometry must fit the base.
        """
        self.base, self.pack = base, pack
        self.first_site = pack.geometry.sites[0]
        self._outputs: list[SiteOutput] | None = None  # None: the pack is off
        for i, layer in enumerate(pack.geometry.sites):
            base.model.layers[layer].mlp.register_forward_hook(self._site_hook(i))

    @property
    def head(self) -> torch.Tensor:
        """The output matrix [n_vocab, n_embd]."""
        return self.base.lm_head.weight

    def enter(self, ids: torch.Tensor) -> torch.Tensor:
        """The residual stream entering the first site's layer, [n_seq, n_tokens, n_embd].

        Args:
            ids: Token ids [n_seq, n_tokens].
        """
        with torch.no_grad():
            hidden = self.base.model.embed_tokens(ids)
            return run_layers(self.base, hidden, 0, self.first_site)

    def forward_from(self, hidden: torch.Tensor, *, with_pack: bool = True) -> TwinOutput:
        """The upper half, from what `enter` gives.

        Args:
            hidden: Residual stream entering the first site's layer [n_seq, n_tokens, n_embd], of
                sequences from their first token on.
            with_pack: False gives the plain base, without gradients.
        """
        zero = torch.zeros((), device=hidden.device)
        if not with_pack:
            with torch.no_grad():
                return TwinOutput(self._upper(hidden), zero, zero)
        with self._acting() as outputs:
            final = self._upper(hidden)
        balance = sum((output.balance for output in outputs), zero) / len(outputs)
        z_loss = sum((output.z_loss for output in outputs), zero) / len(outputs)
        return TwinOutput(final, balance, z_loss)

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """Logits of final states [..., n_embd]: [..., n_vocab]; for evaluation of short texts."""
        return final @ self.head.T

    def _upper(self, hidden: torch.Tensor) -> torch.Tensor:
        n_layer = len(self.base.model.layers)
        return self.base.model.norm(run_layers(self.base, hidden, self.first_site, n_layer))

    @contextmanager
    def _acting(self) -> Iterator[list[SiteOutput]]:
        outputs: list[SiteOutput] = []
        self._outputs = outputs
        try:
            yield outputs
        finally:
            self._outputs = None

    def _site_hook(self, index: int) -> Callable[..., torch.Tensor | None]:
        def hook(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
            if self._outputs is None:
                return None
            found = self.pack.sites[index](inputs[0])
            self._outputs.append(found)
            return output + found.delta

        return hook


def run_layers(base: PreTrainedModel, hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """The residual stream behind layers first .. last - 1 of a base.

    Args:
        base: As `load_base` gives it.
        hidden: What enters layer `first`, of sequences from their start on
            [n_seq, n_tokens, n_embd].
        first: A layer.
        last: The layer that is not run any more.
    """
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rope = base.model.rotary_emb(hidden, position_ids=positions)
    for layer in base.model.layers[first:last]:
        # Without a mask the attention is causal.
        hidden = layer(hidden, position_ids=positions, position_embeddings=rope)
    return hidden
