"""Stage 1: a pack learns a domain against the frozen base, and leaves other text alone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from modularbase.bases.tokenizer import Tokenizer
from modularbase.engine import read_metadata
from modularbase.errors import InvalidRequestError
from modularbase.packs.project import DATA_FOLDER, GeometryConfig, read_config
from modularbase.packs.weights import PackGeometry
from modularbase.training.base_model import load_base
from modularbase.training.curves import draw_curves
from modularbase.training.data import (
    Corpus,
    Mixture,
    TokenBlocks,
    check_blocks,
    pack_blocks,
    split_blocks,
)
from modularbase.training.evaluation import HeldOut
from modularbase.training.objective import Objective
from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule
from modularbase.training.run_folder import RunFolder, RunLog
from modularbase.training.texts import read_documents
from modularbase.training.trainer import Trainer, make_autocast
from modularbase.training.twin import Twin


@dataclass(frozen=True, slots=True)
class StepReport:
    """Where a run is.

    Attributes:
        step: Steps done.
        n_steps: Steps to do.
        loss: Of the last step, in nats a token; None before the first.
        heldout_loss: Of the last measurement.
        tokens_per_s: Of the last step.
    """

    step: int
    n_steps: int
    loss: float | None
    heldout_loss: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class FitReport:
    """How a run ended.

    Attributes:
        run: Its folder.
        pack: The pack with its best weights.
        n_steps: Steps done.
        best_step: The step with the lowest held-out loss, whose weights the pack has.
        n_tokens: Tokens trained on.
        stopped_early: Whether it ended because nothing got better.
        base: Held-out figures of the plain base: perplexity, and neutral_perplexity.
        figures: The pack's, with neutral_kl.
    """

    run: Path
    pack: PackModule
    n_steps: int
    best_step: int
    n_tokens: int
    stopped_early: bool
    base: dict[str, float]
    figures: dict[str, float]


Watch = Callable[[StepReport], None]


def no_watch(report: StepReport) -> None:
    """Takes reports and says nothing."""


def fit(
    options: TrainOptions, watch: Watch = no_watch, objective: Objective | None = None
) -> FitReport:
    """Trains a project's pack from the start.

    Ctrl-C ends the run behind its current step, with a checkpoint from which `resume` goes on.

    Args:
        options: What to do.
        watch: Called behind every step.
        objective: What the domain's text teaches; None: the next token.

    Raises:
        InvalidRequestError: Options or text make no sense.
        PackFormatError: The project is not sound.
        BaseLoadError: The base cannot be trained on.
        TrainingError: The loss is not finite any more.
        KeyboardInterrupt: Somebody pressed Ctrl-C.
    """
    trainer, pack = _prepare(options, objective)
    return _run(RunFolder.create(options), options, trainer, pack, watch)


def resume(project: Path, watch: Watch = no_watch, objective: Objective | None = None) -> FitReport:
    """Goes on with a project's newest run, exactly as if it had not stopped.

    Args:
        project: Its folder.
        watch: Called behind every step.
        objective: That of the run.

    Raises:
        InvalidRequestError: There is no run, or its text has changed.
        ModularBaseError: As in `fit`.
    """
    folder = RunFolder.latest(project)
    options = replace(folder.options(), project=project)
    trainer, pack = _prepare(options, objective)
    state = folder.load()
    if state is not None:
        trainer.restore(state)
    folder.forget_after(trainer.step if state is not None else -1)
    return _run(folder, options, trainer, pack, watch)


def _prepare(options: TrainOptions, objective: Objective | None) -> tuple[Trainer, PackModule]:
    if options.n_threads:
        torch.set_num_threads(options.n_threads)
    config = read_config(options.project)
    tokenizer = Tokenizer.from_metadata(read_metadata(options.base))
    domain, neutral = _domain(options, tokenizer), _neutral(options, tokenizer)
    base = load_base(options.base)
    geometry = _geometry(config.geometry, base.config.hidden_size, base.config.num_hidden_layers)
    pack = PackModule(
        geometry,
        seed=options.seed,
        scale=config.geometry.scale,
        token_gates=config.geometry.token_gates,
    )
    twin = Twin(base.to(options.device), pack.to(options.device))
    heldout = HeldOut(twin, domain.heldout, neutral.heldout, make_autocast(options))
    mixture = Mixture(
        domain.train,
        neutral.train,
        n_domain=options.n_domain,
        n_neutral=options.n_neutral,
        seed=options.seed,
    )
    digest = f"{domain.digest()} {neutral.digest()}"
    return Trainer(twin, mixture, heldout, options, digest, objective), pack


def _domain(options: TrainOptions, tokenizer: Tokenizer) -> Corpus:
    folder = options.project / DATA_FOLDER
    data = options.data or (folder / "train.jsonl",)
    held = options.heldout or (() if options.data else (folder / "heldout.jsonl",))
    blocks = pack_blocks(read_documents(data), tokenizer, options.block_tokens)
    if not held:
        share, most = options.heldout_share, options.heldout_blocks
        return split_blocks(blocks, share=share, most=most, seed=options.seed, kind="data")
    measured = pack_blocks(read_documents(held), tokenizer, options.block_tokens)
    check_blocks(blocks, 1, "data")
    check_blocks(measured, 1, "heldout")
    return Corpus(blocks, measured[: options.heldout_blocks])


def _neutral(options: TrainOptions, tokenizer: Tokenizer) -> Corpus:
    if not options.neutral:
        nothing = TokenBlocks.of(np.zeros((0, options.block_tokens), np.int64))
        return Corpus(nothing, nothing)
    blocks = pack_blocks(read_documents(options.neutral), tokenizer, options.block_tokens)
    share, most = options.heldout_share, options.heldout_blocks
    return split_blocks(blocks, share=share, most=most, seed=options.seed, kind="neutral")


def _geometry(said: GeometryConfig, n_embd: int, n_layer: int) -> PackGeometry:
    if said.sites[-1] >= n_layer:
        expected = f"layers of the base, below {n_layer}"
        raise InvalidRequestError("geometry.sites", expected, str(said.sites[-1]))
    return PackGeometry(
        n_embd=n_embd,
        d_inner=said.d_inner,
        d_ff=said.d_ff,
        n_expert=said.n_expert,
        n_expert_used=said.n_expert_used,
        sites=said.sites,
        norm_eps=said.norm_eps,
    )


def _run(
    folder: RunFolder, options: TrainOptions, trainer: Trainer, pack: PackModule, watch: Watch
) -> FitReport:
    loss, speed = None, 0.0
    with RunLog(folder, trainer.step + 1) as log, _interrupts() as interrupted:
        if trainer.step == 0:  # a new pack is the identity: these are the base's figures
            log.write("heldout", 0, trainer.measure().figures())
        heldout = trainer.best[0]
        watch(StepReport(trainer.step, options.steps, loss, heldout, speed))
        while trainer.step < options.steps and not _is_done(trainer, options):
            figures = trainer.train_step()
            loss, speed = figures["loss"], figures["tokens_per_s"]
            log.write("train", trainer.step, figures)
            if trainer.step % options.eval_every == 0 or trainer.step == options.steps:
                measured = trainer.measure()
                heldout = measured.loss
                log.write("heldout", trainer.step, measured.figures())
            watch(StepReport(trainer.step, options.steps, loss, heldout, speed))
            if interrupted():
                break
            if trainer.step % options.save_every == 0 and trainer.step < options.steps:
                folder.save(trainer.state())
        folder.save(trainer.state())
    draw_curves(folder.metrics(), folder.curves)
    if interrupted():
        raise KeyboardInterrupt
    pack.load_state_dict(trainer.best_weights)
    return _report(folder, options, trainer, pack)


def _is_done(trainer: Trainer, options: TrainOptions) -> bool:
    return 0 < options.patience <= trainer.n_worse


def _report(
    folder: RunFolder, options: TrainOptions, trainer: Trainer, pack: PackModule
) -> FitReport:
    measured = {row["step"]: row for row in folder.metrics() if row["kind"] == "heldout"}
    names = ("perplexity", "neutral_perplexity", "neutral_kl")
    base, best = measured[0], measured[trainer.best[1]]
    return FitReport(
        run=folder.path,
        pack=pack,
        n_steps=trainer.step,
        best_step=trainer.best[1],
        n_tokens=trainer.n_tokens,
        stopped_early=trainer.step < options.steps,
        base={name: base[name] for name in names if name in base},
        figures={name: best[name] for name in names if name in best},
    )


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed, so that a step is not torn; a second one does not wait."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set  # only the main thread may have handlers; it gets the signal itself
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
