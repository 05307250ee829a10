"""`modularbase bench`: this machine's speed with a base."""

from __future__ import annotations

import random
import statistics
from typing import Annotated

import typer

from modularbase.cli import options as o
from modularbase.cli.console import DEFAULT_BASE, Base, Json, err, out, print_json
from modularbase.engine import Engine


def bench(
    base: Base = DEFAULT_BASE,
    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", help="Prompt tokens.")] = 512,
    n_gen: Annotated[int, typer.Option("--n-gen", "-n", help="Generated tokens.")] = 128,
    n_parallel: Annotated[int, typer.Option("--parallel", min=1, help="Requests at once.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", "-r", min=1, help="Counted rounds.")] = 5,
    dtype: o.DType = "auto",
    threads: o.Threads = None,
    n_ctx: o.Context = None,
    device: o.Device = "auto",
    as_json: Json = False,
) -> None:
    """Measures prompt and generation speed on random tokens (medians over the rounds)."""
    with o.load(base, dtype, threads, n_ctx, device) as engine:
        info = engine.info
        _round(engine, n_prompt, n_gen, n_parallel, seed=0)
        samples = []
        for i in range(rounds):
            err.print(f"[dim]round {i + 1} of {rounds}[/]")
            samples.append(_round(engine, n_prompt, n_gen, n_parallel, seed=i + 1))
    figures = {name: statistics.median(s[name] for s in samples) for name in samples[0]}
    if as_json:
        print_json({"base": info["path"], "figures": figures, "rounds": samples})
    else:
        for name, value in figures.items():
            out.print(f"{name:14} {value:10.1f}")


def _round(
    engine: Engine, n_prompt: int, n_gen: int, n_parallel: int, seed: int
) -> dict[str, float]:
    """One round; the prompts are new every time, so that nothing comes from the prefix cache."""
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(engine.info["n_vocab"]) for _ in range(n_prompt)] for _ in range(n_parallel)
    ]
    generations = [
        engine.submit(prompt, max_tokens=n_gen, temperature=0, ignore_eos=True)
        for prompt in prompts
    ]
    timings = [generation.result().timings for generation in generations]
    total_ms = max(t.queue_ms + t.prefill_ms + t.decode_ms for t in timings)
    return {
        "prefill_tps": statistics.median(t.prefill_tps for t in timings),
        "decode_tps": statistics.median(t.decode_tps for t in timings),
        "ttft_ms": statistics.median(t.ttft_ms for t in timings),
        "total_tps": 1e3 * n_parallel * (n_prompt + n_gen) / total_ms,
    }
