"""The peer: a LoRA adapter (PEFT) of all linear layers, trained as packs are.

It sees the same blocks in the same order, and has the same optimiser, schedule, clipping,
arithmetic and early stopping. Its rank is the one that gives about as many trained parameters.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.ours import installed_base
from benchmarks.quality.corpora import NEUTRAL, blocks
from benchmarks.quality.twin_side import mean_loss, perplexities
from modularbase.training.base_model import load_base
from modularbase.training.data import Batch, Mixture, TokenBlocks, split_blocks
from modularbase.training.losses import cross_entropy, kl_to_base
from modularbase.training.objective import before_last
from modularbase.training.optimiser import rate_factor
from modularbase.training.options import TrainOptions
from modularbase.training.trainer import make_autocast

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """One run.

    Attributes:
        domain: The text it learns.
        with_replay: Whether it is held to the base on neutral text, as packs are.
        learning_rate: Highest rate.
        n_parameters: It should have about as many.
        options: Of the pack's run, which it follows in all else.
    """

    domain: str
    with_replay: bool
    learning_rate: float
    n_parameters: int
    options: TrainOptions


class LoraRun:
    """A base with an adapter that learns."""

    def __init__(self, settings: LoraSettings) -> None:
        """Makes a new adapter, which is the identity."""
        torch.manual_seed(settings.options.seed)
        self._settings = settings
        base = load_base(installed_base()).to(settings.options.device)
        self.rank = _rank(base, settings.n_parameters)
        config = LoraConfig(
            r=self.rank, lora_alpha=2 * self.rank, target_modules=list(_LINEAR), lora_dropout=0.0
        )
        self._model = get_peft_model(base, config)
        self._inner = base.model
        self._head = base.lm_head.weight
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self.n_parameters = sum(p.numel() for p in self._trained)
        self._autocast = make_autocast(settings.options)

    def train(self) -> Mapping[str, Any]:
        """Trains it, goes back to its best weights and measures all texts."""
        options, settings = self._settings.options, self._settings
        optimiser = torch.optim.AdamW(
            self._trained, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
        heldout = blocks(settings.domain, "heldout")[: options.heldout_blocks]
        mixture = Mixture(
            blocks(settings.domain, "train"),
            neutral_blocks(options),
            n_domain=options.n_domain,
            n_neutral=options.n_neutral if settings.with_replay else 0,
            seed=options.seed,
        )
        best, best_step, best_weights = float("inf"), 0, self._weights()
        begin_s = time.perf_counter()
        for step in range(options.steps):
            factor = rate_factor(step, options.steps, options.warmup_steps)
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * factor
            optimiser.zero_grad(set_to_none=True)
            self._backward(mixture.batch(step))
            torch.nn.utils.clip_grad_norm_(self._trained, options.clip_norm)
            optimiser.step()
            if (step + 1) % options.eval_every == 0 or step + 1 == options.steps:
                with self._autocast():
                    loss = mean_loss(heldout, self._final, self._head)
                if loss < best:
                    best, best_step, best_weights = loss, step + 1, self._weights()
        seconds = time.perf_counter() - begin_s
        for parameter, value in zip(self._trained, best_weights, strict=True):
            parameter.data.copy_(value)
        return {
            "domain": settings.domain,
            "with_replay": settings.with_replay,
            "learning_rate": settings.learning_rate,
            "rank": self.rank,
            "n_parameters": self.n_parameters,
            "n_steps": options.steps,
            "best_step": best_step,
            "heldout_loss": best,
            "seconds": seconds,
            "device": options.device,
            "perplexity": dict(perplexities(self._final, self._head)),
        }

    def base_perplexities(self) -> Mapping[str, float]:
        """Of the base alone."""
        with self._base():
            return perplexities(self._final, self._head)

    def _backward(self, batch: Batch) -> None:
        device = self._head.device
        domain = torch.from_numpy(batch.domain.ids).to(device)
        neutral = torch.from_numpy(batch.neutral.ids).to(device)
        with self._autocast():
            final = self._final(torch.cat([domain, neutral]))
            targets = domain[:, 1:].flatten()
            states = before_last(final[: len(domain)])
            loss = cross_entropy(states, self._head, targets) / len(targets)
            if len(neutral):
                with torch.no_grad(), self._base():
                    plain = before_last(self._final(neutral))
                found = kl_to_base(before_last(final[len(domain) :]), self._head, plain)
                loss = loss + self._settings.options.kl_weight * found / len(plain)
        loss.backward()

    def _final(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self._inner(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def _base(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self._model.disable_adapter()
        return context

    def _weights(self) -> list[torch.Tensor]:
        return [copy.deepcopy(parameter.detach()) for parameter in self._trained]


def neutral_blocks(options: TrainOptions) -> TokenBlocks:
    """Those that a pack's run has: it sets some aside."""
    share, most = options.heldout_share, options.heldout_blocks
    whole = blocks(NEUTRAL, "train")
    return split_blocks(whole, share=share, most=most, seed=options.seed, kind=NEUTRAL).train


def _rank(base: Any, n_parameters: int) -> int:
    """The rank whose adapter has about so many parameters."""
    per_rank: int = sum(
        module.in_features + module.out_features
        for name, module in base.named_modules()
        if name.rsplit(".", 1)[-1] in _LINEAR
    )
    return max(1, round(n_parameters / per_rank))
