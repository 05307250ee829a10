"""A fresh process: the time until it has written its first token, and its peak memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import Case, CaseResult, Measure
from benchmarks.machine import Machine
from benchmarks.models import read_geometry
from benchmarks.ours import FIRST_TOKEN_PROGRAM
from benchmarks.paths import ROOT
from benchmarks.peers.process import time_first_output
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite

PROMPT = "The capital of France is"
N_CTX = 4096
N_GEN = 16  # the process must still live when its memory is read, after the first token
MIB = 1 << 20
TARGET = 1.0
MOST_ABOVE = 0.10  # of weights + KV


def peer_command(settings: Settings, model: Path, options: Sequence[str]) -> list[str]:
    """Returns the command line that prints a completion of the prompt and nothing else."""
    command = [str(settings.peer.tools / "llama-completion"), "-m", str(model)]
    command += ["-t", str(settings.n_threads), "-c", str(N_CTX), "-n", str(N_GEN), "-p", PROMPT]
    return [*command, "-no-cnv", "--no-display-prompt", "--temp", "0", "--ignore-eos", *options]


def our_command(settings: Settings, model: Path, dtype: str) -> list[str]:
    """Returns the command line of a Python process that does the same with ModularBase."""
    arguments = [str(model), dtype, str(settings.n_threads), str(N_CTX), PROMPT, str(N_GEN)]
    return [sys.executable, "-c", FIRST_TOKEN_PROGRAM, *arguments]


def _seconds(command: list[str]) -> float:
    return time_first_output(command, ROOT).seconds


def _peak_mib(command: list[str]) -> float:
    return time_first_output(command, ROOT).peak_rss_bytes / MIB


def cases(settings: Settings) -> Iterator[Case]:
    """Yields time and peak memory for the F16 and the shipped file."""
    options = {"default": [], "no warm-up": ["--no-warmup"], "no fa": ["--no-warmup", "-fa", "off"]}
    files = {"F16": settings.models.f16, "shipped": settings.models.shipped}
    for file, model in files.items():
        peers = {label: peer_command(settings, model, extra) for label, extra in options.items()}
        dtypes = ("keep", "auto") if file == "F16" else ("keep",)
        commands = {dtype: our_command(settings, model, dtype) for dtype in dtypes}
        for name, unit, measure, target in (
            ("load to first token", "s", _seconds, TARGET),
            ("peak memory", "MiB", _peak_mib, None),
        ):
            baseline: dict[str, Measure] = {k: partial(measure, c) for k, c in peers.items()}
            contenders: dict[str, Measure] = {k: partial(measure, c) for k, c in commands.items()}
            yield Case(
                name=f"{name} {file}",
                unit=unit,
                better="lower",
                baseline=baseline,
                contenders=contenders,
                targets={"keep": target} if target else {},
                facts={"file": file},
            )


def tables(settings: Settings, results: Sequence[CaseResult], machine: Machine) -> list[Table]:
    """Adds the peak memory above the weights and the KV cache."""
    sizes = {
        "F16": read_geometry(settings.models.f16),
        "shipped": read_geometry(settings.models.shipped),
    }
    rows = []
    for result in results:
        if result.unit != "MiB":
            continue
        geometry = sizes[str(result.facts["file"])]
        needed = (geometry.weight_bytes + geometry.kv_bytes(N_CTX)) / MIB
        peaks = {f"peer ({k})": spread.median for k, spread in result.baseline.items()}
        peaks |= {f"ours ({k})": c.value.median for k, c in result.contenders.items()}
        for side, peak in peaks.items():
            above = (peak - needed) / needed
            verdict = "met" if above <= MOST_ABOVE else "missed"
            sizes_mib = [f"{needed:.0f}", f"{peak:.0f}", f"{above:+.0%}"]
            last = verdict if side.startswith("ours") else ""
            rows.append([str(result.facts["file"]), side, *sizes_mib, last])
    header = ["file", "side", "weights + KV MiB", "peak MiB", "above", "<= 10 %"]
    return [Table(f"Peak memory above weights and KV ({N_CTX} tokens, F16)", header, rows)]


SUITE = Suite("load", "process start to first token, peak memory", cases, tables)
