"""Tiny random checkpoints of each family as transformers saves them, each with a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.tools.tiny_models import N_EMBD, N_HEAD, N_VOCAB, random_reference

N_PIECES = 300  # fewer than the embedding has rows, as many checkpoints do
TEXT = [
    "the quick brown fox jumps over the lazy dog; the dog sleeps in the sun.",
    "she sells sea shells by the sea shore, 1234 of them, for 56 pounds each",
    "def shore(sea):\n    return [shell for shell in sea if shell.sells]\n",
]
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_USER = ["<tool_call>"]


@dataclass(frozen=True)
class TinyCheckpoint:
    """A folder, and what transformers reads from it.

    Attributes:
        folder: The checkpoint.
        reference: Its model, in F32.
        tokenizer: Its tokenizer.
    """

    folder: Path
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def make_tiny_checkpoint(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float16,
    tied: bool = False,
    shard_bytes: int | None = None,
    tokenizer: str = "smollm",
    **config: Any,
) -> TinyCheckpoint:
    """Saves a random model and a tokenizer.

    Args:
        folder: Where they go.
        family: As in `make_tiny_model`.
        dtype: What the tensors are saved as.
        tied: Whether the head is the embedding.
        shard_bytes: Size above which the tensors go to several files.
        tokenizer: "smollm", "llama-bpe", "qwen2", "gpt-2" or "spm".
        **config: Fields of config.json to change.
    """
    head_dim = 32 if family == "qwen3" else N_EMBD // N_HEAD
    model = random_reference(family, head_dim, tied, **config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_bytes or "1GB")
    made = _tokenizer(tokenizer)
    made.save_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return TinyCheckpoint(folder, reference.eval(), made)


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    core = _sentence_piece() if kind == "spm" else _byte_level(kind)
    begin, end = ("<s>", "</s>") if kind == "spm" else ("<|im_start|>", "<|im_end|>")
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=begin,
        eos_token=end,
        unk_token="<unk>" if kind == "spm" else None,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def _byte_level(kind: str) -> Tokenizer:
    plain = ByteLevel(add_prefix_space=False, use_regex=True)
    after_split = ByteLevel(add_prefix_space=False, use_regex=False)
    digit = _LLAMA3_SPLIT.replace("{1,3}", "")
    rules = {
        "gpt-2": plain,
        "smollm": Sequence([Digits(individual_digits=True), plain]),
        "llama-bpe": Sequence([Split(Regex(_LLAMA3_SPLIT), "isolated"), after_split]),
        "qwen2": Sequence([Split(Regex(digit), "isolated"), after_split]),
    }
    core = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    core.pre_tokenizer = rules[kind]
    core.decoder = decoders.ByteLevel()
    core.normalizer = normalizers.NFC() if kind == "qwen2" else None
    trainer = trainers.BpeTrainer(
        vocab_size=N_PIECES - len(_USER),
        special_tokens=_CONTROL,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT, trainer)
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in _USER])
    return core


def _sentence_piece() -> Tokenizer:
    """Llama 2's kind: pieces by score, a space before the text, bytes for the unknown."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Split(Regex("(?=▁)"), "isolated")
    trained.normalizer = normalizers.Replace(" ", "▁")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    n_pieces = N_VOCAB - len(specials)
    trained.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=n_pieces, limit_alphabet=28, show_progress=False)
    )
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    vocab = {piece: i for i, piece in enumerate([*specials, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    core = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


__all__ = ["N_PIECES", "N_VOCAB", "TEXT", "TinyCheckpoint", "make_tiny_checkpoint"]
