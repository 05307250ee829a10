"""The packs in packs/: installed as users do, on the base they were trained for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from modularbase import Engine
from modularbase.gguf_file import read_metadata
from modularbase.packs.index import open_index
from modularbase.packs.install import install
from modularbase.training.data import pack_blocks
from modularbase.training.encoding import Encoder
from modularbase.training.texts import read_documents
from modularbase.types import Packs
from packs.texts import ROOT, make

MAX_BYTES = 12_000_000

# A few lines of each domain. None is quoted from the texts that the packs learned.
EXCERPTS = {
    "python_code": inspect.getsource(pytest.approx)[:3000],
    "medical": (
        "Chapter IX: Diseases of the circulatory system\n\nI20-I25 Ischaemic heart diseases\n\n"
        "I20 Angina pectoris\n  I20.0 Unstable angina\n  I20.9 Angina pectoris, unspecified\n"
    ),
    "chinese_classics": (
        "山中问答\n问余何意栖碧山\n笑而不答心自闲\n桃花流水窅然去\n别有天地非人间\n    -- 李白\n"
    ),
}


@pytest.fixture(scope="module")
def engine(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine where all packs are installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODULARBASE_HOME", str(tmp_path_factory.mktemp("home")))
        installed = install(list(EXCERPTS), indexes=[open_index(ROOT)])
        assert {pack.manifest.id for pack in installed} == set(EXCERPTS)
        with Engine.load(smollm2, n_ctx=1024, pack_budget="64MB") as engine:
            yield engine


def perplexity(engine: Engine, blocks: Sequence[Sequence[int]], packs: Packs) -> float:
    logprobs = [engine.score(block, packs=packs).logprobs for block in blocks]
    n_tokens = sum(len(part) for part in logprobs)
    return math.exp(-sum(float(part.sum()) for part in logprobs) / n_tokens)


def test_each_is_small_and_says_where_it_comes_from() -> None:
    entries = open_index(ROOT).entries
    assert sorted(entry.manifest.id for entry in entries) == sorted(EXCERPTS)
    for entry in entries:
        training = entry.manifest.training
        assert entry.n_bytes <= MAX_BYTES
        assert training.command.startswith("modularbase train fit packs/")
        assert training.data and training.data_licence and training.n_tokens
        assert entry.manifest.quantisation.experts in ("q4_0", "q4_k")
        figures = entry.manifest.evaluation
        assert figures["heldout perplexity"] < figures["heldout perplexity of the base"]


@pytest.mark.parametrize("domain", EXCERPTS)
def test_a_pack_knows_its_own_domain_best(domain: str, engine: Engine) -> None:
    text = [engine.tokenizer.encode(EXCERPTS[domain])]
    found = {name: perplexity(engine, text, name) for name in EXCERPTS}
    assert min(found, key=lambda name: found[name]) == domain
    assert found[domain] < 0.9 * perplexity(engine, text, None)


def test_the_held_out_text_has_the_perplexity_of_the_manifest(
    engine: Engine, smollm2: Path, tmp_path: Path
) -> None:
    make("medical", tmp_path, tmp_path / "packages")
    documents = read_documents([tmp_path / "medical" / "heldout.jsonl"])
    encoder = Encoder(read_metadata(smollm2))
    blocks = pack_blocks(documents, encoder, 256)[:32].ids.tolist()
    (entry,) = (e for e in open_index(ROOT).entries if e.manifest.id == "medical")
    figures = entry.manifest.evaluation
    found = perplexity(engine, blocks, "medical")
    # PyTorch measured it in BF16 with unrounded weights; the engine's are INT4.
    assert found == pytest.approx(figures["heldout perplexity"], rel=0.02)
    assert found < 0.8 * figures["heldout perplexity of the base"]
