"""Trains fusion weights: in which shares packs are blended, told from the base's hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from modularbase.engine import Engine
from modularbase.errors import InvalidRequestError
from modularbase.gguf_file import read_metadata
from modularbase.packs.router_file import LinearHead, Pooling
from modularbase.routing.router import normalised, softmax
from modularbase.training.base_model import load_base
from modularbase.training.data import TokenBlocks, pack_blocks, split_blocks
from modularbase.training.encoding import Encoder
from modularbase.training.labelled_text import LabelledPack, check_labelled
from modularbase.training.mixed_twin import MixedTwin, load_pack
from modularbase.training.router import pooled_states
from modularbase.training.texts import read_documents


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionOptions:
    """What training fusion weights is told.

    Attributes:
        base: GGUF file of the base.
        packs: The packs to blend, with their files and text for each.
        layer: The states are those entering it; None: the middle layer.
        pooling: How a prompt's states become one.
        block_tokens: Tokens of a sequence; its first half is the prompt that the weights are told
            from, on its second half the loss is.
        n_blocks: Sequences of each pack's text, at most.
        steps: Steps of the optimiser.
        batch_blocks: Sequences of a step.
        learning_rate: Of AdamW; falls to 0 along a cosine.
        weight_decay: Of the weights.
        heldout_blocks: Sequences of each pack's text that are only measured on.
        seed: Of the order of the sequences.
        n_threads: Threads; 0: one per core in the engine, and as it is set in PyTorch.
    """

    base: Path
    packs: tuple[LabelledPack, ...]
    layer: int | None = None
    pooling: Pooling = "mean"
    block_tokens: int = 128
    n_blocks: int = 96
    steps: int = 60
    batch_blocks: int = 8
    learning_rate: float = 0.05
    weight_decay: float = 0.01
    heldout_blocks: int = 16
    seed: int = 0
    n_threads: int = 0

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        check_labelled(self.packs)
        if len(self.packs) < 2:
            raise InvalidRequestError("pack", "two or more, to blend", self.packs[0].pack.id)
        for labelled in self.packs:
            if labelled.file is None:
                expected = "an installed pack or a pack file"
                raise InvalidRequestError("pack", expected, labelled.pack.id)
        least = {"block_tokens": 4, "n_blocks": 2, "seed": 0, "n_threads": 0}
        least |= dict.fromkeys(("steps", "batch_blocks", "heldout_blocks"), 1)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidRequestError(name, f"{low} or more", str(getattr(self, name)))
        if not 0 < self.learning_rate < float("inf"):
            raise InvalidRequestError("learning_rate", "more than 0", str(self.learning_rate))
        if not 0 <= self.weight_decay < float("inf"):
            raise InvalidRequestError("weight_decay", "0 or more", str(self.weight_decay))

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return self.block_tokens // 2


@dataclass(frozen=True, slots=True)
class FusionReport:
    """Trained fusion weights, and what they are worth on text they have not seen.

    Attributes:
        head: The weights.
        layer: Where its states come from.
        perplexity: By the pack that the text is for: of the plain base ("base"), of all packs in
            equal shares ("equal"), of that pack alone ("own"), and in the shares of the head
            ("fused").
        shares: Mean shares of the packs (columns) for the text of each pack (rows).
        n_tokens: Tokens trained on, prompts included.
    """

    head: LinearHead
    layer: int
    perplexity: dict[str, dict[str, float]]
    shares: NDArray[np.float32]
    n_tokens: int


@dataclass(frozen=True, slots=True)
class FusionStep:
    """Where a run is: steps done, all of them, and the last one's loss in nats a token."""

    step: int
    n_steps: int
    loss: float


Watch = Callable[[FusionStep], None]


@dataclass(frozen=True, slots=True)
class _Texts:
    """Sequences, what they are for, and the normalised states of their prompts."""

    ids: torch.Tensor  # [n, block_tokens]
    labels: torch.Tensor  # [n]
    x: torch.Tensor  # [n, n_embd]


def no_watch(step: FusionStep) -> None:
    """Takes reports and says nothing."""


def train_fusion(options: FusionOptions, watch: Watch = no_watch) -> FusionReport:
    """Trains the fusion weights alone, to the lowest loss of the next token; all else is frozen.

    Args:
        options: What to do.
        watch: Called behind every step.

    Raises:
        InvalidRequestError: Options or text make no sense.
        PackFormatError: A pack is not sound.
        BaseLoadError: The base cannot be loaded.
    """
    if options.n_threads:
        torch.set_num_threads(options.n_threads)
    packs = [load_pack(labelled.file) for labelled in options.packs if labelled.file]
    train, held = _blocks(options)
    layer, (train_x, held_x) = _states(options, [train, held])
    twin = MixedTwin(load_base(options.base), packs)
    head = _fit(twin, _texts(train, train_x), options, watch)
    perplexity, shares = _measure(twin, head, _texts(held, held_x), options)
    n_tokens = options.steps * options.batch_blocks * options.block_tokens
    return FusionReport(head, layer, perplexity, shares, n_tokens)


def _blocks(options: FusionOptions) -> tuple[list[TokenBlocks], list[TokenBlocks]]:
    """Sequences of each pack's text: to train on, and to measure on."""
    encoder = Encoder(read_metadata(options.base))
    train, held = [], []
    for labelled in options.packs:
        documents = read_documents(labelled.paths)
        blocks = pack_blocks(documents, encoder, options.block_tokens)
        name, most = f"text for {labelled.pack.id}", options.heldout_blocks
        corpus = split_blocks(blocks, share=0.5, most=most, seed=options.seed, kind=name)
        train.append(corpus.train[: options.n_blocks])
        held.append(corpus.heldout)
    return train, held


def _states(
    options: FusionOptions, groups: Sequence[Sequence[TokenBlocks]]
) -> tuple[int, list[torch.Tensor]]:
    """The layer, and for each group the normalised states of all prompts [n, n_embd]."""
    threads = options.n_threads or None
    with Engine.load(options.base, pack_budget=0, n_threads=threads) as engine:
        layer = engine.info["n_layer"] // 2 if options.layer is None else options.layer
        found = []
        for blocks in groups:
            prompts = _ids(blocks)[:, : options.n_prompt].tolist()
            states = pooled_states(engine, prompts, layer, options.pooling)
            found.append(torch.from_numpy(normalised(states)))
        return layer, found


def _texts(blocks: Sequence[TokenBlocks], x: torch.Tensor) -> _Texts:
    labels = [label for label, part in enumerate(blocks) for _ in range(len(part))]
    return _Texts(torch.from_numpy(_ids(blocks)), torch.tensor(labels), x)


def _ids(blocks: Sequence[TokenBlocks]) -> NDArray[np.int64]:
    return np.concatenate([part.ids for part in blocks])


def _fit(twin: MixedTwin, texts: _Texts, options: FusionOptions, watch: Watch) -> LinearHead:
    mean, spread = texts.x.mean(dim=0), texts.x.std(dim=0).clamp_min(1e-4)
    scaled = (texts.x - mean) / spread
    weight = torch.zeros(twin.n_packs, texts.x.shape[1], requires_grad=True)  # equal shares
    bias = torch.zeros(twin.n_packs, requires_grad=True)
    rate = options.learning_rate / math.sqrt(len(mean))  # a step moves all of a state's inputs
    groups = [{"params": [weight], "lr": rate}, {"params": [bias], "lr": options.learning_rate}]
    optimiser = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    draw = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        rows = torch.randperm(len(scaled), generator=draw)[: options.batch_blocks]
        shares = (scaled[rows] @ weight.T + bias).softmax(dim=1)
        loss = twin.losses(texts.ids[rows], shares, options.n_prompt).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        watch(FusionStep(step + 1, options.steps, loss.item()))
    with torch.no_grad():
        plain = weight / spread
        return LinearHead(plain.numpy(), (bias - plain @ mean).numpy())


def _measure(
    twin: MixedTwin, head: LinearHead, texts: _Texts, options: FusionOptions
) -> tuple[dict[str, dict[str, float]], NDArray[np.float32]]:
    fused = torch.from_numpy(softmax(head, texts.x.numpy()))
    own = torch.eye(twin.n_packs)[texts.labels]
    equal = torch.full_like(own, 1 / twin.n_packs)
    ways = {"base": None, "equal": equal, "own": own, "fused": fused}
    losses = {way: _losses(twin, texts.ids, weights, options) for way, weights in ways.items()}
    perplexity, shares = {}, []
    for label, labelled in enumerate(options.packs):
        rows = texts.labels == label
        perplexity[labelled.pack.id] = {
            way: float(loss[rows].mean().exp()) for way, loss in losses.items()
        }
        shares.append(fused[rows].mean(dim=0))
    return perplexity, torch.stack(shares).numpy()


def _losses(
    twin: MixedTwin, ids: torch.Tensor, weights: torch.Tensor | None, options: FusionOptions
) -> torch.Tensor:
    found = []
    with torch.no_grad():
        for i in range(0, len(ids), options.batch_blocks):
            rows = slice(i, i + options.batch_blocks)
            part = None if weights is None else weights[rows]
            found.append(twin.losses(ids[rows], part, options.n_prompt))
    return torch.cat(found)
