"""Names for segments, none of which outlives its test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import pytest

from tests.python.training.segment_bytes import shm_file

_NUMBERS = count()


@pytest.fixture
def name() -> Iterator[str]:
    """A name that no other test has."""
    name = f"pytest-{os.getpid()}-{next(_NUMBERS)}"
    yield name
    shm_file(name).unlink(missing_ok=True)
