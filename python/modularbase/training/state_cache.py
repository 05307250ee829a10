"""States of blocks of tokens on the disk, found by what they were computed from.

A file is named by base, block and kind, so that runs and projects share what is there:

    ROOT/BASE/BLOCK.KIND.npy      F16 [block_tokens, n_embd]

BASE and BLOCK are the beginnings of SHA-256 sums: of the base's file, and of the token ids. KIND
says what the states are, as `enter-15`. Files appear whole or not at all. What was not used for
longest goes first when the cache would outgrow its limit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modularbase.errors import TrainingError
from modularbase.storage.disk import check_space, disk_errors
from modularbase.storage.files import appearing

BlockIds = NDArray[np.int64]  # [n_blocks, block_tokens]
States = NDArray[np.float16]  # [..., block_tokens, n_embd]

_DIGITS = 32  # of a sum: 128 bits
_HEADER_BYTES = 128  # of a .npy file of two dimensions


class StateCache:
    """The files of one base; processes may share the folder."""

    def __init__(self, root: Path, base_digest: str, n_embd: int) -> None:
        """Nothing is created before it is needed.

        Args:
            root: Folder of all bases.
            base_digest: "sha256:" and the digits.
            n_embd: Width of a row.
        """
        self._root, self._n_embd = root, n_embd
        self.folder = root / base_digest.removeprefix("sha256:")[:_DIGITS]

    def file_bytes(self, block_tokens: int) -> int:
        """What the states of a block take."""
        return _HEADER_BYTES + 2 * block_tokens * self._n_embd

    def has(self, kind: str, blocks: BlockIds) -> NDArray[np.bool_]:
        """Whether the states of each block are there [n_blocks]; those count as used now."""
        n_bytes = self.file_bytes(blocks.shape[1])
        return np.asarray([_touch(self._path(kind, block), n_bytes) for block in blocks], bool)

    def make_room(self, needed: Mapping[str, BlockIds], limit_bytes: int) -> None:
        """Removes what was not used for longest until all that is needed fits.

        Args:
            needed: Blocks of each kind; what of them is there stays.
            limit_bytes: Most that all files may take, those of other bases included.

        Raises:
            TrainingError: What is needed does not fit.
            InstallError: The disk has no room, or refuses.
        """
        sizes = {
            self._path(kind, block): self.file_bytes(len(block))
            for kind, blocks in needed.items()
            for block in blocks
        }
        total = sum(sizes.values())
        if total > limit_bytes:
            raise TrainingError(
                f"the states of this run need {total} bytes in {self._root}, "
                f"the limit is {limit_bytes}; fewer steps or shorter text need less"
            )
        with disk_errors("states", self._root):
            self.folder.mkdir(parents=True, exist_ok=True)
            found = {path: path.stat() for path in self._root.glob("*/*.npy")}
            others = [(stat.st_mtime_ns, path) for path, stat in found.items() if path not in sizes]
            total += sum(found[path].st_size for _, path in others)
            for _, path in sorted(others):
                if total > limit_bytes:
                    path.unlink(missing_ok=True)
                    total -= found[path].st_size
        n_there = sum(found[path].st_size for path in sizes.keys() & found.keys())
        check_space("states", self.folder, sum(sizes.values()) - n_there)

    def store(self, kind: str, block: NDArray[np.int64], states: States) -> None:
        """Keeps the states of a block [block_tokens, n_embd].

        Raises:
            InstallError: They cannot be written.
        """
        with appearing(self._path(kind, block)) as part, part.open("wb") as file:
            np.save(file, states)

    def load(self, kind: str, blocks: BlockIds) -> States:
        """The states of blocks [n_blocks, block_tokens, n_embd].

        Raises:
            TrainingError: A file has gone, or is spoilt.
        """
        shape = (*blocks.shape, self._n_embd)
        states: States = np.empty(shape, np.float16)
        for i, block in enumerate(blocks):
            path = self._path(kind, block)
            try:
                found = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise TrainingError(f"{path}: no states can be read: {error}") from error
            if found.shape != shape[1:] or found.dtype != np.float16:
                raise TrainingError(
                    f"{path}: expected float16 {shape[1:]}, found {found.dtype} {found.shape}"
                )
            states[i] = found
        return states

    def _path(self, kind: str, block: NDArray[np.int64]) -> Path:
        digest = hashlib.sha256(np.ascontiguousarray(block, "<i8").tobytes()).hexdigest()
        return self.folder / f"{digest[:_DIGITS]}.{kind}.npy"


def _touch(path: Path, n_bytes: int) -> bool:
    """Whether a file of so many bytes is there; then it is the one that was used last."""
    try:
        if path.stat().st_size != n_bytes:
            return False
        os.utime(path)
    except OSError:
        return False
    return True
