"""What packs cost while decoding: one beside the plain base, eight beside one; their memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks import ours
from benchmarks.harness import Case, CaseResult
from benchmarks.machine import Machine
from benchmarks.models import read_geometry
from benchmarks.pack_files import bytes_read_per_token, load_packs, pack_file
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite
from modularbase import Engine
from modularbase.types import Packs

N_PROMPT = 64
N_GEN = 64
N_SEQUENCES = 8
OVERHEAD = 1.08  # of the time that the extra bytes predict
MANY_TARGET = 0.92


class PackDecoding:
    """Decode rates of an engine with packs, over fresh prompts."""

    def __init__(self, engine: Engine) -> None:
        """Measures `engine`."""
        self._engine = engine
        self._seeds = itertools.count(1)

    def rate(self, packs: Sequence[Packs]) -> float:
        """Returns tokens per second of as many requests as there are entries, prompts cached."""
        prompts = [ours.random_tokens(N_PROMPT, next(self._seeds)) for _ in packs]
        for n_gen in (1, N_GEN + 1):
            handles = [
                self._engine.submit(
                    prompt, packs=pack, max_tokens=n_gen, temperature=0, ignore_eos=True
                )
                for prompt, pack in zip(prompts, packs, strict=True)
            ]
            results = [handle.result() for handle in handles]
        spans = []
        for result in results:
            first_s = result.timings.ttft_ms / 1e3
            spans.append(ours.Span(first_s, first_s + result.timings.decode_ms / 1e3, N_GEN))
        return ours.aggregate_decode_tps(spans)


def _decode_case(engine: Engine, file: str, model: Path, size: str) -> Case:
    name = load_packs(engine, 1, size)[0]
    decoding = PackDecoding(engine)
    extra = bytes_read_per_token(engine.info["n_embd"], size)
    predicted = 1 + extra / read_geometry(model).weight_bytes
    return Case(
        name=f"{file}, one INT4 pack {size} beside the base alone",
        unit="tokens/s",
        baseline={"base": partial(decoding.rate, [None])},
        contenders={"pack": partial(decoding.rate, [name])},
        targets={"pack": 1 / (predicted * OVERHEAD)},
        facts={"predicted time ratio": predicted},
    )


def _batch_case(engine: Engine, file: str) -> Case:
    names = load_packs(engine, N_SEQUENCES)
    decoding = PackDecoding(engine)
    return Case(
        name=f"{file}, 8 sequences: 8 packs S beside one",
        unit="tokens/s",
        baseline={"one pack": partial(decoding.rate, [names[0]] * N_SEQUENCES)},
        contenders={
            "8 packs": partial(decoding.rate, list(names)),
            "no pack": partial(decoding.rate, [None] * N_SEQUENCES),
        },
        targets={"8 packs": MANY_TARGET},
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Yields one pack of each size, and eight at once, on the F16 file."""
    model = settings.models.f16
    dtypes: dict[str, Literal["keep", "auto"]] = {"F16": "keep", "F16 as BF16": "auto"}
    for file, dtype in dtypes.items():
        engine = Engine.load(model, dtype=dtype, n_threads=settings.n_threads, pack_budget="1GB")
        with closing(engine):
            for size in ("S", "M"):
                yield _decode_case(engine, file, model, size)
            yield _batch_case(engine, file)


def tables(settings: Settings, _results: Sequence[CaseResult], _machine: Machine) -> list[Table]:
    """Adds the resident bytes of a pack by the type of its experts."""
    rows = []
    with closing(Engine.load(settings.models.f16, pack_budget="1GB")) as engine:
        for size in ("S", "M"):
            n_bytes = {}
            for experts in ("f16", "q8_0", "q4_0"):
                _, path = pack_file(engine, 0, size, experts)
                n_bytes[experts] = engine.packs.load(str(path)).n_bytes
            for experts, target in (("q8_0", 0.60), ("q4_0", 0.35)):
                ratio = n_bytes[experts] / n_bytes["f16"]
                rows.append(
                    [size, experts, f"{n_bytes[experts] / 1e6:.1f}", f"{ratio:.3f}", f"{target}"]
                )
    header = ["geometry", "experts", "MB resident", "of F16 experts", "target at most"]
    return [Table("Memory of a pack", header, rows)]


SUITE = Suite("packs_speed", "Packs while decoding", cases, tables)
