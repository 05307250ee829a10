"""llama.cpp's own benchmark programs: their command lines, and how their output is read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.process import PeerRunError, run

FLASH_ATTENTION = ("on", "off")


@dataclass(frozen=True)
class LlamaCpp:
    """The tools of a llama.cpp build, run with a fixed number of threads."""

    tools: Path
    n_threads: int

    def decode_tps(
        self, model: Path, n_gen: int, depth: int, n_repeats: int, options: Mapping[str, str]
    ) -> float:
        """Returns the tokens per second of batch-1 decode behind `depth` tokens."""
        sizes = {"-p": "0", "-n": str(n_gen), "-d": str(depth), "-r": str(n_repeats)}
        return parse_bench(self._bench(model, sizes, options), n_prompt=0, n_gen=n_gen)

    def prefill_tps(
        self, model: Path, n_prompt: int, n_repeats: int, options: Mapping[str, str]
    ) -> float:
        """Returns the tokens per second of a prompt of `n_prompt` tokens."""
        sizes = {"-p": str(n_prompt), "-n": "0", "-d": "0", "-r": str(n_repeats)}
        return parse_bench(self._bench(model, sizes, options), n_prompt=n_prompt, n_gen=0)

    def _bench(self, model: Path, sizes: Mapping[str, str], options: Mapping[str, str]) -> str:
        command = [str(self.tools / "llama-bench"), "-m", str(model), "-t", str(self.n_threads)]
        for name, value in {**sizes, **options, "-o": "json"}.items():
            command += [name, value]
        return run(command)

    def batched(
        self,
        model: Path,
        n_sequences: int,
        n_prompt: int,
        n_gen: int,
        options: Mapping[str, str],
    ) -> BatchedRates:
        """Decodes `n_sequences` sequences at once, each with its own prompt."""
        n_ctx = n_sequences * (n_prompt + n_gen)
        command = [str(self.tools / "llama-batched-bench"), "-m", str(model)]
        command += ["-t", str(self.n_threads), "-tb", str(self.n_threads), "-c", str(n_ctx)]
        command += ["-b", "2048", "-ub", "512", "-npp", str(n_prompt), "-ntg", str(n_gen)]
        command += ["-npl", str(n_sequences), "--output-format", "jsonl"]
        for name, value in options.items():
            command += [name, value] if value else [name]
        return parse_batched(run(command), n_sequences)


@dataclass(frozen=True)
class BatchedRates:
    """Aggregate rates of a batched run, in tokens per second."""

    prefill_tps: float
    decode_tps: float
    generated_per_s: float  # generated tokens over the whole time, the prompts' included


def parse_bench(text: str, *, n_prompt: int, n_gen: int) -> float:
    """Returns the median rate of the test with these sizes from llama-bench's JSON.

    Raises:
        PeerRunError: The output is not what llama-bench prints, or has no such test.
    """
    try:
        for test in json.loads(text):
            if (test["n_prompt"], test["n_gen"]) == (n_prompt, n_gen):
                return statistics.median(float(value) for value in test["samples_ts"])
    except (ValueError, KeyError, TypeError) as error:
        raise PeerRunError(f"llama-bench: unexpected output: {text[:200]!r}") from error
    raise PeerRunError(f"llama-bench: no test with n_prompt={n_prompt}, n_gen={n_gen}")


def parse_batched(text: str, n_sequences: int) -> BatchedRates:
    """Returns the rates of `n_sequences` sequences from llama-batched-bench's JSON lines.

    Raises:
        PeerRunError: The output has no such line.
    """
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        test = json.loads(line)
        if test.get("pl") == n_sequences:
            n_generated = test["pl"] * test["tg"]
            return BatchedRates(test["speed_pp"], test["speed_tg"], n_generated / test["t"])
    raise PeerRunError(f"llama-batched-bench: no line with pl={n_sequences}: {text[:200]!r}")
