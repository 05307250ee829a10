"""A vocabulary small enough to build in every test."""

from __future__ import annotations

from modularbase.bases.vocab import byte_characters


def tiny_byte_level_metadata() -> dict[str, object]:
    """A byte-level vocabulary of single bytes, a few merges and chat tokens: built in no time."""
    characters = byte_characters()
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "ã ģ"]
    merged = [m.replace(" ", "") for m in merges]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *characters, *merged]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(control) + [1] * (len(tokens) - len(control)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
