"""A base in PyTorch whose cache can be taken out, changed, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.context.attention import NAME, Pass
from modularbase.gguf_file import read_metadata
from modularbase.training.base_model import load_base
from modularbase.training.encoding import Encoder


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a layer, keys rotated to their positions.

    Attributes:
        keys: [n_head_kv, n_slots, head_dim].
        values: As keys.
        bias: [n_head_kv, n_slots], added to the scores; None: nothing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Prefilled:
    """A context as the model computed it.

    Attributes:
        ids: Its tokens.
        layers: Its exact keys and values, a slot a token.
        queries: Of each layer [n_head, n_tokens, head_dim], rotated.
    """

    ids: tuple[int, ...]
    layers: tuple[LayerCache, ...]
    queries: tuple[torch.Tensor, ...]

    def first(self, n_tokens: int) -> Prefilled:
        """The same up to a token, which later tokens do not change."""
        layers = tuple(
            LayerCache(layer.keys[:, :n_tokens], layer.values[:, :n_tokens])
            for layer in self.layers
        )
        return Prefilled(self.ids[:n_tokens], layers, tuple(q[:, :n_tokens] for q in self.queries))


class TorchModel:
    """The model in F32, its parameters frozen; what it read last is remembered."""

    def __init__(self, path: Path, *, n_threads: int) -> None:
        """Reads a base."""
        torch.set_num_threads(n_threads)
        metadata = read_metadata(path)
        self.encoder = Encoder(metadata)
        self._model: Any = load_base(path)
        self._model.config._attn_implementation = NAME
        self._head = self._model.lm_head.weight  # [n_vocab, n_embd]
        self._last: Prefilled | None = None

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a turn."""
        tokenizer = self.encoder.tokenizer
        return frozenset(i for i in (tokenizer.eot_id, tokenizer.eos_id) if i is not None)

    def prefill(self, ids: Sequence[int]) -> Prefilled:
        """Reads a context; what it shares with the one read last is not computed again."""
        wanted, known = tuple(ids), self._last
        if known is not None and known.ids[: len(wanted)] == wanted:
            return known.first(len(wanted))
        if known is not None and wanted[: len(known.ids)] != known.ids:
            known = None
        self._last = self.read(wanted, known)
        return self._last

    def read(self, ids: Sequence[int], known: Prefilled | None = None) -> Prefilled:
        """Reads a context, of which the beginning may be known, and remembers nothing."""
        n_known = len(known.ids) if known else 0
        cache, this_pass = _dynamic(known.layers if known else ()), Pass()
        self._states(cache, ids[n_known:], n_known, this_pass)
        layers = tuple(LayerCache(layer.keys[0], layer.values[0]) for layer in cache.layers)
        queries = this_pass.queries
        if known:
            pairs = zip(known.queries, queries, strict=True)
            queries = [torch.cat(pair, dim=1) for pair in pairs]
        return Prefilled(tuple(ids), layers, tuple(queries))

    def logits(self, layers: Sequence[LayerCache], ids: Sequence[int], pos0: int) -> torch.Tensor:
        """Reads tokens from position `pos0` on behind a cache, which stays as it is.

        Returns:
            [n_tokens, n_vocab].
        """
        states = self._states(_dynamic(layers), ids, pos0, _pass(layers))
        found: torch.Tensor = states @ self._head.T
        return found

    def generate(
        self, layers: Sequence[LayerCache], ids: Sequence[int], pos0: int, max_tokens: int
    ) -> list[int]:
        """Continues greedily, up to a token that ends a turn, which is left out."""
        cache, new, found = _dynamic(layers), list(ids), list[int]()
        while True:
            state = self._states(cache, new, pos0, _pass(layers))[-1]
            pos0 += len(new)
            best = int((self._head @ state).argmax())
            if best in self.ends:
                return found
            found.append(best)
            if len(found) == max_tokens:
                return found
            new = [best]

    def _states(self, cache: Any, ids: Sequence[int], pos0: int, this_pass: Pass) -> torch.Tensor:
        states: torch.Tensor = self._model.model(
            input_ids=torch.tensor([list(ids)]),
            position_ids=torch.arange(pos0, pos0 + len(ids))[None],
            past_key_values=cache,
            use_cache=True,
            this_pass=this_pass,
        ).last_hidden_state[0]
        return states


def _pass(layers: Sequence[LayerCache]) -> Pass:
    return Pass([layer.bias for layer in layers])


def _dynamic(layers: Sequence[LayerCache]) -> Any:
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        cache.update(layer.keys[None], layer.values[None], index)
    return cache
