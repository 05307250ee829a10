"""Engines on tiny models that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modularbase import Engine
from tests.conftest import TinyModelFactory
from tests.tools.gguf_edit import copy_gguf
from tests.tools.tiny_requests import load

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}[a]"
)


@pytest.fixture(scope="session")
def chat_model(tiny_model: TinyModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    path = tmp_path_factory.mktemp("chat_model") / "tiny-chat.gguf"
    changes = {"tokenizer.chat_template": CHAT_TEMPLATE}
    return copy_gguf(tiny_model().path, path, changes=changes)


@pytest.fixture(scope="session")
def engine(chat_model: Path) -> Iterator[Engine]:
    """An engine for tests that leave nothing running."""
    with load(chat_model) as engine:
        yield engine


@pytest.fixture
def own_engine(chat_model: Path) -> Iterator[Engine]:
    """An engine of the test's own, which it may close or fill."""
    with load(chat_model) as engine:
        yield engine
