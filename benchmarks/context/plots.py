"""The tables as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.context.fidelity import FidelityRow
from benchmarks.context.metrics import Estimate

_LOWEST_KL = 1e-6  # of the logarithmic axis


def draw_fidelity(rows: Sequence[FidelityRow], path: Path) -> None:
    """Bytes against divergence; one line for each method that comes in several sizes."""
    figure, axes = _figure()
    for family in dict.fromkeys(_family(row.system) for row in rows):
        members = sorted(
            (row for row in rows if _family(row.system) == family),
            key=lambda row: row.bytes_per_token,
        )
        kl = [_positive(row.fidelity.kl) for row in members]
        spread = [[e.value - e.low for e in kl], [e.high - e.value for e in kl]]
        sizes = [row.bytes_per_token / 1024 for row in members]
        axes.errorbar(sizes, [e.value for e in kl], spread, marker="o", capsize=3, label=family)
    axes.set(
        yscale="log",
        xlabel="KiB a token of the context",
        ylabel="KL to F16, nats a token (mean, 95 % interval)",
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    _save(figure, axes, path)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, format="png", dpi=120)
    unfinished.replace(path)


def _family(system: str) -> str:
    """The name without the size."""
    return re.sub(r", [\d.]+x$", "", system)


def _positive(kl: Estimate) -> Estimate:
    return Estimate(*(max(value, _LOWEST_KL) for value in (kl.value, kl.low, kl.high)))
