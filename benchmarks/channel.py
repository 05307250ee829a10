"""A pack from a trainer's process into the running engine: how soon, how quietly, how fast."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks import ours
from benchmarks.harness import Case
from benchmarks.pack_files import memcpy_us
from benchmarks.suite import Settings, Suite
from modularbase import Engine
from modularbase.attachment import Attachment
from modularbase.packs.manifest import ExpertType
from modularbase.packs.scaffold import default_sites
from modularbase.training.channel import WeightChannelReader

ALLOWED_MS = 100.0
GAP_TARGET = 1 / 2
COPY_TARGET = 0.5
NAME = "trained"
N_PUBLISHES = 100
N_DECODING = 4
N_COPIES = 16


class Publisher:
    """The trainer's process."""

    def __init__(self, engine: Engine, experts: ExpertType) -> None:
        """Starts it and waits until its channel is there."""
        self.channel = f"bench-{os.getpid()}-{experts}"
        info = engine.info
        sites = map(str, default_sites(info["n_layer"]))
        command = [sys.executable, "-m", "benchmarks.channel_publisher", self.channel, experts]
        self._process = subprocess.Popen(
            [*command, str(info["n_embd"]), *sites],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._answer() != "ready":
            raise ours.MeasurementError("the publishing process did not start")

    def publish(self) -> tuple[float, int]:
        """Returns when the publish began, and its generation."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        begin, generation = self._answer().split()
        return float(begin), int(generation)

    def close(self) -> None:
        """Ends the process; its segment goes with it."""
        self._process.communicate(timeout=60)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def _attached(
    settings: Settings, experts: ExpertType
) -> Iterator[tuple[Engine, Publisher, Attachment]]:
    with (
        closing(
            Engine.load(settings.models.f16, n_threads=settings.n_threads, pack_budget="256MB")
        ) as engine,
        closing(Publisher(engine, experts)) as publisher,
    ):
        attachment = engine.attach(NAME, channel=publisher.channel)
        attachment.wait(publisher.publish()[1], 60)
        yield engine, publisher, attachment


def _first_token_ms(engine: Engine, publisher: Publisher, attachment: Attachment) -> float:
    """Returns the median time from the beginning of a publish to a token made with it."""
    times = []
    for seed in range(10):
        begin, generation = publisher.publish()
        attachment.wait(generation, 60)
        prompt = ours.random_tokens(16, seed)
        result = engine.generate(prompt, packs=NAME, max_tokens=1, temperature=0, ignore_eos=True)
        times.append(1e3 * (time.monotonic() - begin))
        if result.packs[0].version != f"0.0.{generation}":
            raise ours.MeasurementError(f"generation {generation}: found {result.packs}")
    return statistics.median(times)


def _gaps_ms(engine: Engine, stop: threading.Event) -> list[float]:
    """Returns the times between the tokens of several requests that decode together."""

    def consume(seed: int) -> list[float]:
        prompt = ours.random_tokens(64, seed)
        generation = engine.submit(prompt, packs=NAME, temperature=0, ignore_eos=True)
        times = []
        for piece in generation:
            times += [time.perf_counter()] * len(piece.token_ids)
            if stop.is_set():
                generation.cancel()
                break
        return [1e3 * (b - a) for a, b in itertools.pairwise(times) if b > a]

    with ThreadPoolExecutor(N_DECODING) as pool:
        return [gap for gaps in pool.map(consume, range(N_DECODING)) for gap in gaps[1:]]


def _gaps_while_ms(engine: Engine, publisher: Publisher, attachment: Attachment) -> list[float]:
    """Returns the gaps while generation after generation is published and taken in."""
    stop = threading.Event()

    def publish() -> None:
        try:
            for _ in range(N_PUBLISHES):
                attachment.wait(publisher.publish()[1], 60)
        finally:
            stop.set()

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        return _gaps_ms(engine, stop)
    finally:
        thread.join()


def _quiet_gaps_ms(engine: Engine, seconds: float = 5.0) -> list[float]:
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    return _gaps_ms(engine, stop)


def _copy_us(reader: WeightChannelReader, into: NDArray[np.uint8]) -> float:
    """Returns the median time of copying a generation out of the segment, into the same memory."""
    times = []
    for _ in range(N_COPIES):
        start = time.perf_counter()
        reader._core.read(into, False)
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def _soon_case(settings: Settings, experts: ExpertType) -> Iterator[Case]:
    with _attached(settings, experts) as (engine, publisher, attachment):
        yield Case(
            name=f"publish of a pack S, {experts} experts, to a token made with it",
            unit="ms",
            baseline={"allowed": lambda: ALLOWED_MS},
            contenders={"measured": partial(_first_token_ms, engine, publisher, attachment)},
            better="lower",
            targets={"measured": 1.0} if experts == "f16" else {},
        )


def _gap_case(settings: Settings) -> Iterator[Case]:
    with _attached(settings, "f16") as (engine, publisher, attachment):
        yield Case(
            name=f"longest gap between two tokens of {N_DECODING} requests",
            unit="ms",
            baseline={"median gap": lambda: statistics.median(_quiet_gaps_ms(engine))},
            contenders={
                f"{N_PUBLISHES} publishes": lambda: max(
                    _gaps_while_ms(engine, publisher, attachment)
                ),
                "quiet": lambda: max(_quiet_gaps_ms(engine)),
            },
            better="lower",
            targets={f"{N_PUBLISHES} publishes": GAP_TARGET},
        )


def _copy_case(settings: Settings) -> Iterator[Case]:
    with _attached(settings, "f16") as (_, publisher, __):
        reader = WeightChannelReader(publisher.channel)
        into = np.zeros(reader._core.payload_bytes, np.uint8)
        yield Case(
            name="copy of a pack S out of the segment",
            unit="us",
            baseline={"memcpy of its bytes": partial(memcpy_us, into.nbytes, 4)},
            contenders={"read": partial(_copy_us, reader, into)},
            better="lower",
            targets={"read": COPY_TARGET},
        )


def cases(settings: Settings) -> Iterator[Case]:
    """Yields how soon a pack is there, the gaps it makes, and the copy alone."""
    for experts in ("f16", "q4_0", "q4_k"):
        yield from _soon_case(settings, experts)
    yield from _gap_case(settings)
    yield from _copy_case(settings)


SUITE = Suite("channel", "Packs from a trainer's process", cases)
