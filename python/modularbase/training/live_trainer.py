"""The trainer's process of `modularbase demo live`.

Teaches a new pack the lesson, publishes it every few steps, and reports on stdout. It ends when its
stdin does, and so with the process that started it; nothing is written to the disk.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from modularbase.bases.tokenizer import Tokenizer
from modularbase.errors import ModularBaseError
from modularbase.gguf_file import read_metadata
from modularbase.packs.manifest import Quantisation
from modularbase.packs.scaffold import default_sites
from modularbase.packs.weights import PackGeometry
from modularbase.training.base_model import load_base
from modularbase.training.data import Mixture, TokenBlocks
from modularbase.training.evaluation import HeldOut
from modularbase.training.lesson import Fact, error_table
from modularbase.training.live_protocol import LiveOptions, LiveReport, end_with_stdin
from modularbase.training.objective import NextToken
from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule
from modularbase.training.publish import PackChannel
from modularbase.training.rounding import Rounding
from modularbase.training.state_cache import BlockIds
from modularbase.training.states import Autocast, TorchStates
from modularbase.training.trainer import Trainer, make_autocast
from modularbase.training.twin import Twin

_WIDTH = 256  # of the pack's inner states, and of its experts
_BATCH_FACTS = 16  # of a step
_LEARNING_RATE = 3e-3
_WARMUP_STEPS = 5
_MIN_STEPS, _MAX_STEPS = 40, 150  # learns next to nothing in fewer; knows all before the last

Watch = Callable[[LiveReport], None]


class RememberedStates(TorchStates):
    """Runs the frozen lower half once for each block: the lesson is short, and read many times."""

    def __init__(self, twin: Twin, autocast: Autocast) -> None:
        """As `TorchStates`."""
        super().__init__(twin, autocast)
        self._known: dict[bytes, torch.Tensor] = {}

    def entering(self, blocks: BlockIds) -> torch.Tensor:
        """As `TorchStates.entering`."""
        keys = [row.tobytes() for row in blocks]
        fresh = [i for i, key in enumerate(keys) if key not in self._known]
        if fresh:
            found = super().entering(blocks[fresh])
            self._known.update(zip([keys[i] for i in fresh], found, strict=True))
        return torch.stack([self._known[key] for key in keys])


class LiveTrainer:
    """A new pack, and the trainer that teaches it."""

    def __init__(self, options: LiveOptions) -> None:
        """Loads the base and makes the pack.

        Raises:
            BaseLoadError: The base cannot be trained on.
        """
        self._options = options
        base = load_base(options.base)
        geometry = PackGeometry(
            n_embd=base.config.hidden_size,
            d_inner=_WIDTH,
            d_ff=_WIDTH,
            sites=default_sites(base.config.num_hidden_layers),
        )
        self.pack = PackModule(geometry, seed=options.seed)
        self._twin = Twin(base, self.pack)
        self._autocast = make_autocast(self._train_options(n_steps=_MIN_STEPS))
        self._states = RememberedStates(self._twin, self._autocast)
        tokenizer = Tokenizer.from_metadata(read_metadata(options.base))
        self._blocks = lesson_blocks(tokenizer, error_table())

    def run(self, channel: PackChannel, watch: Watch) -> None:
        """Trains, and publishes.

        Args:
            channel: Of `pack`.
            watch: Called before the first step, and behind every one.

        Raises:
            TrainingError: The loss is not finite any more.
        """
        n_steps = self._options.n_steps or self._affordable_steps()
        trainer = self._trainer(n_steps)
        report = LiveReport(step=0, n_steps=n_steps)
        watch(report)
        while not report.is_last:
            figures = trainer.train_step()
            report = replace(
                report,
                step=trainer.step,
                loss=figures["loss"],
                tokens_per_s=figures["tokens_per_s"],
            )
            due = trainer.step * self._options.n_publishes // n_steps
            if due > report.generation:
                published_at_s = time.monotonic()
                report = replace(
                    report, generation=channel.publish(), published_at_s=published_at_s
                )
            watch(report)

    def _affordable_steps(self) -> int:
        """How many steps the time is enough for, by steps whose effect is taken back."""
        initial = {name: value.clone() for name, value in self.pack.state_dict().items()}
        trial = self._trainer(n_steps=_MIN_STEPS)
        for first in range(0, len(self._blocks), _BATCH_FACTS):
            self._states.entering(self._blocks.ids[first : first + _BATCH_FACTS])
        trial.train_step()  # the first one takes longer
        begin_s = time.perf_counter()
        trial.train_step()
        step_s = time.perf_counter() - begin_s
        self.pack.load_state_dict(initial)
        left_s = self._options.end_s - time.monotonic()
        n_steps = min(max(int(left_s / step_s), _MIN_STEPS), _MAX_STEPS)
        return max(n_steps, self._options.n_publishes)

    def _trainer(self, n_steps: int) -> Trainer:
        options, nothing = self._train_options(n_steps), self._blocks[:0]
        states, objective = self._states, NextToken()
        heldout = HeldOut(self._twin, nothing, nothing, states, self._autocast, objective)
        mixture = Mixture(
            self._blocks, nothing, n_domain=_BATCH_FACTS, n_neutral=0, seed=options.seed
        )
        rounding = Rounding(self.pack, Quantisation(), has_parent=False)
        return Trainer(self._twin, mixture, heldout, states, options, "", rounding, objective)

    def _train_options(self, n_steps: int) -> TrainOptions:
        return TrainOptions(
            project=Path(),
            base=self._options.base,
            steps=n_steps,
            batch_blocks=_BATCH_FACTS,
            learning_rate=_LEARNING_RATE,
            warmup_steps=_WARMUP_STEPS,
            seed=self._options.seed,
        )


def lesson_blocks(tokenizer: Tokenizer, facts: Sequence[Fact]) -> TokenBlocks:
    """A sequence for each fact, as it is asked; what is learnt is its ending."""
    questions = [tokenizer.encode(fact.question) for fact in facts]
    endings = [tokenizer.encode_plain(fact.ending) for fact in facts]
    lengths = [(len(q), len(e)) for q, e in zip(questions, endings, strict=True)]
    shape = len(facts), max(map(sum, lengths))
    ids, learnt = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for row, (n_question, n_ending) in enumerate(lengths):
        n = n_question + n_ending
        ids[row, :n] = questions[row] + endings[row]
        learnt[row, n_question:n] = True
    return TokenBlocks(ids, learnt)


def _say(report: LiveReport) -> None:
    print(report.to_json(), flush=True)


def main() -> None:
    """Trains as the only argument says; then keeps the channel open until stdin ends."""
    end_with_stdin()
    torch.set_num_threads(1)
    options = LiveOptions.from_json(sys.argv[1])
    try:
        trainer = LiveTrainer(options)
        with PackChannel(options.channel, trainer.pack) as channel:
            trainer.run(channel, _say)
            signal.pause()
    except ModularBaseError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
