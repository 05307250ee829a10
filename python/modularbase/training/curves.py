"""A run's figures as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modularbase.storage.files import appearing


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws losses, and what the pack does to neutral text, over steps.

    Args:
        rows: Lines of metrics.jsonl.
        path: The PNG; replaced all at once.

    Raises:
        InstallError: It cannot be written.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, neutral = figure.subplots(1, 2)
    loss.set(title="domain", xlabel="step", ylabel="nats a token")
    neutral.set(title="neutral text: KL to the base", xlabel="step", ylabel="nats a token")
    for kind, style in (("train", {"alpha": 0.5}), ("heldout", {"marker": "o"})):
        for axes, name in ((loss, "loss"), (neutral, "neutral_kl")):
            found = [
                (row["step"], row[name]) for row in rows if row["kind"] == kind and name in row
            ]
            if found:
                axes.plot(*zip(*found, strict=True), label=kind, **style)
    for axes in (loss, neutral):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with appearing(path) as part:
        figure.savefig(part, format="png", dpi=120)
