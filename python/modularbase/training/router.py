"""Trains a router: which packs a text is for, told from the resident base's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from modularbase.engine import Engine
from modularbase.errors import InvalidRequestError
from modularbase.gguf_file import read_metadata
from modularbase.packs.router_file import LinearHead, Pooling
from modularbase.routing.router import normalised
from modularbase.training.calibration import calibration_error, fit_temperature
from modularbase.training.encoding import Encoder
from modularbase.training.labelled_text import (
    LabelledPack,
    Snippet,
    check_labelled,
    draw_snippets,
)
from modularbase.types import FloatArray

NONE = "none"
"""What the label of text for no pack is called in figures."""

OnStates = Callable[[int, int], None]
"""Called with the number of texts that the base has read, and of all."""

# Shares of the pieces of a label that are learned from, and that the temperature is fitted on;
# the rest is measured on.
_TRAIN, _CALIBRATE = 0.7, 0.15
_MAX_ITERATIONS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """What training a router is told.

    Attributes:
        base: GGUF file of the base.
        packs: The packs it is to know, with text for each.
        neutral: Files or folders of text that is for none of them.
        layer: The states are those entering it; None: the middle layer.
        pooling: How a text's states become one.
        n_snippets: Pieces of text of each label, at most.
        snippet_tokens: Shortest and longest piece.
        weight_decay: Weight of the squared weights in the loss.
        seed: Of the pieces and their split.
        n_threads: Threads; 0: one per core.
    """

    base: Path
    packs: tuple[LabelledPack, ...]
    neutral: tuple[Path, ...]
    layer: int | None = None
    pooling: Pooling = "mean"
    n_snippets: int = 400
    snippet_tokens: tuple[int, int] = (8, 64)
    weight_decay: float = 1e-3
    seed: int = 0
    n_threads: int = 0

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        check_labelled(self.packs)
        least, most = self.snippet_tokens
        for name, value, low in (
            ("n_snippets", self.n_snippets, 20),
            ("snippet_tokens", least, 1),
            ("snippet_tokens", most, least),
            ("seed", self.seed, 0),
            ("n_threads", self.n_threads, 0),
        ):
            if value < low:
                raise InvalidRequestError(name, f"{low} or more", str(value))
        if not 0 <= self.weight_decay < float("inf"):
            raise InvalidRequestError("weight_decay", "0 or more", str(self.weight_decay))


@dataclass(frozen=True, slots=True)
class RouterReport:
    """A trained router, and how well it does on text it has not seen.

    Attributes:
        head: The router.
        layer: Where its states come from.
        labels: Ids of the packs, and "none".
        confusion: Texts by label (rows) and by what the router found likeliest (columns).
        accuracy: Share of the texts it finds the label of.
        calibration_error: Expected calibration error with the temperature.
        uncalibrated_error: The same without.
        n_train: Texts it was trained on.
    """

    head: LinearHead
    layer: int
    labels: tuple[str, ...]
    confusion: NDArray[np.int64]
    accuracy: float
    calibration_error: float
    uncalibrated_error: float
    n_train: int


def no_states(n_done: int, n_all: int) -> None:
    """Takes progress and says nothing."""


def train_router(options: RouterOptions, on_states: OnStates = no_states) -> RouterReport:
    """Trains the router alone; base and packs stay as they are, the packs are not even read.

    Args:
        options: What to do.
        on_states: Told how far the base is with reading, which takes most of the time.

    Raises:
        InvalidRequestError: Options or text make no sense.
        BaseLoadError: The base cannot be loaded.
    """
    with Engine.load(options.base, pack_budget=0, n_threads=options.n_threads or None) as engine:
        snippets = draw_snippets(
            options.packs,
            options.neutral,
            Encoder(read_metadata(options.base)),
            most=options.n_snippets,
            n_tokens=options.snippet_tokens,
            seed=options.seed,
        )
        layer = engine.info["n_layer"] // 2 if options.layer is None else options.layer
        texts = [snippet.ids for snippet in snippets]
        states = pooled_states(engine, texts, layer, options.pooling, on_states)
    names = (*(labelled.pack.id for labelled in options.packs), NONE)
    return _report(options, names, layer, normalised(states), snippets)


def pooled_states(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    layer: int,
    pooling: Pooling,
    on_states: OnStates = no_states,
) -> FloatArray:
    """One state for each text (token ids), as the engine has them: [n_texts, n_embd]."""
    found = []
    for i, ids in enumerate(texts):
        found.append(engine.hidden(list(ids), layer, pooling=pooling)[0])
        on_states(i + 1, len(texts))
    return np.stack(found)


def fit_head(x: torch.Tensor, labels: torch.Tensor, n_labels: int, decay: float) -> LinearHead:
    """Multinomial logistic regression in which every label counts alike.

    Args:
        x: States [n, n_embd].
        labels: Of each [n]; every label is there.
        n_labels: How many there are.
        decay: Weight of the squared weights, of inputs scaled to a spread of 1.

    Returns:
        A head for states as they are, of temperature 1.
    """
    mean, spread = x.mean(dim=0), x.std(dim=0).clamp_min(1e-4)
    scaled = (x - mean) / spread
    weight = torch.zeros(n_labels, x.shape[1], requires_grad=True)
    bias = torch.zeros(n_labels, requires_grad=True)
    shares = len(labels) / (n_labels * labels.bincount(minlength=n_labels))
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        found = functional.cross_entropy(scaled @ weight.T + bias, labels, weight=shares)
        found = found + decay * weight.square().sum()
        found.backward()
        return found

    optimiser.step(loss)
    with torch.no_grad():
        plain = weight / spread
        return LinearHead(plain.numpy(), (bias - plain @ mean).numpy())


def _report(
    options: RouterOptions,
    names: tuple[str, ...],
    layer: int,
    states: FloatArray,
    snippets: Sequence[Snippet],
) -> RouterReport:
    labels = torch.tensor([snippet.label for snippet in snippets])
    x = torch.from_numpy(states)
    train, held, test = _split(labels, len(names), options.seed)
    head = fit_head(x[train], labels[train], len(names), options.weight_decay)
    logits = x @ torch.from_numpy(head.weight).T + torch.from_numpy(head.bias)
    temperature = fit_temperature(logits[held], labels[held])
    chosen = logits[test].argmax(dim=1)
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    confusion.index_put_((labels[test], chosen), torch.ones_like(chosen), accumulate=True)
    return RouterReport(
        head=LinearHead(head.weight, head.bias, temperature),
        layer=layer,
        labels=names,
        confusion=confusion.numpy(),
        accuracy=float((chosen == labels[test]).float().mean()),
        calibration_error=calibration_error(logits[test] / temperature, labels[test]),
        uncalibrated_error=calibration_error(logits[test], labels[test]),
        n_train=len(train),
    )


def _split(
    labels: torch.Tensor, n_labels: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows to learn from, to calibrate with and to measure on, each label in the same shares."""
    draw = torch.Generator().manual_seed(seed)
    parts: tuple[list[torch.Tensor], ...] = ([], [], [])
    for label in range(n_labels):
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=draw)]
        n_train, n_calibrate = round(_TRAIN * len(rows)), max(1, round(_CALIBRATE * len(rows)))
        sizes = [n_train, n_calibrate, len(rows) - n_train - n_calibrate]
        for part, chosen in zip(parts, rows.split(sizes), strict=True):
            part.append(chosen)
    train, calibrate, test = (torch.cat(part) for part in parts)
    return train, calibrate, test
