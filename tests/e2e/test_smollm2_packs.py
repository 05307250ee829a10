"""Packs on real weights: SmolLM2-135M with random packs of the small geometry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from modularbase import Engine, EngineOptions, PackRequest, PackUse, Result
from modularbase.packs.archive import write_archive
from modularbase.packs.install import install
from modularbase.packs.manifest import ExpertType, Manifest, Quantisation
from modularbase.packs.pack_file import write_pack
from modularbase.packs.random_pack import random_weights
from modularbase.packs.scaffold import default_sites
from modularbase.packs.weights import PackGeometry
from modularbase.types import FloatArray, Packs
from tests.tools.compare import assert_same_tokens

N_PACKS = 8
WAIT_S = 600
PROMPT = "The three most important things to know about the ocean are"
PREFIX = "You are a careful assistant who answers in one sentence. " * 90  # some 1000 tokens
# Lead in log-probability under which another order of summation may turn two tokens.
GAP = 0.05


class MakePack(Protocol):
    """Writes random packs of geometry S, each only once."""

    def __call__(
        self,
        pack_id: str,
        *,
        seed: int,
        experts: ExpertType = ...,
        n_sites: int = ...,
        **fields: Any,
    ) -> Path:
        """Its file; `fields` are those of the manifest."""


@pytest.fixture(scope="module")
def make_pack(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> MakePack:
    """Packs for the default base."""
    folder = tmp_path_factory.mktemp("packs")
    with Engine.load(smollm2, n_ctx=64, pack_budget=0) as engine:
        info, base_id = engine.info, engine.base.id
    sites = default_sites(info["n_layer"])

    def make(
        pack_id: str, *, seed: int, experts: ExpertType = "q4_0", n_sites: int = 8, **fields: Any
    ) -> Path:
        path = folder / f"{pack_id}.gguf"
        if path.exists():
            return path
        given = {
            "id": pack_id,
            "version": "1.0.0",
            "name": pack_id,
            "domain": "test",
            "licence": "CC0-1.0",
            "base_id": base_id,
            "quantisation": Quantisation(experts=experts),
            **fields,
        }
        geometry = PackGeometry(n_embd=info["n_embd"], d_inner=256, d_ff=256, sites=sites[:n_sites])
        write_pack(path, random_weights(Manifest(**given), geometry, seed=seed, strength=0.3))
        return path

    return make


@pytest.fixture(scope="module")
def engine(smollm2: Path, make_pack: MakePack) -> Iterator[Engine]:
    """An engine with the packs p0 to p7."""
    # Whole prompts every time, so that alone and together differ in nothing else.
    options = EngineOptions(prefix_cache="off")
    with Engine.load(smollm2, n_ctx=1024, pack_budget="256MB", options=options) as engine:
        for seed in range(N_PACKS):
            engine.packs.load(str(make_pack(f"p{seed}", seed=seed)))
        yield engine


def answer(engine: Engine, packs: Packs = None, **options: Any) -> Result:
    arguments = {"max_tokens": 16, "temperature": 0, "logprobs": 2, "ignore_eos": True, **options}
    return engine.submit(PROMPT, packs=packs, **arguments).result(WAIT_S)


def changed_by(packs: Packs, engine: Engine) -> FloatArray:
    """What packs do to the log-probabilities of a text."""
    text = PREFIX[:200]
    change: FloatArray = engine.score(text, packs=packs).logprobs - engine.score(text).logprobs
    return change


def test_a_batch_with_eight_packs_gives_what_each_request_gives_alone(engine: Engine) -> None:
    names = [f"p{i}" for i in range(N_PACKS)]
    alone = [answer(engine, name or None) for name in ("", *names)]
    n_steps = engine.stats["n_steps"]
    arguments: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
    running = [engine.submit(PROMPT, packs=name or None, **arguments) for name in ("", *names)]
    together = [generation.result(WAIT_S) for generation in running]
    assert engine.stats["n_steps"] - n_steps < 3 * 16  # one by one they take nine times sixteen
    for one, other in zip(alone, together, strict=True):
        assert_same_tokens(other.token_ids, one, GAP)
        assert other.packs == one.packs
    assert [used.id for result in together for used in result.packs] == names
    assert len({result.text for result in together}) > N_PACKS // 2


def test_a_request_that_streams_ends_on_what_it_began_with(
    engine: Engine, make_pack: MakePack
) -> None:
    old = engine.packs.swap("live", str(make_pack("p0", seed=0))).digest
    arguments: dict[str, Any] = {"max_tokens": 96, "temperature": 0, "ignore_eos": True}
    running = engine.submit(PROMPT, packs="live", **arguments)
    pieces = iter(running)
    text = next(pieces).text
    new = engine.packs.swap("live", str(make_pack("p1", seed=1))).digest
    assert not running.finished()
    assert answer(engine, "live").packs[0].digest == new != old
    text += "".join(piece.text for piece in pieces)
    result = running.result()
    assert (result.packs[0].digest, result.text) == (old, text)
    assert result.text != answer(engine, "live", max_tokens=96).text
    assert_same_tokens(result.token_ids, answer(engine, "p0", max_tokens=96), GAP)


@pytest.mark.parametrize("experts", ["q8_0", "q4_k", "q4_0"])
def test_rounded_experts_do_about_what_exact_ones_do(
    experts: ExpertType, engine: Engine, make_pack: MakePack
) -> None:
    names: dict[ExpertType, str] = {"f16": "exact", experts: f"rounded_{experts}"}
    for kind, name in names.items():
        engine.packs.load(str(make_pack(name, seed=100, experts=kind, n_sites=2)))
    exact, rounded, other = (changed_by(name, engine) for name in (*names.values(), "p1"))
    assert np.linalg.norm(exact) > 0.1
    # The base takes inputs as 8-bit integers, so any change moves later ones: 0.2 to 0.3 is seen
    # for all types. Another pack is as far away as no pack at all, or farther.
    assert np.linalg.norm(rounded - exact) < 0.5 * np.linalg.norm(exact)
    assert np.linalg.norm(other - exact) > np.linalg.norm(exact)


def test_a_weight_of_zero_is_the_base(engine: Engine) -> None:
    nothing = PackRequest(packs=(PackUse("p0", 0.0),), fallback="never")
    assert not changed_by(nothing, engine).any()
    assert answer(engine, nothing).token_ids == answer(engine).token_ids
    assert changed_by("p0", engine).any()


def test_switching_packs_behind_a_prefix(smollm2: Path, make_pack: MakePack) -> None:
    with Engine.load(smollm2, n_ctx=2048, pack_budget="64MB") as engine:
        for seed in range(2):
            engine.packs.load(str(make_pack(f"p{seed}", seed=seed)))
        n_prefix = len(engine.tokenizer.encode(PREFIX))

        def run(packs: Packs) -> tuple[Result, int, int]:
            before = engine.stats
            result = engine.generate(PREFIX + PROMPT, packs=packs, max_tokens=4, temperature=0)
            after = engine.stats
            n_lower, n_upper = (after[key] - before[key] for key in ("n_rows", "n_mid_rows"))
            return result, n_lower, n_upper

        base, n_lower, n_upper = run(None)
        n_prompt = base.usage.prompt_tokens
        assert n_prompt > n_prefix > 950
        assert (base.usage.cached_tokens, base.usage.cached_lower_tokens) == (0, 0)
        assert n_lower >= n_prompt and n_upper == 0
        for name in ("p0", "p1"):
            switched, n_lower, n_upper = run(name)
            # The last row is always computed; of the others only the layers above the first site.
            assert switched.usage.cached_lower_tokens == n_prompt - 1
            assert switched.usage.cached_tokens == 0
            assert n_lower <= 4 and n_upper == n_prompt - 1
        again, n_lower, n_upper = run("p0")
        assert again.usage.cached_tokens == again.usage.cached_lower_tokens == n_prompt - 1
        assert n_lower <= 4 and n_upper == 0
        from_here, n_lower, n_upper = run(
            PackRequest(packs=(PackUse("p1"),), activation="from_here", fallback="never")
        )
        assert from_here.usage.cached_tokens == n_prompt - 1  # the base's, whatever the pack
        assert n_lower <= 4 and n_upper == 0


def test_a_pack_from_an_archive(
    smollm2: Path, make_pack: MakePack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "home"))
    name, archive = "医疗问答包", tmp_path / "医疗问答包-1.2.0.mbpack"
    gguf = make_pack("medical_qa", seed=7, n_sites=2, name=name, version="1.2.0")
    write_archive(archive, gguf, f"# {name}\n")
    (installed,) = install([str(archive)])
    assert (installed.manifest.id, installed.manifest.name) == ("medical_qa", name)
    with Engine.load(smollm2, n_ctx=256, pack_budget="64MB") as engine:
        result = answer(engine, "medical_qa@1.2.0")
        (used,) = result.packs
        assert (used.id, used.version, used.weight) == ("medical_qa", "1.2.0", 1.0)
        assert used.digest == f"sha256:{installed.record.sha256}"
        assert changed_by("medical_qa@1.2.0", engine).any()
        known = engine.packs.known("medical_qa")
        assert known is not None and known.manifest.name == name
