"""The checks of the lint step can fail: each is shown a planted fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_file_length, check_layers


def plant(root: Path, file: str, text: str) -> Path:
    """Writes a source into a tree that has the folders the checker expects."""
    (root / "bindings").mkdir(exist_ok=True)
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (root / "cpp" / "modularbase").mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    ("file", "include", "fault"),
    [
        (
            "cpp/modularbase/core/a.h",
            '"modularbase/engine/engine.h"',
            "core may not include engine",
        ),
        (
            "cpp/modularbase/models/a.cpp",
            '"modularbase/packs/pack.h"',
            "models may not include packs",
        ),
        ("cpp/modularbase/sampling/a.cpp", "<ggml.h>", "sampling may not include ggml"),
        ("cpp/modularbase/engine/a.cpp", '"ggml-backend.h"', "engine may not include ggml"),
        ("cpp/modularbase/engine/a.cpp", "<pybind11/stl.h>", "only bindings may include Python"),
        ("cpp/modularbase/kv/a.cpp", '"block_pool.h"', 'expected "modularbase/'),
        ("bindings/a.cpp", '"modularbase/models/model.h"', "bindings may not include models"),
    ],
)
def test_planted_include_is_found(tmp_path: Path, file: str, include: str, fault: str) -> None:
    path = plant(tmp_path, file, f"#pragma once\n\n#include {include}\n")
    (line,) = check_layers.check_tree(tmp_path)
    assert line.startswith(f"{path}:3: ")
    assert fault in line


@pytest.mark.parametrize(
    ("file", "include"),
    [
        ("cpp/modularbase/engine/a.cpp", '"modularbase/models/model.h"'),
        ("cpp/modularbase/kv/a.cpp", '"modularbase/kv/block_pool.h"'),
        ("cpp/modularbase/graph/a.cpp", "<ggml-backend.h>"),
        ("cpp/modularbase/core/a.cpp", "<vector>"),
        ("bindings/a.cpp", '"bindings.h"'),
    ],
)
def test_allowed_include_is_not(tmp_path: Path, file: str, include: str) -> None:
    plant(tmp_path, file, f"#include {include}\n")
    assert list(check_layers.check_tree(tmp_path)) == []


def test_module_outside_the_table_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "cpp/modularbase/novel/a.h", "")
    (line,) = check_layers.check_tree(tmp_path)
    assert "novel: not in the table" in line


def test_table_has_no_cycle() -> None:
    table = dict(check_layers.MAY_INCLUDE)
    while table:
        free = {name for name, others in table.items() if not others & table.keys()}
        assert free, f"a cycle among {sorted(table)}"
        table = {name: others for name, others in table.items() if name not in free}


def test_long_file_is_found(tmp_path: Path) -> None:
    short, long = tmp_path / "short.py", tmp_path / "long.py"
    short.write_text("\n" * check_file_length.MAX_LINES)
    long.write_text("\n" * (check_file_length.MAX_LINES + 1))
    (line,) = check_file_length.check_files([short, long])
    assert line == f"{long}: 601 lines, at most 600"
