"""What it costs that packs come and go: loads, swaps while serving, more packs than the budget."""

from __future__ import annotations

import itertools
import shutil
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import ours
from benchmarks.harness import Case
from benchmarks.pack_files import load_packs, memcpy_us, pack_file
from benchmarks.paths import CACHE
from benchmarks.suite import Settings, Suite
from modularbase import Engine

LOAD_TARGET = 1 / 1.5
SWAP_TARGET = 1 / 2
ZIPF_TARGET = 0.8
N_PACKS = 200
N_RESIDENT = 8
N_REQUESTS = 200
N_CLIENTS = 8
N_DECODING = 4
SWAP_EVERY_S = 0.1


def _load_us(engine: Engine, names: Sequence[str]) -> float:
    """Returns the median time of copying a pack over the one that was in its slot."""
    times = []
    for name in list(names) * 8:
        engine.packs.pin(name)  # loads it; the budget holds one
        engine.packs.unpin(name)
        times.append(engine.packs.status(name).load_us)
    return statistics.median(times)


def _gaps_ms(engine: Engine, pack: str, n_tokens: int) -> list[float]:
    """Returns the times between the tokens of several requests that decode together."""

    def consume(seed: int) -> list[float]:
        prompt = ours.random_tokens(64, seed)
        generation = engine.submit(
            prompt, packs=pack, max_tokens=n_tokens, temperature=0, ignore_eos=True
        )
        times = []
        for piece in generation:
            times += [time.perf_counter()] * len(piece.token_ids)
        return [1e3 * (b - a) for a, b in itertools.pairwise(times) if b > a]

    with ThreadPoolExecutor(N_DECODING) as pool:
        return [gap for gaps in pool.map(consume, range(N_DECODING)) for gap in gaps[1:]]


def _longest_gap_ms(engine: Engine, pack: str, files: Sequence[Path]) -> float:
    """Returns the longest gap while the pack is swapped to and fro; without files it is not."""
    stop = threading.Event()

    def swap() -> None:
        for path in itertools.cycle(files):
            if stop.wait(SWAP_EVERY_S):
                return
            engine.packs.swap(pack, str(path))

    swapper = threading.Thread(target=swap)
    if files:
        swapper.start()
    try:
        return max(_gaps_ms(engine, pack, 160))
    finally:
        stop.set()
        if files:
            swapper.join()


def _median_gap_ms(engine: Engine, pack: str) -> float:
    return statistics.median(_gaps_ms(engine, pack, 160))


def _many_files(engine: Engine) -> list[Path]:
    """Returns files of packs that differ in their last weights only."""
    _, template = pack_file(engine, 0)
    folder = CACHE / "packs" / "many"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.gguf" for i in range(N_PACKS)]
    for i, path in enumerate(paths):
        if path.exists():
            continue
        part = path.with_suffix(".part")
        shutil.copyfile(template, part)
        with part.open("r+b") as file:
            file.seek(-1024, 2)
            file.write(np.random.default_rng(i).normal(0, 0.01, 64).astype(np.float16).tobytes())
        part.rename(path)
    return paths


def _requests_per_s(engine: Engine, seeds: Iterator[int]) -> float:
    """Returns the rate at which requests with Zipf-distributed packs finish; none may fail."""
    random = np.random.default_rng(next(seeds))
    weights = 1.0 / np.arange(1, N_PACKS + 1)
    chosen = random.choice(N_PACKS, N_REQUESTS, p=weights / weights.sum())

    def request(index: int) -> int:
        prompt = random_prompts[index]
        result = engine.generate(
            prompt, packs=f"p{chosen[index]}", max_tokens=16, temperature=0, ignore_eos=True
        )
        if len(result.packs) != 1:
            raise ours.MeasurementError(f"a request fell back: {result.fallbacks}")
        return len(result.token_ids)

    random_prompts = [random.integers(5, 40000, 16).tolist() for _ in range(N_REQUESTS)]
    start = time.perf_counter()
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        n_tokens = sum(pool.map(request, range(N_REQUESTS)))
    if n_tokens != 16 * N_REQUESTS:
        raise ours.MeasurementError(f"tokens: expected {16 * N_REQUESTS}, found {n_tokens}")
    return N_REQUESTS / (time.perf_counter() - start)


def _load_case(settings: Settings) -> Iterator[Case]:
    with closing(
        Engine.load(settings.models.f16, n_threads=settings.n_threads, pack_budget="13MB")
    ) as engine:
        names = load_packs(engine, N_RESIDENT)
        n_bytes = engine.packs.status(names[0]).n_bytes
        yield Case(
            name="load of a pack S from the page cache into a slot",
            unit="us",
            baseline={"memcpy of its bytes": partial(memcpy_us, n_bytes, N_RESIDENT)},
            contenders={"load": partial(_load_us, engine, names)},
            better="lower",
            targets={"load": LOAD_TARGET},
        )


def _swap_case(settings: Settings) -> Iterator[Case]:
    with closing(
        Engine.load(settings.models.f16, n_threads=settings.n_threads, pack_budget="256MB")
    ) as engine:
        name = load_packs(engine, 1)[0]
        files = [pack_file(engine, seed)[1] for seed in (1, 0)]
        yield Case(
            name="longest gap between two tokens of 4 requests",
            unit="ms",
            baseline={"median gap": partial(_median_gap_ms, engine, name)},
            contenders={
                "swapping": partial(_longest_gap_ms, engine, name, files),
                "quiet": partial(_longest_gap_ms, engine, name, []),
            },
            better="lower",
            targets={"swapping": SWAP_TARGET},
        )


def _zipf_case(settings: Settings) -> Iterator[Case]:
    def load(budget: str) -> Engine:
        return Engine.load(settings.models.f16, n_threads=settings.n_threads, pack_budget=budget)

    with closing(load("3GB")) as large, closing(load("100MB")) as small:
        for i, path in enumerate(_many_files(large)):
            for engine in (large, small):
                engine.packs.swap(f"p{i}", str(path))
        yield Case(
            name=f"{N_PACKS} packs, Zipf arrivals, budget for {N_RESIDENT}",
            unit="requests/s",
            baseline={"all resident": partial(_requests_per_s, large, itertools.count(1))},
            contenders={"budget for 8": partial(_requests_per_s, small, itertools.count(1))},
            targets={"budget for 8": ZIPF_TARGET},
        )


def cases(settings: Settings) -> Iterator[Case]:
    """Yields load, swap, and more packs than the budget."""
    yield from _load_case(settings)
    yield from _swap_case(settings)
    yield from _zipf_case(settings)


SUITE = Suite("packs_residency", "Packs that come and go", cases)
