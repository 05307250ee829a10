"""What a pack is taught on the domain's text; neutral text is not its business."""

from __future__ import annotations

from typing import Protocol

import torch

from modularbase.training.data import TokenBlocks
from modularbase.training.losses import cross_entropy


class Objective(Protocol):
    """The loss on the domain; anything that follows from a block's tokens may be the teacher."""

    def loss(self, final: torch.Tensor, head: torch.Tensor, blocks: TokenBlocks) -> torch.Tensor:
        """Sum over the learnt tokens, in nats; the trainer divides by their number in the step.

        Args:
            final: States behind the output norm [n_seq, n_tokens, n_embd].
            head: Output matrix [n_vocab, n_embd]; gets no gradient.
            blocks: The n_seq sequences behind the states.
        """

    def figures(
        self, final: torch.Tensor, head: torch.Tensor, blocks: TokenBlocks
    ) -> dict[str, float]:
        """What held-out text says, by name: sums over the learnt tokens.

        Always `loss`, the cross-entropy; `objective` where a run lowers something else.
        """


class NextToken:
    """The text itself is the teacher: cross-entropy of the next token."""

    def loss(self, final: torch.Tensor, head: torch.Tensor, blocks: TokenBlocks) -> torch.Tensor:
        """Sum of -ln p(token); arguments as in `Objective.loss`."""
        rows = predicting(final, blocks)
        ids, learnt = blocks.ids[:, 1:], blocks.learnt[:, 1:]
        return cross_entropy(rows, head, torch.from_numpy(ids[learnt]).to(final.device))

    def figures(
        self, final: torch.Tensor, head: torch.Tensor, blocks: TokenBlocks
    ) -> dict[str, float]:
        """The loss; arguments as in `Objective.figures`."""
        return {"loss": float(self.loss(final, head, blocks))}


def predicting(final: torch.Tensor, blocks: TokenBlocks) -> torch.Tensor:
    """States whose next token is learnt, sequence by sequence.

    Args:
        final: [n_seq, n_tokens, n_embd].
        blocks: The n_seq sequences behind the states.

    Returns:
        [blocks.n_learnt, n_embd].
    """
    learnt = blocks.learnt[:, 1:]
    rows = before_last(final)
    if learnt.all():
        return rows
    return rows[torch.from_numpy(learnt.reshape(-1)).to(final.device)]


def before_last(final: torch.Tensor) -> torch.Tensor:
    """States that have a next token.

    Args:
        final: [n_seq, n_tokens, n_embd].

    Returns:
        [n_seq * (n_tokens - 1), n_embd].
    """
    return final[:, :-1].reshape(-1, final.shape[-1])
