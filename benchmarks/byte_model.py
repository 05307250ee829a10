"""Bytes a token must read, against the measured memory bandwidth: how far a rate is from the limit.

A decode step reads every weight once and the K and V rows of the whole context. At the measured
bandwidth that takes a time no implementation can beat that reads the same bytes. A share above
100 % means that fewer bytes were read (a screened output head, speculation) or that some of them
stayed in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness import CaseResult
from benchmarks.machine import Machine
from benchmarks.models import Geometry
from benchmarks.report import Table


@dataclass(frozen=True)
class Rate:
    """A measured decode rate and what it was measured on."""

    file: str
    depth: int  # tokens in the context, midway through the measurement
    label: str
    tokens_per_s: float


def bytes_per_token(geometry: Geometry, depth: int, n_rows: int = 1) -> float:
    """Returns the bytes one generated token reads, weights shared by `n_rows` sequences."""
    return geometry.weight_bytes / n_rows + geometry.kv_bytes(depth)


def limit_tps(geometry: Geometry, depth: int, bandwidth: float, n_rows: int = 1) -> float:
    """Returns the tokens per second at which the memory bandwidth is used up."""
    return bandwidth / bytes_per_token(geometry, depth, n_rows)


def collect_rates(results: Sequence[CaseResult], n_gen: int) -> list[Rate]:
    """Returns the rates of both sides from the cases that name a file and a depth."""
    rates: list[Rate] = []
    for result in results:
        file, depth = str(result.facts["file"]), int(result.facts["depth"]) + n_gen // 2
        if result.best_option:
            peer = result.baseline[result.best_option]
            rates.append(Rate(file, depth, f"peer ({result.best_option})", peer.median))
        for label, compared in result.contenders.items():
            rates.append(Rate(file, depth, f"ours ({label})", compared.value.median))
    return rates


def share_table(rates: Sequence[Rate], sizes: dict[str, Geometry], machine: Machine) -> Table:
    """Returns bytes per token, achieved rate and share of the memory limit."""
    bandwidth = machine.bandwidth_bytes_per_s
    rows = []
    for rate in rates:
        geometry = sizes[rate.file]
        n_bytes = bytes_per_token(geometry, rate.depth)
        rows.append(
            [
                f"{rate.file} depth {rate.depth}",
                rate.label,
                f"{geometry.weight_bytes / 1e6:.1f}",
                f"{geometry.kv_bytes(rate.depth) / 1e6:.1f}",
                f"{rate.tokens_per_s:.1f}",
                f"{limit_tps(geometry, rate.depth, bandwidth):.1f}",
                f"{n_bytes * rate.tokens_per_s / bandwidth:.0%}",
            ]
        )
    header = ["case", "side", "weights MB", "KV MB", "tokens/s", "limit tokens/s", "share"]
    title = f"Share of the memory limit ({bandwidth / 1e9:.1f} GB/s measured)"
    return Table(title, header, rows)


def depth_table(rates: Sequence[Rate]) -> Table:
    """Returns the time of a token against the depth, and what 1,000 tokens of context add."""
    shallow: dict[tuple[str, str], Rate] = {}
    rows = []
    for rate in rates:
        side = rate.label.split(" (")[0] if rate.label.startswith("peer") else rate.label
        first = shallow.setdefault((rate.file, side), rate)
        token_ms = 1e3 / rate.tokens_per_s
        added = "-"
        if rate.depth > first.depth:
            growth_ms = token_ms - 1e3 / first.tokens_per_s
            added = f"{growth_ms / (rate.depth - first.depth) * 1e3:.2f}"
        rows.append([f"{rate.file} depth {rate.depth}", rate.label, f"{token_ms:.2f}", added])
    header = ["case", "side", "ms per token", "ms added per 1,000 tokens of depth"]
    return Table("Decode cost against depth", header, rows)
