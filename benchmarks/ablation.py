"""What each of our own mechanisms gives: everything on, against one of them switched off."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from benchmarks import ours
from benchmarks.decode_batch import Batch
from benchmarks.harness import Case, Measure
from benchmarks.suite import Settings, Suite

N_GEN = 64
N_REPEATS = 3
N_CTX = 8192
DEEP = 4096
VARIANTS: dict[str, dict[str, str]] = {
    "everything on": {},
    "attention=reference": {"attention": "reference"},
    "linear=reference": {"linear": "reference"},
    "head=full": {"head": "full"},
}


def _decode(session: ours.Session, depth: int) -> float:
    prompt = ours.random_tokens(max(depth, 1), seed=depth)
    return statistics.median(session.decode_tps(prompt, N_GEN) for _ in range(N_REPEATS))


def _prefill(session: ours.Session, seeds: Iterator[int]) -> float:
    prompts = (ours.random_tokens(512, next(seeds)) for _ in range(N_REPEATS))
    return statistics.median(session.prefill_tps(prompt) for prompt in prompts)


def _batch(session: ours.Session) -> float:
    return Batch(session).decode_tps()


def cases(settings: Settings) -> Iterator[Case]:
    """Yields one case a workload and mechanism; the ratio is what the mechanism gives."""
    deep = 1024 if settings.quick else DEEP
    seeds = itertools.count(10_000)  # apart from the batches' prompts
    workloads: dict[str, tuple[Callable[[ours.Session], float], tuple[str, ...]]] = {
        "decode depth 0": (partial(_decode, depth=0), ("head=full", "linear=reference")),
        f"decode depth {deep}": (partial(_decode, depth=deep), ("attention=reference",)),
        "8 sequences": (_batch, ("head=full", "linear=reference", "attention=reference")),
        "prefill 512": (
            partial(_prefill, seeds=seeds),
            ("linear=reference", "attention=reference"),
        ),
    }
    for file, model in {"F16": settings.models.f16, "BF16": settings.models.bf16}.items():
        with ExitStack() as stack:
            sessions = {
                label: stack.enter_context(
                    ours.session(model, "keep", settings.n_threads, N_CTX, **options)
                )
                for label, options in VARIANTS.items()
            }
            for workload, (measure, switched_off) in workloads.items():
                for variant in switched_off:
                    baseline: dict[str, Measure] = {variant: partial(measure, sessions[variant])}
                    contenders: dict[str, Measure] = {
                        "everything on": partial(measure, sessions["everything on"])
                    }
                    name = f"{workload} {file}, {variant}"
                    yield Case(name, "tokens/s", baseline, contenders)


SUITE = Suite("ablation", "what each mechanism gives", cases)
