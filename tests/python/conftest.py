"""Engines on tiny models that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from modularbase import Engine, EngineOptions
from modularbase.types import KvKind
from tests.conftest import TinyModelFactory
from tests.tools.gguf_edit import copy_gguf
from tests.tools.tiny_requests import BITWISE_ROWS, load

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


@pytest.fixture(scope="session")
def wide_model(tiny_model: TinyModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template and heads of 32: blocks of 4 bits need that."""
    path = tmp_path_factory.mktemp("wide_model") / "tiny-wide.gguf"
    changes = {"tokenizer.chat_template": CHAT_TEMPLATE, "qwen3.context_length": 4096}
    return copy_gguf(tiny_model("qwen3").path, path, changes=changes)


LoadEngine = Callable[..., Engine]


@pytest.fixture(name="load")
def load_wide(wide_model: Path) -> Iterator[LoadEngine]:
    """Loads engines by their kv and fields of `EngineOptions`; they are closed behind the test."""
    with ExitStack() as stack:

        def loaded(kv: KvKind = "f16", n_ctx: int | None = None, **options: Any) -> Engine:
            fields = EngineOptions(**{"pack_budget_bytes": 0, **options})
            engine = Engine.load(
                wide_model, dtype="keep", n_threads=1, n_ctx=n_ctx, kv=kv, options=fields
            )
            return stack.enter_context(engine)

        yield loaded


@pytest.fixture(scope="session")
def pack_model(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context is long enough for requests that outlast a test."""
    path = tmp_path_factory.mktemp("pack_model") / "tiny-packs.gguf"
    return copy_gguf(chat_model, path, changes={"llama.context_length": 1 << 15})


class PackEngineFactory(Protocol):
    """Makes engines with packs."""

    def __call__(
        self, *, n_slots: float = ..., arguments: Mapping[str, Any] | None = ..., **options: Any
    ) -> Engine:
        """Room for n_slots tiny packs; arguments of `Engine.load`, fields of `EngineOptions`."""


@pytest.fixture(scope="session")
def slot_bytes(pack_model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """What a tiny pack takes of the budget."""
    from tests.tools.engine_packs import pack_file  # slow to import: torch

    with load(pack_model) as engine:
        return engine.packs.load(str(pack_file(tmp_path_factory.mktemp("one_pack")))).n_bytes


@pytest.fixture
def pack_engines(
    pack_model: Path, slot_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PackEngineFactory]:
    """Engines of the test's own, with a store of its own; they are closed behind it."""
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "home"))
    with ExitStack() as stack:

        def make(
            *, n_slots: float = 8, arguments: Mapping[str, Any] | None = None, **options: Any
        ) -> Engine:
            fields: dict[str, Any] = {
                "n_batch": BITWISE_ROWS,
                "pack_budget_bytes": int(n_slots * slot_bytes),
                **options,
            }
            given: dict[str, Any] = {"dtype": "keep", "n_threads": 1, **(arguments or {})}
            engine = Engine.load(pack_model, **given, options=EngineOptions(**fields))
            return stack.enter_context(engine)

        yield make


@pytest.fixture
def pack_engine(pack_engines: PackEngineFactory) -> Engine:
    """An engine with room for eight tiny packs."""
    return pack_engines()
