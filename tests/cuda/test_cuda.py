"""The CUDA path against the CPU's: `make test-cuda`, on a machine with a GPU and nvcc."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularbase import Engine, EngineOptions, PackRequest, PackUse
from modularbase.errors import InvalidRequestError
from modularbase.types import Packs
from tests.conftest import TinyModelFactory
from tests.tools.engine_packs import answer, pack_file, tokens
from tests.tools.tiny_requests import ids

# F32 weights: only the order of sums and the F16 keys and values differ. F16 weights: cuBLAS rounds
# the inputs to F16 (11 bits), the CPU does not. Quantised experts: both sides round inputs to
# 8 bits, in blocks of their own. A wrong product costs some 0.1 and more.
TOLERANCE = {"f32": 4e-3, "f16": 2e-2, "q8_0": 3e-2, "q4_0": 3e-2, "q4_k": 3e-2}
BUDGET = 64 << 20
PROMPT = ids(40, seed=1)


def load(path: Path, device: Any) -> Engine:
    options = EngineOptions(pack_budget_bytes=BUDGET)
    return Engine.load(path, device=device, dtype="keep", n_threads=2, options=options)


@pytest.fixture
def both(pack_model: Path) -> Iterator[tuple[Engine, Engine]]:
    """An engine on the GPU and one on the CPU."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(load(pack_model, d)) for d in ("cuda", "cpu"))  # type: ignore[misc]


def scores(engines: tuple[Engine, Engine], packs: Packs = None) -> tuple[Any, Any]:
    found = [np.asarray(engine.score(PROMPT, packs=packs).logprobs) for engine in engines]
    return found[0], found[1]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3"])
def test_bases(tiny_model: TinyModelFactory, family: str, dtype: str) -> None:
    path = tiny_model(family, dtype=dtype).path
    with load(path, "cuda") as gpu, load(path, "cpu") as cpu:
        assert "CUDA" in str(gpu.info), gpu.info
        found, expected = scores((gpu, cpu))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("width", [256, 512])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q4_k"])
def test_a_pack(both: tuple[Engine, Engine], tmp_path: Path, kind: str, width: int) -> None:
    shape: dict[str, Any] = {"n_expert": 8, "n_expert_used": 2, "d_inner": width, "d_ff": width}
    path = pack_file(tmp_path, "code", expert_type=kind, token_gates=True, strength=0.05, **shape)
    for engine in both:
        engine.packs.load(str(path))
    plain, _ = scores(both)
    found, expected = scores(both, "code")
    assert np.abs(expected - plain).max() > 3 * TOLERANCE[kind], "the pack does too little"
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[kind])


def test_mixed_packs_and_a_batch(both: tuple[Engine, Engine], tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        path = pack_file(tmp_path, name, expert_type="q8_0", token_gates=True, strength=0.05)
        for engine in both:
            engine.packs.load(str(path))
    for packs in (["a", "b"], PackRequest(packs=(PackUse("a", 0.3), PackUse("c", 0.7)))):
        found, expected = scores(both, packs)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE["q8_0"])
    gpu = both[0]
    choices: list[Packs] = [None, "a", "b", ["a", "c"], "c", None, ["b", "c"], "a"]
    alone = [answer(gpu, packs).token_ids for packs in choices]
    running = [
        gpu.submit(ids(5), packs=p, max_tokens=16, temperature=0, ignore_eos=True) for p in choices
    ]
    together = [generation.result(300).token_ids for generation in running]
    # Products of other shapes round otherwise, so a tie may fall otherwise: most must be equal.
    assert sum(a == t for a, t in zip(alone, together, strict=True)) >= len(choices) - 2


def test_swaps_and_eviction(both: tuple[Engine, Engine], tmp_path: Path) -> None:
    gpu = both[0]
    first, second = (pack_file(tmp_path, f"code@{v}.0.0", strength=0.05) for v in (1, 2))
    gpu.packs.load(str(first))
    one = tokens(gpu, "code")
    gpu.packs.swap("code", str(second))
    two = tokens(gpu, "code")
    gpu.packs.evict("code")
    assert tokens(gpu, "code") == two != one
    gpu.packs.swap("code", str(first))
    assert tokens(gpu, "code") == one


def test_policies_that_only_the_cpu_has_are_named(
    both: tuple[Engine, Engine], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        both[0].packs.load(str(pack_file(tmp_path, name)))
    packs = PackRequest(packs=(PackUse("a"), PackUse("b")), policy="best", fallback="never")
    with pytest.raises(InvalidRequestError, match="policy"):
        both[0].generate(PROMPT, packs=packs, max_tokens=1)
