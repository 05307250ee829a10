"""Where the tests of this folder find vocabularies and the default base."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from gguf_metadata import read_gguf_metadata
from tiny_vocab import tiny_byte_level_metadata

from modularbase.bases.tokenizer import Tokenizer

_ROOT = Path(__file__).resolve().parents[3]
_CACHE = _ROOT / ".cache" / "llama_cpp_models"


@pytest.fixture(scope="session")
def llama_cpp_models_dir() -> Path:
    """The `models` folder of llama.cpp, with its vocabularies and their expected encodings."""
    local = os.environ.get("MODULARBASE_LLAMA_CPP_DIR")
    if local:
        return Path(local) / "models"
    if not (_CACHE / "complete").exists():
        _extract_models(_CACHE)
    return _CACHE


def _extract_models(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder.parent / "llama_cpp_python.tar.gz"
    fetch = [sys.executable, str(_ROOT / "tools" / "fetch_ggml.py"), "--archive", str(archive)]
    subprocess.run(fetch, check=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/vendor/llama.cpp/models/")
            wanted = inside.startswith(("ggml-vocab-", "templates/")) and member.isfile()
            data = tar.extractfile(member) if wanted else None
            if data is not None:
                target = folder / inside
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(data.read())
    archive.unlink()  # the script keeps it in the user's cache
    (folder / "complete").touch()


@pytest.fixture
def byte_level_metadata() -> dict[str, object]:
    """Metadata of a small byte-level vocabulary; a test may change it."""
    return tiny_byte_level_metadata()


@pytest.fixture(scope="session")
def sentence_piece(llama_cpp_models_dir: Path) -> Tokenizer:
    """Llama 2's tokenizer."""
    path = llama_cpp_models_dir / "ggml-vocab-llama-spm.gguf"
    return Tokenizer.from_metadata(read_gguf_metadata(path))
