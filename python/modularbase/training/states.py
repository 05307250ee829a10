"""Where a run gets the base's states from that do not depend on the pack."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch

from modularbase.training.state_cache import BlockIds, StateCache
from modularbase.training.twin import Twin

Autocast = Callable[[], AbstractContextManager[None]]


class StateSource(Protocol):
    """The plain base's states of blocks of tokens."""

    def entering(self, blocks: BlockIds) -> torch.Tensor:
        """The residual stream entering the first site's layer [n_blocks, block_tokens, n_embd]."""

    def final(self, blocks: BlockIds, entering: torch.Tensor) -> torch.Tensor:
        """Behind the output norm, in the same shape.

        Args:
            blocks: Token ids [n_blocks, block_tokens].
            entering: What `entering` gave for them.
        """


class TorchStates:
    """Computes them with the twin, in the run's arithmetic."""

    def __init__(self, twin: Twin, autocast: Autocast) -> None:
        """Runs the twin's base under autocast."""
        self._twin, self._autocast = twin, autocast

    def entering(self, blocks: BlockIds) -> torch.Tensor:
        """Runs the lower half."""
        ids = torch.from_numpy(blocks).to(self._twin.head.device)
        with self._autocast():
            return self._twin.enter(ids)

    def final(self, blocks: BlockIds, entering: torch.Tensor) -> torch.Tensor:
        """Runs the upper half without the pack."""
        with self._autocast():
            return self._twin.forward_from(entering, with_pack=False).final


class CachedStates:
    """Reads what an engine computed before: PyTorch never runs the lower half.

    The final states are PyTorch's: an engine rounds the upper half otherwise, so that a new pack,
    which is the identity, would be at some distance from the base. They are computed once, block by
    block so that their bits do not depend on the rest of a batch, and kept beside the others.
    """

    def __init__(self, cache: StateCache, twin: Twin, autocast: Autocast) -> None:
        """Reads from a cache that has all entering states that will be asked for.

        Args:
            cache: Where the states lie.
            twin: Whose upper half is run.
            autocast: The run's arithmetic.
        """
        self._cache, self._twin, self._autocast = cache, twin, autocast
        self._device = twin.head.device
        self._entering = entering_kind(twin.first_site)
        self._final = final_kind(twin, autocast)

    def entering(self, blocks: BlockIds) -> torch.Tensor:
        """Reads them, as F32."""
        return self._read(self._entering, blocks)

    def final(self, blocks: BlockIds, entering: torch.Tensor) -> torch.Tensor:
        """Reads them, as F32; those that are missing are computed first."""
        is_there = self._cache.has(self._final, blocks)
        for i in np.flatnonzero(~is_there):
            with self._autocast():
                found = self._twin.forward_from(entering[i : i + 1], with_pack=False).final[0]
            self._cache.store(self._final, blocks[i], found.cpu().numpy().astype(np.float16))
        return self._read(self._final, blocks)

    def _read(self, kind: str, blocks: BlockIds) -> torch.Tensor:
        return torch.from_numpy(self._cache.load(kind, blocks)).to(self._device).float()


def entering_kind(layer: int) -> str:
    """What the cache calls the states that enter a layer."""
    return f"enter-{layer}"


def final_kind(twin: Twin, autocast: Autocast) -> str:
    """What the cache calls the final states, which depend on the arithmetic of the upper half."""
    device = twin.head.device.type
    with autocast():
        is_narrow = torch.is_autocast_enabled(device)
    return f"final-{twin.first_site}-{device}-{'bf16' if is_narrow else 'f32'}"
