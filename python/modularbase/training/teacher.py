"""A larger model in the engine that says how likely every next token is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modularbase.bases.identity import BaseIdentity
from modularbase.bases.special_tokens import TokenType
from modularbase.bases.tokenizer import Tokenizer
from modularbase.engine import Engine
from modularbase.errors import BaseLoadError, TeacherError
from modularbase.gguf_file import read_matrix, read_metadata
from modularbase.storage.disk import disk_errors
from modularbase.storage.files import appearing
from modularbase.types import FloatArray


class Teacher:
    """Final states of a larger model, from which its head makes whole distributions.

    What it has read is kept on disk, so that every block is read once, in this run and the next.

    Attributes:
        head: Its output matrix [n_shared, n_embd], of the tokens it has in common with the base.
    """

    def __init__(self, path: Path, base: Path, *, cache: Path, n_ctx: int, n_threads: int) -> None:
        """Loads a model with the base's vocabulary.

        Args:
            path: GGUF file of the teacher.
            base: GGUF file of the base.
            cache: Folder for what it has read; a folder of its own is made there.
            n_ctx: Tokens of the longest block.
            n_threads: Of the engine; 0: one per core.

        Raises:
            TeacherError: Its vocabulary is another.
            BaseLoadError: The file cannot be loaded.
            InstallError: The folder cannot be written.
        """
        self._path = path
        metadata = read_metadata(path)
        n_shared = shared_vocabulary(path, metadata, read_metadata(base))
        digest = BaseIdentity(path, metadata).digest.removeprefix("sha256:")
        self._folder = cache / f"teacher-{digest[:16]}"
        with disk_errors(self._folder.name, self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self.head = torch.from_numpy(_head(path)[:n_shared])
        self._engine = Engine.load(path, n_ctx=n_ctx, n_threads=n_threads or None, pack_budget=0)
        self._layer = self._engine.info["n_layer"] + 1

    def __enter__(self) -> Teacher:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Frees the model."""
        self._engine.close()

    def states(self, ids: NDArray[np.int64]) -> torch.Tensor:
        """States behind the output norm [n_seq, n_tokens, n_embd], rounded to F16.

        Args:
            ids: Token ids [n_seq, n_tokens].

        Raises:
            TeacherError: The states are no numbers.
            InstallError: The disk is full.
        """
        found = np.stack([self._states_of(row) for row in ids])
        return torch.from_numpy(found.astype(np.float32))

    def _states_of(self, row: NDArray[np.int64]) -> NDArray[np.float16]:
        content = hashlib.sha256(row.astype("<i8").tobytes()).hexdigest()
        path = self._folder / f"{content[:32]}.npy"
        shape = (len(row), self.head.shape[1])
        known = _kept(path, shape)
        if known is not None:
            return known
        states = self._engine.hidden(row.tolist(), self._layer).astype(np.float16)
        if not np.isfinite(states).all():
            raise TeacherError(str(self._path), "its states are no numbers that F16 holds")
        with appearing(path) as part, part.open("xb") as file:
            np.save(file, states, allow_pickle=False)
        return states


def shared_vocabulary(path: Path, teacher: Mapping[str, object], base: Mapping[str, object]) -> int:
    """How many tokens both have; one of them may be padded with unused ones.

    Args:
        path: The teacher's file, named in the error.
        teacher: Metadata of the teacher.
        base: Metadata of the base.

    Raises:
        TeacherError: A token is another one.
    """
    tokenizers = [Tokenizer.from_metadata(metadata) for metadata in (teacher, base)]
    theirs, ours = tokenizers
    n_shared = min(theirs.n_vocab, ours.n_vocab)
    for i in range(n_shared):
        expected, found = ((t.token_bytes(i), t.is_control(i)) for t in (ours, theirs))
        if expected != found:
            reason = f"token {i} is {found[0]!r}, of the base {expected[0]!r}"
            raise TeacherError(str(path), f"it has another vocabulary: {reason}")
    for metadata, tokenizer in zip((teacher, base), tokenizers, strict=True):
        types = metadata.get("tokenizer.ggml.token_type")
        rest: Any = types[n_shared:] if isinstance(types, list) else []
        if tokenizer.n_vocab > n_shared and set(rest) != {int(TokenType.UNUSED)}:
            sizes = f"{theirs.n_vocab} tokens, the base {ours.n_vocab}"
            raise TeacherError(str(path), f"it has another vocabulary: {sizes}")
    return n_shared


def _head(path: Path) -> FloatArray:
    """The output matrix [n_vocab, n_embd]: the embedding where there is none of its own."""
    try:
        return read_matrix(path, "output.weight")
    except BaseLoadError:
        return read_matrix(path, "token_embd.weight")


def _kept(path: Path, shape: tuple[int, int]) -> NDArray[np.float16] | None:
    """States that were kept; None where there are none, or the file is spoilt."""
    try:
        found: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_sound = found.shape == shape and found.dtype == np.float16
    return found if is_sound else None
