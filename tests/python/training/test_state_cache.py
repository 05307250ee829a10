"""The cache of states: found by content, whole or not there, and never larger than told."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from modularbase.errors import TrainingError
from modularbase.training.state_cache import StateCache

_BLOCKS = np.arange(12, dtype=np.int64).reshape(3, 4)
_DIGEST = "sha256:" + "ab" * 32


def states(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """Of one block, [4, 8]."""
    return np.random.default_rng(seed).normal(size=(4, 8)).astype(np.float16)


@pytest.fixture
def cache(tmp_path: Path) -> StateCache:
    """An empty one."""
    made = StateCache(tmp_path, _DIGEST, 8)
    made.make_room({}, 1 << 20)
    return made


def test_states_are_found_by_base_block_and_kind(cache: StateCache, tmp_path: Path) -> None:
    cache.store("enter-1", _BLOCKS[0], states(0))
    cache.store("final-1", _BLOCKS[0], states(1))
    cache.store("enter-1", _BLOCKS[2], states(2))
    assert cache.has("enter-1", _BLOCKS).tolist() == [True, False, True]
    assert cache.has("final-1", _BLOCKS).tolist() == [True, False, False]
    other = StateCache(tmp_path, "sha256:" + "cd" * 32, 8)
    assert not other.has("enter-1", _BLOCKS).any()
    found = cache.load("enter-1", _BLOCKS[[2, 0, 2]])
    assert np.array_equal(found, [states(2), states(0), states(2)])
    assert np.array_equal(cache.load("final-1", _BLOCKS[:1]), [states(1)])
    assert {file.stat().st_size for file in cache.folder.iterdir()} == {cache.file_bytes(4)}
    assert cache.has("enter-1", _BLOCKS[:0]).tolist() == []


def test_spoilt_and_missing_files_are_named(cache: StateCache) -> None:
    cache.store("enter-1", _BLOCKS[0], states(0))
    (file,) = cache.folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert not cache.has("enter-1", _BLOCKS[:1]).any()
    for content in (whole[:-1], b"\0" * len(whole), whole.replace(b"'<f2'", b"'<i2'")):
        file.write_bytes(content)
        with pytest.raises(TrainingError, match=file.name):
            cache.load("enter-1", _BLOCKS[:1])
    with pytest.raises(TrainingError, match="no states"):
        cache.load("enter-2", _BLOCKS[:1])


def test_what_was_not_used_for_longest_goes_first(cache: StateCache) -> None:
    known: set[Path] = set()
    for i, block in enumerate(_BLOCKS):
        cache.store("enter-1", block, states(i))
        (path,) = set(cache.folder.iterdir()) - known
        known.add(path)
        os.utime(path, (1000 + i, 1000 + i))
    assert cache.has("enter-1", _BLOCKS[:1]).all()  # so the first was used last
    n = cache.file_bytes(4)
    # One that is there and needed, one to come, and room for one more: the third has to go.
    cache.make_room({"enter-1": _BLOCKS[1:2], "final-1": _BLOCKS[:1]}, 3 * n)
    assert cache.has("enter-1", _BLOCKS).tolist() == [True, True, False]
    with pytest.raises(TrainingError, match=f"need {3 * n} bytes"):
        cache.make_room({"enter-1": _BLOCKS}, 3 * n - 1)
    assert cache.has("enter-1", _BLOCKS).tolist() == [True, True, False]
