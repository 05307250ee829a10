"""The terminal of `modularbase demo live`: the trainer's process beside the engine's."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from modularbase.cli.console import out
from modularbase.cli.live_engine import OtherUser
from modularbase.cli.live_view import LiveRow
from modularbase.training.lesson import Fact
from modularbase.training.trainer_process import TrainerProcess

_BARS = "▁▂▃▄▅▆▇█"
_N_BARS = 30
_N_ROWS = 12  # of answers that are shown, beside the base's
_HEIGHT = 22
_LEFT_COLUMNS = 34
_REFRESH_HZ = 4


class ScreenView:
    """Draws both processes four times a second."""

    def __init__(self, fact: Fact, trainer: TrainerProcess, other: OtherUser) -> None:
        """Takes what is drawn.

        Args:
            fact: Whose question is shown.
            trainer: For the left half.
            other: For the foot of the right half.
        """
        self._fact, self._trainer, self._other = fact, trainer, other
        self._rows: list[LiveRow] = []
        self._coming = ""  # the newest answer, as far as it has come

    def shown(self) -> AbstractContextManager[object]:
        """Draws until the block ends; what was drawn last stays."""
        return Live(get_renderable=self._draw, console=out, refresh_per_second=_REFRESH_HZ)

    def answering(self, text: str) -> None:
        """Shows it at the next refresh."""
        self._coming = text

    def answered(self, row: LiveRow) -> None:
        """Adds it to the table."""
        self._rows.append(row)
        self._coming = ""

    def _draw(self) -> RenderableType:
        halves = Table.grid(expand=True)
        halves.add_column(width=_LEFT_COLUMNS)
        halves.add_column(ratio=1)
        left = Panel(self._left(), title=f"trainer, process {self._trainer.pid}", height=_HEIGHT)
        right = Panel(self._right(), title=f"engine, process {os.getpid()}", height=_HEIGHT)
        halves.add_row(left, right)
        return halves

    def _left(self) -> RenderableType:
        reports = self._trainer.reports
        if not reports:
            return Text("loads PyTorch, and the base")
        newest = reports[-1]
        losses = [report.loss for report in reports if report.loss is not None]
        facts = Table.grid(padding=(0, 2))
        facts.add_row("step", f"{newest.step} of {newest.n_steps}")
        facts.add_row("speed", f"{newest.tokens_per_s:.0f} tokens/s")
        facts.add_row("published", f"{newest.generation} times")
        if losses:
            facts.add_row("loss", f"{losses[-1]:.2f}, at first {losses[0]:.2f}")
        line = (self._fact.question + self._fact.ending).strip()
        lesson = Text(f'\nteaches lines such as\n"{line}"', style="dim")
        return Group(facts, Text("\n" + sparkline(losses), style="cyan"), lesson)

    def _right(self) -> RenderableType:
        table = Table(box=None, expand=True)
        for title in ("gen", "right", "ppl"):
            table.add_column(title, justify="right")
        table.add_column("answer", no_wrap=True, overflow="ellipsis", ratio=1)
        for row in [*self._rows[:1], *self._rows[1:][-_N_ROWS:]]:
            share = f"{row.n_right}/{row.n_questions}"
            answer = Text(row.answer, style="green" if row.is_right else "red")
            table.add_row(str(row.generation), share, f"{row.perplexity:.1f}", answer)
        if self._coming:
            table.add_row("", "", "", Text(self._coming.strip()))
        question = Text(f"{self._fact.question} ...", style="bold")
        return Group(question, table, Text(f"\n{self._foot()}", style="dim"))

    def _foot(self) -> str:
        other = self._other
        foot = (
            f"meanwhile another user got {other.n_tokens:,} tokens; "
            f"longest gap {other.longest_gap_ms:.0f} ms"
        )
        delays = [row.first_token_ms for row in self._rows if row.first_token_ms is not None]
        return f"{foot}\npublish to first token {delays[-1]:.0f} ms" if delays else foot


def sparkline(values: Sequence[float]) -> str:
    """Values as bars, the newest last; many are averaged over even pieces."""
    if not values:
        return ""
    n_bars = min(_N_BARS, len(values))
    bounds = [i * len(values) // n_bars for i in range(n_bars + 1)]
    means = [sum(values[first:last]) / (last - first) for first, last in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)
