"""Models for the tests: tiny random ones made here, and the real default base."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from modularbase.bases import install

if TYPE_CHECKING:
    from tests.tools.tiny_models import TinyModel

os.environ.pop("COLUMNS", None)  # from xdist: the command line would keep to it for good
_ROOT = Path(__file__).resolve().parents[1]
_CACHE = _ROOT / ".cache" / "test-models"
_LLAMA_CPP = _ROOT / ".cache" / "llama_cpp" / "models"


class TinyModelFactory(Protocol):
    """Makes tiny random models, each only once a session."""

    def __call__(self, family: str = ..., **options: Any) -> TinyModel:
        """Arguments as in `make_tiny_model`."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModelFactory:
    """Tiny random models by family and options."""
    from tests.tools.tiny_models import make_tiny_model  # slow to import: torch

    folder = tmp_path_factory.mktemp("tiny_models")
    made: dict[str, TinyModel] = {}

    def make(family: str = "llama", **options: Any) -> TinyModel:
        name = "-".join([family, *(f"{key}_{options[key]}" for key in sorted(options))])
        if name not in made:
            made[name] = make_tiny_model(family, folder / f"{name}.gguf", **options)
        return made[name]

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default base (Q4_1): MODULARBASE_TEST_BASE, else installed when missing."""
    local = os.environ.get("MODULARBASE_TEST_BASE")
    return Path(local) if local else install.resolve("smollm2-135m", install=True)


@pytest.fixture(scope="session")
def smollm2_f16(smollm2: Path) -> Path:
    """The default base with all matrices in F16; kept for the next session."""
    from tests.tools.gguf_edit import dequantised

    path = _CACHE / f"{smollm2.stem}-{smollm2.stat().st_size}.f16.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        dequantised(smollm2, part)
        part.replace(path)
    return path


@pytest.fixture(scope="session")
def llama_cpp_models_dir() -> Path:
    """The `models` folder of llama.cpp, with its vocabularies and their expected encodings."""
    local = os.environ.get("MODULARBASE_LLAMA_CPP_DIR")
    if local:
        return Path(local) / "models"
    if not _LLAMA_CPP.is_dir():
        _extract_models(_LLAMA_CPP)
    return _LLAMA_CPP


def _extract_models(folder: Path) -> None:
    """All or nothing, as others may be at it."""
    archive = folder.with_name(f"llama_cpp_python.{os.getpid()}.tar.gz")
    made = folder.with_name(f"{folder.name}.{os.getpid()}")
    made.mkdir(parents=True)
    fetch = [sys.executable, str(_ROOT / "tools" / "fetch_ggml.py"), "--archive", str(archive)]
    subprocess.run(fetch, check=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/vendor/llama.cpp/models/")
            wanted = inside.startswith(("ggml-vocab-", "templates/")) and member.isfile()
            data = tar.extractfile(member) if wanted else None
            if data is not None:
                target = made / inside
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(data.read())
    archive.unlink()  # the script keeps it in the user's cache
    try:
        made.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(made)
        if not folder.is_dir():
            raise
