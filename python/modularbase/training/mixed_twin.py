"""The twin of a base with several packs, blended by weights that may be learned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from modularbase.packs.pack_file import read_pack
from modularbase.training.pack_module import PackModule, PackSite
from modularbase.training.twin import run_layers


def load_pack(path: Path) -> PackModule:
    """A pack file as modules, frozen.

    Raises:
        PackFormatError: It is not a sound pack.
    """
    weights = read_pack(path)
    gates = any("token_gate" in name for name in weights.tensors)
    pack = PackModule(weights.geometry, scale=weights.scale, token_gates=gates)
    pack.load_arrays(weights.tensors)
    pack.requires_grad_(False)
    return pack


class MixedTwin:
    """A base and packs on it, all frozen; not for several threads."""

    def __init__(self, base: PreTrainedModel, packs: Sequence[PackModule]) -> None:
        """Attaches the packs.

        Args:
            base: Frozen, as `load_base` gives it.
            packs: Frozen; their geometries must fit the base.
        """
        self.base = base
        self.n_packs = len(packs)
        self._weights: torch.Tensor | None = None  # [n_seq, n_packs]; None: the packs are off
        sites: defaultdict[int, list[tuple[int, PackSite]]] = defaultdict(list)
        for p, pack in enumerate(packs):
            for layer, site in zip(pack.geometry.sites, pack.sites, strict=True):
                sites[layer].append((p, site))
        self._first_site = min(sites)
        for layer, there in sites.items():
            base.model.layers[layer].mlp.register_forward_hook(self._site_hook(there))

    @property
    def head(self) -> torch.Tensor:
        """The output matrix [n_vocab, n_embd]."""
        return self.base.lm_head.weight

    def forward(self, ids: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """States behind the output norm [n_seq, n_tokens, n_embd].

        Args:
            ids: Token ids [n_seq, n_tokens].
            weights: w of every sequence [n_seq, n_packs], with gradients if they have; None is
                the plain base.
        """
        self._weights = weights
        try:
            with torch.no_grad():  # no pack has acted yet
                hidden = self.base.model.embed_tokens(ids)
                hidden = run_layers(self.base, hidden, 0, self._first_site)
            n_layer = len(self.base.model.layers)
            return self.base.model.norm(run_layers(self.base, hidden, self._first_site, n_layer))
        finally:
            self._weights = None

    def losses(
        self, ids: torch.Tensor, weights: torch.Tensor | None, n_prompt: int
    ) -> torch.Tensor:
        """Mean cross-entropy of each sequence behind its prompt, in nats a token: [n_seq].

        Args:
            ids: Token ids [n_seq, n_tokens].
            weights: As for `forward`.
            n_prompt: Tokens of the prompt.
        """
        final = self.forward(ids, weights)[:, n_prompt - 1 : -1]
        each = [
            functional.cross_entropy(states @ self.head.T, targets)
            for states, targets in zip(final, ids[:, n_prompt:], strict=True)
        ]
        return torch.stack(each)

    def _site_hook(self, there: Sequence[tuple[int, PackSite]]) -> Callable[..., Any]:
        def hook(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            if self._weights is None:
                return output
            for p, site in there:
                output = output + self._weights[:, p, None, None] * site(inputs[0]).delta
            return output

        return hook
