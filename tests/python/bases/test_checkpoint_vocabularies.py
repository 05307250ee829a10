"""Real vocabularies as tokenizer.json and back: every text is encoded as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_metadata import read_gguf_metadata
from tokenizers import AddedToken, normalizers

from modularbase.bases.checkpoints.vocabulary import tokenizer_metadata
from modularbase.bases.merging import build_core
from modularbase.bases.special_tokens import TokenType
from modularbase.bases.tokenizer import Tokenizer
from modularbase.bases.vocab import Vocab


@pytest.mark.parametrize("name", ["llama-spm", "deepseek-coder"])
def test_there_and_back(name: str, llama_cpp_models_dir: Path, tmp_path: Path) -> None:
    file = llama_cpp_models_dir / f"ggml-vocab-{name}.gguf"
    vocab = Vocab.from_metadata(read_gguf_metadata(file))
    write_tokenizer(vocab, tmp_path)
    metadata = tokenizer_metadata(tmp_path, len(vocab.tokens), [])
    assert metadata["tokenizer.ggml.model"] == ("gpt2" if vocab.is_byte_level else "llama")
    ours, expected = Tokenizer.from_metadata(metadata), Tokenizer(vocab)
    texts = file.with_suffix(".gguf.inp").read_text(encoding="utf-8")
    for text in texts.split("\n__ggml_vocab_test__\n"):
        assert ours.encode(text) == expected.encode(text)


def write_tokenizer(vocab: Vocab, folder: Path) -> None:
    """The files that transformers has for a vocabulary."""
    core = build_core(vocab)
    if not vocab.is_byte_level:
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    special = vocab.matched_ids([TokenType.CONTROL, TokenType.UNKNOWN])
    core.add_special_tokens([vocab.tokens[i] for i in special])
    other = vocab.matched_ids([TokenType.USER_DEFINED])
    core.add_tokens([AddedToken(vocab.tokens[i], normalized=False) for i in other])
    core.save(str(folder / "tokenizer.json"))
    ids = {"bos": vocab.special.bos_id, "eos": vocab.special.eos_id, "unk": vocab.special.unk_id}
    config: dict[str, object] = {
        f"{name}_token": vocab.tokens[i] for name, i in ids.items() if i is not None
    }
    config["add_bos_token"] = vocab.add_bos
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
