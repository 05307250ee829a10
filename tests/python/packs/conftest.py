"""A data folder of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from modularbase.storage import http_download


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder."""
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http_download, "RETRY_WAIT_S", 0.0)
    return tmp_path / "home"
