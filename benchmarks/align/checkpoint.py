"""A model with a base's tokenizer as a checkpoint of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modularbase.bases.merging import build_core
from modularbase.bases.special_tokens import TokenType
from modularbase.bases.vocab import Vocab
from modularbase.gguf_file import read_metadata


def save_checkpoint(base: Path, model: Any, folder: Path) -> None:
    """Saves a model that has a base's tokenizer.

    Args:
        base: GGUF file whose tokenizer it is; a byte-level one.
        model: Model of transformers.
        folder: Where it goes.
    """
    model.save_pretrained(folder)
    metadata = read_metadata(base)
    vocab = Vocab.from_metadata(metadata)
    core = build_core(vocab)
    core.add_special_tokens([vocab.tokens[i] for i in vocab.matched_ids([TokenType.CONTROL])])
    core.save(str(folder / "tokenizer.json"))
    special = {"bos": vocab.special.bos_id, "eos": vocab.special.eos_id}
    config: dict[str, object] = {
        f"{name}_token": vocab.tokens[i] for name, i in special.items() if i is not None
    }
    config["add_bos_token"] = vocab.add_bos
    config["chat_template"] = metadata.get("tokenizer.chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
