"""SmolLM2 to a checkpoint of transformers and back: the same weights, the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.align.checkpoint import save_checkpoint
from modularbase import Engine
from modularbase.bases.import_checkpoint import ImportOptions, write_base
from modularbase.gguf_file import read_metadata
from modularbase.training.base_model import load_base

TEXT = "The sea is 3,800 metres deep on average.\n\n    depth = [3800.0, 10_935]  # Challenger"


def test_there_and_back(smollm2_f16: Path, tmp_path: Path) -> None:
    folder, path = tmp_path / "checkpoint", tmp_path / "back.gguf"
    save_checkpoint(smollm2_f16, load_base(smollm2_f16), folder)
    write_base(folder, path, ImportOptions(name="smollm2-135m", version="1.1"))
    there, back = read_metadata(smollm2_f16), read_metadata(path)
    for key in ("tokens", "token_type", "merges", "pre", "bos_token_id", "eos_token_id"):
        np.testing.assert_array_equal(there[f"tokenizer.ggml.{key}"], back[f"tokenizer.ggml.{key}"])
    assert there["tokenizer.chat_template"] == back["tokenizer.chat_template"]
    scores = []
    for file in (smollm2_f16, path):
        with Engine.load(file, dtype="keep", n_threads=1) as engine:
            scores.append(engine.score(TEXT).logprobs)
            assert engine.base.id == "smollm2-135m"
    # Every weight takes part: one that differs in a bit would show (reading gguf's own way, tensor
    # by tensor, takes ten times as long).
    np.testing.assert_array_equal(scores[1], scores[0])
