"""Imported checkpoints against transformers: the same logits, the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modularbase import Engine
from modularbase.bases.import_checkpoint import ImportOptions, write_base
from tests.tools.tiny_checkpoints import N_VOCAB, TEXT, make_tiny_checkpoint

IDS = np.random.default_rng(1).integers(0, N_VOCAB, 120).tolist()
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
# What pre-tokenizers treat differently, and characters that the vocabulary has no piece for.
TEXTS = [
    *TEXT,
    "I'm here, they'LL be 12345.678 there...\n\n  \t x = y_1;  \r\n",
    " leading and trailing  ",
    "Привет 你好 한국어 naïve ½ 😀👍🏽",
]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tied": True, "dtype": torch.bfloat16, "tokenizer": "spm"}),
        ("llama", {"attention_bias": True, "rope_parameters": LINEAR, "shard_bytes": 150_000}),
        ("llama3", {"dtype": torch.float32, "tokenizer": "llama-bpe"}),
        ("qwen2", {"tied": True, "dtype": torch.bfloat16, "tokenizer": "qwen2"}),
        ("qwen2", {"shard_bytes": 200_000, "rope_parameters": LINEAR, "tokenizer": "gpt-2"}),
        ("qwen3", {"tied": True, "tokenizer": "qwen2"}),
        ("qwen3", {"dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_logits_and_tokens(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = make_tiny_checkpoint(tmp_path / "checkpoint", family, **options)
    path = tmp_path / "tiny.gguf"
    write_base(made.folder, path, ImportOptions(name="tiny", version="2.1"))
    with torch.no_grad():
        table = torch.log_softmax(made.reference(torch.tensor([IDS])).logits[0], -1).numpy()
    with Engine.load(path, dtype="f32", n_threads=1) as engine:
        found = engine.score(IDS).logprobs
        assert (engine.base.id, engine.base.version) == ("tiny", "2.1")
        for text in TEXTS:
            ids = made.tokenizer.encode(text, add_special_tokens=False)
            assert engine.tokenizer.encode_plain(text) == ids
            assert engine.tokenizer.decode(ids) == text
        with_special = "<|im_start|>sea<|im_end|> <tool_call>" + TEXT[0]
        if options.get("tokenizer") != "spm":
            assert engine.tokenizer.encode(with_special) == made.tokenizer.encode(with_special)
    # The KV cache is F16 here and F32 there; an F32 checkpoint is rounded to F16 besides.
    tolerance = 2e-2 if options.get("dtype") == torch.float32 else 5e-3
    np.testing.assert_allclose(found, table[np.arange(len(IDS) - 1), IDS[1:]], atol=tolerance)
