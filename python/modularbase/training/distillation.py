"""The pack learns what a larger model says of every next token, not only which one came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modularbase.training.data import TokenBlocks
from modularbase.training.losses import kl_to_teacher
from modularbase.training.objective import NextToken, Objective, predicting
from modularbase.training.options import TrainOptions
from modularbase.training.run_folder import RUNS_FOLDER
from modularbase.training.teacher import Teacher
from modularbase.training.trainer import make_autocast


class FromTeacher:
    """weight * T^2 * KL(teacher || pack) + (1 - weight) * cross-entropy (arXiv:1503.02531).

    Both distributions of the KL are softened by the temperature T; T^2 keeps the gradients' size.
    """

    def __init__(self, teacher: Teacher, options: TrainOptions) -> None:
        """Listens to a teacher.

        Args:
            teacher: With the base's vocabulary.
            options: The run's: weight, temperature, device and arithmetic.
        """
        self._teacher = teacher
        self._weight, self._temperature = options.teacher_weight, options.teacher_temperature
        with make_autocast(options)():
            narrow = torch.is_autocast_enabled(torch.device(options.device).type)
        # In the type of the products once and for all: heads are large.
        self._head = teacher.head.to(options.device, torch.bfloat16 if narrow else torch.float32)

    def loss(self, final: torch.Tensor, head: torch.Tensor, blocks: TokenBlocks) -> torch.Tensor:
        """Sum over the learnt tokens; arguments as in `Objective.loss`."""
        soft = self._kl(final, head, blocks, self._temperature)
        return self._weight * soft + (1 - self._weight) * NextToken().loss(final, head, blocks)

    def figures(
        self, final: torch.Tensor, head: torch.Tensor, blocks: TokenBlocks
    ) -> dict[str, float]:
        """The losses, and `teacher_kl`: KL(teacher || pack) at temperature 1."""
        return {
            **NextToken().figures(final, head, blocks),
            "objective": float(self.loss(final, head, blocks)),
            "teacher_kl": float(self._kl(final, head, blocks, 1.0)),
        }

    def _kl(
        self, final: torch.Tensor, head: torch.Tensor, blocks: TokenBlocks, temperature: float
    ) -> torch.Tensor:
        states = self._teacher.states(blocks.ids).to(final.device)
        return kl_to_teacher(
            predicting(final, blocks),
            head[: len(self._head)],
            predicting(states, blocks),
            self._head,
            temperature,
        )


@contextmanager
def objective_of(options: TrainOptions) -> Iterator[Objective]:
    """What a run's domain text teaches; a teacher is there as long as the run.

    Raises:
        TeacherError: The teacher has another vocabulary than the base.
        BaseLoadError: The teacher cannot be loaded.
        InstallError: The project's folder cannot be written.
    """
    if options.teacher is None:
        yield NextToken()
        return
    with Teacher(
        options.teacher,
        options.base,
        cache=options.project / RUNS_FOLDER,
        n_ctx=options.block_tokens,
        n_threads=options.n_threads,
    ) as teacher:
        yield FromTeacher(teacher, options)
