"""Blocks of tokens to train and to measure on, in an order that a seed and a step decide."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from modularbase.errors import InvalidRequestError
from modularbase.training.encoding import Encoder
from modularbase.training.texts import Document

_Item = TypeVar("_Item", bound=np.generic)

# Streams of random numbers that a run draws from, beside its seed.
_HELDOUT, _DOMAIN, _NEUTRAL = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class TokenBlocks:
    """Sequences of one length.

    Attributes:
        ids: Token ids [n_blocks, block_tokens].
        learnt: Whether a token is to be predicted [n_blocks, block_tokens]; those of a prompt are
            not, nor is the first of a block.
    """

    ids: NDArray[np.int64]
    learnt: NDArray[np.bool_]

    @classmethod
    def of(cls, ids: NDArray[np.int64]) -> TokenBlocks:
        """Blocks of text that is learnt from its second token on.

        Args:
            ids: Token ids [n_blocks, block_tokens].
        """
        learnt = np.ones(ids.shape, np.bool_)
        learnt[:, :1] = False
        return cls(ids, learnt)

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.ids)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> TokenBlocks:
        """Some of the blocks."""
        return TokenBlocks(self.ids[rows], self.learnt[rows])

    @property
    def n_tokens(self) -> int:
        """Tokens of all blocks."""
        return self.ids.size

    @property
    def n_learnt(self) -> int:
        """Tokens to be predicted."""
        return int(self.learnt.sum())


@dataclass(frozen=True, slots=True)
class Corpus:
    """The blocks of one kind of text.

    Attributes:
        train: What is trained on.
        heldout: What is only measured on.
    """

    train: TokenBlocks
    heldout: TokenBlocks

    def digest(self) -> str:
        """Tells whether two runs see the same text."""
        content = hashlib.sha256()
        for blocks in (self.train, self.heldout):
            content.update(f"{blocks.ids.shape}".encode() + blocks.ids.tobytes())
            content.update(blocks.learnt.tobytes())
        return content.hexdigest()


def pack_blocks(documents: Sequence[Document], encoder: Encoder, block_tokens: int) -> TokenBlocks:
    """Documents one behind the other, an end token between them, cut into blocks.

    Each block begins as the base expects a sequence to begin. What does not fill the last block is
    left out, and so is a block with nothing to learn.

    Args:
        documents: What to learn from.
        encoder: The base's.
        block_tokens: Tokens of a block.

    Raises:
        ChatTemplateError: There are prompts, and the base has no template for them.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    for document in documents:
        if ids and encoder.end_id is not None and ids[-1] != encoder.end_id:
            ids.append(encoder.end_id)
            learnt.append(True)
        seen, told = encoder.encode(document)
        ids += seen + told
        learnt += [False] * len(seen) + [True] * len(told)
    blocks = TokenBlocks(
        _cut(np.asarray(ids, np.int64), encoder.opening, block_tokens),
        _cut(np.asarray(learnt, np.bool_), [False] * len(encoder.opening), block_tokens),
    )
    blocks.learnt[:, :1] = False
    return blocks[np.flatnonzero(blocks.learnt.any(axis=1))]


def _cut(row: NDArray[_Item], opening: Sequence[int], block_tokens: int) -> NDArray[_Item]:
    """A row in blocks [n_blocks, block_tokens] that begin with the opening."""
    n_fresh = block_tokens - len(opening)
    n_blocks = len(row) // n_fresh
    starts = np.tile(np.asarray(opening, row.dtype), (n_blocks, 1))
    return np.concatenate([starts, row[: n_blocks * n_fresh].reshape(n_blocks, n_fresh)], axis=1)


def split_blocks(blocks: TokenBlocks, *, share: float, most: int, seed: int, kind: str) -> Corpus:
    """Holds out a random share of the blocks, at least one.

    Args:
        blocks: All there are.
        share: Of the blocks to hold out.
        most: Blocks held out at most.
        seed: Equal seeds hold out the same.
        kind: Named in the error.

    Raises:
        InvalidRequestError: Fewer than two blocks.
    """
    check_blocks(blocks, 2, kind)
    n_heldout = min(max(round(share * len(blocks)), 1), most, len(blocks) - 1)
    order = np.random.default_rng([seed, _HELDOUT]).permutation(len(blocks))
    held = np.sort(order[:n_heldout])
    return Corpus(blocks[np.sort(order[n_heldout:])], blocks[held])


def check_blocks(blocks: TokenBlocks, least: int, kind: str) -> None:
    """Refuses text that is too short.

    Raises:
        InvalidRequestError: Naming the kind of text.
    """
    if len(blocks) < least:
        found = f"text for {len(blocks)}"
        raise InvalidRequestError(kind, f"at least {least} blocks of tokens", found)


@dataclass(frozen=True, slots=True)
class Batch:
    """The blocks of one step; either may be empty."""

    domain: TokenBlocks
    neutral: TokenBlocks

    @property
    def n_tokens(self) -> int:
        """Tokens of both."""
        return self.domain.n_tokens + self.neutral.n_tokens

    def pieces(self, n: int) -> list[Batch]:
        """The step in n parts of about equal size, for accumulation."""
        parts = (np.array_split(np.arange(len(b)), n) for b in (self.domain, self.neutral))
        return [Batch(self.domain[d], self.neutral[t]) for d, t in zip(*parts, strict=True)]


class Mixture:
    """Domain and neutral blocks, mixed. A batch depends on the seed and the step alone."""

    def __init__(
        self, domain: TokenBlocks, neutral: TokenBlocks, *, n_domain: int, n_neutral: int, seed: int
    ) -> None:
        """Mixes two kinds of text.

        Args:
            domain: Blocks to learn.
            neutral: Blocks to leave as they are; may be empty where n_neutral is 0.
            n_domain: Domain blocks of a step.
            n_neutral: Neutral blocks of a step.
            seed: Of the order.
        """
        self._domain, self._neutral = domain, neutral
        self._n_domain, self._n_neutral, self._seed = n_domain, n_neutral, seed

    def batch(self, step: int) -> Batch:
        """The blocks of a step, counted from 0."""
        return Batch(
            self._draw(self._domain, self._n_domain, step, _DOMAIN),
            self._draw(self._neutral, self._n_neutral, step, _NEUTRAL),
        )

    def used(self, n_steps: int) -> Batch:
        """The blocks of all steps before n_steps, each once."""
        return Batch(
            self._used(self._domain, n_steps * self._n_domain, _DOMAIN),
            self._used(self._neutral, n_steps * self._n_neutral, _NEUTRAL),
        )

    def _used(self, blocks: TokenBlocks, n: int, stream: int) -> TokenBlocks:
        if n >= len(blocks):
            return blocks
        return blocks[np.sort(self._order(len(blocks), stream, 0)[:n])]

    def _order(self, n_blocks: int, stream: int, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, stream, epoch]).permutation(n_blocks)

    def _draw(self, blocks: TokenBlocks, n: int, step: int, stream: int) -> TokenBlocks:
        """Walks through the blocks, each pass in an order of its own."""
        chosen = []
        for position in range(step * n, (step + 1) * n):
            epoch, place = divmod(position, len(blocks))
            chosen.append(self._order(len(blocks), stream, epoch)[place])
        return blocks[np.asarray(chosen, np.int64)]
