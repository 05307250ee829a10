"""Tokens with a meaning of their own: which they are, and which of them end a generation.

Files declare only some of them by id; the rest is known by name, as llama.cpp knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from modularbase.errors import TokenizerError


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the special tokens of one vocabulary.

    Attributes:
        bos_id: Beginning of sequence, or None.
        eos_id: End of sequence, or None.
        unk_id: Stands for what the vocabulary cannot write, or None.
        eot_id: End of a turn, or None.
        eog_ids: Every token after which generation ends.
        types: Token types that differ from what the file declares, by id.
    """

    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eot_id: int | None
    eog_ids: frozenset[int]
    types: Mapping[int, TokenType]


_EOT_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<end_of_utterance>",
)
_EOM_NAMES = ("<|eom_id|>",)
_FIM_PAD_NAMES = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")
_FIM_REPO_NAMES = ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")
_FIM_FILE_NAMES = ("<|file_sep|>",)

# (metadata key, names by which it is known where the file does not declare it)
_ENDING_ROLES = (
    ("eot_token_id", _EOT_NAMES),
    ("eom_token_id", _EOM_NAMES),
    ("fim_pad_token_id", _FIM_PAD_NAMES),
    ("fim_rep_token_id", _FIM_REPO_NAMES),
    ("fim_sep_token_id", _FIM_FILE_NAMES),
)

_EOG_NAMES = frozenset(
    {
        *_EOT_NAMES,
        *_EOM_NAMES,
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "</s>",
        "[EOS]",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
    }
)
# Part of the visible message format of gpt-oss: always written out, never ends a generation.
_FORMAT_NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def find_special_tokens(
    meta: Mapping[str, object], id_of: Mapping[str, int], defaults: Mapping[str, int]
) -> SpecialTokens:
    """Collects the special tokens a file declares and those known by name.

    Args:
        meta: GGUF metadata.
        id_of: Token id by token text.
        defaults: Ids that apply where the file declares none, by key ("bos_token_id").

    Raises:
        TokenizerError: A declared id is not a token of the vocabulary.
    """
    n_vocab = len(id_of)
    types: dict[int, TokenType] = {}
    eog: set[int] = set()

    def declared(key: str) -> int | None:
        return _declared_id(meta, f"tokenizer.ggml.{key}", n_vocab, defaults.get(key))

    roles: dict[str, int | None] = {}
    for key, names in _ENDING_ROLES:
        token_id = declared(key)
        if token_id is None:
            token_id = next((id_of[name] for name in names if name in id_of), None)
            if token_id is not None:
                types[token_id] = TokenType.CONTROL
        roles[key] = token_id
        if token_id is not None:
            eog.add(token_id)

    for name in _EOG_NAMES & id_of.keys():
        eog.add(id_of[name])
        types[id_of[name]] = TokenType.CONTROL
    for name in _FORMAT_NAMES:
        if name in id_of:
            types[id_of[name]] = TokenType.USER_DEFINED
    eos_id = declared("eos_token_id")
    if eos_id is not None:
        eog.add(eos_id)
    _drop_names_that_do_not_end(id_of, eog, types)
    return SpecialTokens(
        bos_id=declared("bos_token_id"),
        eos_id=eos_id,
        unk_id=declared("unknown_token_id"),
        eot_id=roles["eot_token_id"],
        eog_ids=frozenset(eog),
        types=types,
    )


def _declared_id(
    meta: Mapping[str, object], key: str, n_vocab: int, default: int | None
) -> int | None:
    value = meta.get(key)
    if value is None:
        return default if default is not None and default < n_vocab else None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n_vocab:
        raise TokenizerError(key, f"a token id in 0..{n_vocab - 1}", repr(value))
    return value


def _drop_names_that_do_not_end(
    id_of: Mapping[str, int], eog: set[int], types: dict[int, TokenType]
) -> None:
    """Two families reuse an ending name for something else; a companion token gives them away."""

    def ends(name: str) -> bool:
        return id_of.get(name, -1) in eog

    calls = ends("<|call|>") or ends("<|calls|>")
    if ends("<|end|>") and calls and (ends("<|return|>") or ends("<|flush|>")):
        eog.discard(id_of["<|end|>"])
        types[id_of["<|end|>"]] = TokenType.USER_DEFINED
    if ends("</s>") and (ends("<|tool_response>") or ends("<|plamo:eos|>")):
        eog.discard(id_of["</s>"])
        types[id_of["</s>"]] = TokenType.NORMAL
