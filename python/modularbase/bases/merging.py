"""Builds the merging core (the `tokenizers` library) of a vocabulary.

Only merging happens there. Special tokens, BOS/EOS and the space prefix are handled around it, so
one immutable core serves every way of encoding, from any thread.
"""

from __future__ import annotations

from tokenizers import Regex
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from modularbase.bases.pre_tokenizers import PreTokenizer
from modularbase.bases.special_tokens import TokenType
from modularbase.bases.vocab import Vocab
from modularbase.errors import TokenizerError


def build_core(vocab: Vocab) -> Core:
    """Returns a core that turns plain text into token ids.

    Raises:
        TokenizerError: The merges do not fit the vocabulary.
    """
    return _byte_level_core(vocab) if vocab.is_byte_level else _sentence_piece_core(vocab)


def byte_level_splits(rules: PreTokenizer) -> Sequence:
    """Cuts text as the rules say, and writes its bytes as byte-level vocabularies do."""
    splits = [Split(Regex(pattern), "isolated") for pattern in rules.patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level_core(vocab: Vocab) -> Core:
    core = _bpe_core(
        BPE,
        vocab,
        [tuple(merge.split(" ", 1)) for merge in vocab.merges],
        ignore_merges=vocab.rules.ignore_merges,
    )
    core.pre_tokenizer = byte_level_splits(vocab.rules)
    return core


def _sentence_piece_core(vocab: Vocab) -> Core:
    unk = vocab.special.unk_id
    return _bpe_core(
        BPE,
        vocab,
        merges_from_scores(vocab),
        unk_token=None if unk is None else vocab.tokens[unk],
        fuse_unk=True,
        byte_fallback=True,
    )


def _bpe_core(
    model: type[BPE], vocab: Vocab, merges: list[tuple[str, ...]], **options: object
) -> Core:
    try:
        return Core(model(vocab.id_of, merges, **options))  # type: ignore[arg-type]
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            "tokenizer.ggml.merges", "pairs of tokens whose union is a token", str(error)
        ) from error


def merges_from_scores(vocab: Vocab) -> list[tuple[str, ...]]:
    """Rebuilds merge rules for SentencePiece: it joins the pair whose union scores best."""
    mergeable = frozenset((TokenType.NORMAL, TokenType.USER_DEFINED))
    pieces = {
        t: s
        for t, s, k in zip(vocab.tokens, vocab.scores, vocab.types, strict=True)
        if k in mergeable
    }
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((-score, -len(left), -len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in ranked]
