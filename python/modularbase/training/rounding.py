"""Weights as the pack file will hold them, so that the last steps train what is shipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modularbase.packs.manifest import Quantisation
from modularbase.packs.pack_file import rounded
from modularbase.packs.weights import type_of
from modularbase.training.pack_module import PackModule


class Rounding:
    """Rounds a pack's matrices for as long as a step or a measurement takes.

    A gradient that is found at the rounded weights goes to the exact ones, as if rounding were the
    identity (the straight-through estimator of arXiv:1308.3432).
    """

    def __init__(self, pack: PackModule, types: Quantisation, *, has_parent: bool) -> None:
        """Changes nothing yet.

        Args:
            pack: Whose weights are rounded.
            types: What the pack file will hold.
            has_parent: Whether frozen parts hold a file's numbers, which are written as they are.
        """
        self._pack, self._types, self._has_parent = pack, types, has_parent

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The pack has rounded weights inside, and its exact ones again behind."""
        exact = {name: parameter.data for name, parameter in self._matrices()}
        try:
            for name, parameter in self._matrices():
                values = rounded(parameter.data.cpu().numpy(), type_of(name, self._types))
                parameter.data = torch.from_numpy(values).to(parameter.device)
            yield
        finally:
            for name, parameter in self._matrices():
                parameter.data = exact[name]

    def _matrices(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self._pack.named_tensors():
            is_kept = self._has_parent and not parameter.requires_grad
            if type_of(name, self._types) != "f32" and not is_kept:
                yield name, parameter
