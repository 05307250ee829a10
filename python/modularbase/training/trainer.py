"""Steps of a run, and the state that lets a run go on where it stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from modularbase.engine import build_info
from modularbase.errors import InvalidRequestError, TrainingError
from modularbase.training.data import Batch, Mixture
from modularbase.training.evaluation import HeldOut, Measurement
from modularbase.training.losses import kl_to_base
from modularbase.training.objective import Objective, before_last
from modularbase.training.optimiser import freeze_parts, make_optimiser, rate_factor, set_rates
from modularbase.training.options import TrainOptions
from modularbase.training.rounding import Rounding
from modularbase.training.states import StateSource
from modularbase.training.twin import Twin

Autocast = Callable[[], AbstractContextManager[None]]


def make_autocast(options: TrainOptions) -> Autocast:
    """The arithmetic a run computes in."""
    kind = torch.device(options.device).type
    narrow = options.precision == "bf16" or (options.precision == "auto" and _has_bf16(kind))
    return partial(torch.autocast, kind, dtype=torch.bfloat16, enabled=narrow)


def _has_bf16(kind: str) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = build_info()["cpu_features"]
    assert isinstance(features, list)
    return kind == "cpu" and any("BF16" in name or "AMX" in name for name in features)


class Trainer:
    """A twin that learns.

    Attributes:
        step: Steps done.
        n_tokens: Tokens trained on.
        best: The best measurement's total loss, and the step it was made at.
        n_worse: Measurements since then.
        best_weights: The pack's weights at that step.
    """

    def __init__(
        self,
        twin: Twin,
        mixture: Mixture,
        heldout: HeldOut,
        states: StateSource,
        options: TrainOptions,
        digest: str,
        rounding: Rounding,
        objective: Objective,
    ) -> None:
        """Starts at step 0.

        Args:
            twin: Base and pack, on the options' device.
            mixture: What is trained on.
            heldout: What is measured on.
            states: The base's, of all blocks of the mixture.
            options: The run's.
            digest: Of all text, so that a run does not go on with another.
            rounding: Of the last steps.
            objective: What the domain's text teaches.
        """
        self._twin, self._mixture, self._heldout, self._options = twin, mixture, heldout, options
        self._states, self._digest = states, digest
        self._objective, self._rounding = objective, rounding
        self._autocast = make_autocast(options)
        freeze_parts(twin.pack, options.rates)
        self._optimiser = make_optimiser(twin.pack, options)
        self.step = self.n_tokens = self.n_worse = 0
        self.best = (math.inf, 0)
        self.best_weights = self._weights()

    def train_step(self) -> dict[str, float]:
        """Does one step; returns its losses, in nats a token, and how it went.

        Raises:
            TrainingError: The loss or its gradient is not finite; the pack is as it was before.
        """
        begin_s = time.perf_counter()
        batch = self._mixture.batch(self.step)
        factor = rate_factor(self.step, self._options.steps, self._options.warmup_steps)
        set_rates(self._optimiser, factor)
        self._optimiser.zero_grad(set_to_none=True)
        figures: dict[str, float] = {}
        with self._weights_in_force():
            for piece in batch.pieces(self._options.accumulation):
                for name, value in self._backward(piece, batch).items():
                    figures[name] = figures.get(name, 0.0) + value
        parameters = self._twin.pack.parameters()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._options.clip_norm))
        if not math.isfinite(norm) or not all(map(math.isfinite, figures.values())):
            raise TrainingError(
                f"the loss of step {self.step + 1} is not finite; a lower learning rate may help"
            )
        self._optimiser.step()
        self.step += 1
        self.n_tokens += batch.n_tokens
        rate = self._options.learning_rate * factor
        speed = batch.n_tokens / (time.perf_counter() - begin_s)
        return {**figures, "grad_norm": norm, "learning_rate": rate, "tokens_per_s": speed}

    def measure(self) -> Measurement:
        """Measures the pack and remembers the best; of rounded weights, once they are in force."""
        with self._weights_in_force():
            found = self._heldout.measure()
        if self._options.qat_steps and self.step == self._options.qat_start:
            self.best = (math.inf, 0)
        total = found.total(self._options.kl_weight)
        if total < self.best[0]:
            self.best, self.n_worse = (total, self.step), 0
            self.best_weights = self._weights()
        else:
            self.n_worse += 1
        return found

    def measure_base(self) -> Measurement:
        """Measures the plain base."""
        return self._heldout.measure(with_pack=False)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        return {
            "step": self.step,
            "n_tokens": self.n_tokens,
            "best": self.best,
            "n_worse": self.n_worse,
            "weights": self._twin.pack.state_dict(),
            "best_weights": self.best_weights,
            "optimiser": self._optimiser.state_dict(),
            "data": self._digest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave.

        Raises:
            InvalidRequestError: The text is another than that of the run.
        """
        if state["data"] != self._digest:
            raise InvalidRequestError("data", "the text that the run began with", "another")
        self._twin.pack.load_state_dict(state["weights"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.best_weights, self.best = state["best_weights"], tuple(state["best"])
        self.step, self.n_tokens = state["step"], state["n_tokens"]
        self.n_worse = state["n_worse"]

    def _backward(self, piece: Batch, whole: Batch) -> dict[str, float]:
        """Adds a piece's part of the step's gradient; returns its part of the step's losses."""
        options, twin = self._options, self._twin
        n_domain = len(piece.domain)
        hidden = self._states.entering(np.concatenate([piece.domain.ids, piece.neutral.ids]))
        with self._autocast():
            output = twin.forward_from(hidden)
            final = output.final[:n_domain]
            loss = self._objective.loss(final, twin.head, piece.domain) / whole.domain.n_learnt
            kl = torch.zeros_like(loss)
            if len(piece.neutral):
                plain = self._states.final(piece.neutral.ids, hidden[n_domain:])
                final = before_last(output.final[n_domain:])
                kl = kl_to_base(final, twin.head, before_last(plain))
                kl = kl / (whole.neutral.n_tokens - len(whole.neutral))
        share = piece.n_tokens / whole.n_tokens
        balance, z_loss = output.balance * share, output.z_loss * share
        total = loss + options.kl_weight * kl
        total = total + options.balance_weight * balance + options.z_weight * z_loss
        total.backward()
        return {
            "loss": loss.item(),
            "neutral_kl": kl.item(),
            "balance": balance.item(),
            "z_loss": z_loss.item(),
        }

    def _weights_in_force(self) -> AbstractContextManager[None]:
        is_rounded = self._options.qat_steps and self.step >= self._options.qat_start
        return self._rounding.applied() if is_rounded else nullcontext()

    def _weights(self) -> dict[str, torch.Tensor]:
        state = self._twin.pack.state_dict()
        return {name: value.detach().clone() for name, value in state.items()}
