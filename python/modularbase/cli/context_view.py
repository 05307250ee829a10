"""A graded dialogue in the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from modularbase.context_types import ContextReport, Tier

_STYLES = {Tier.KEY: "bold green", Tier.IMPORTANT: "cyan", Tier.REDUNDANT: "dim"}


def dialogue_view(report: ContextReport) -> Table:
    """One row a span: role, tier, tokens, text, reason; all in its tier's colour."""
    table = Table("role", "tier", "tokens", "text", "reason", expand=True)
    for name in ("tokens", "role", "tier"):
        column = next(c for c in table.columns if c.header == name)
        column.no_wrap = True
        column.justify = "right" if name == "tokens" else "left"
    table.columns[3].ratio, table.columns[4].ratio = 3, 1
    window_start = report.total_tokens - report.window_tokens
    for decision in report.decisions:
        style = _STYLES[decision.tier]
        in_window = decision.start + decision.n_tokens > window_start
        table.add_row(
            Text(decision.role),
            Text(decision.tier.value, style),
            str(decision.n_tokens),
            Text(decision.text.strip("\n"), style),
            Text(f"{decision.reason}{', in the window' if in_window else ''}"),
        )
    return table


def totals_view(report: ContextReport) -> Table:
    """Tokens and bytes by tier."""
    table = Table("tier", "tokens", "kB")
    for column in table.columns[1:]:
        column.justify = "right"
    for tier in Tier:
        name = Text(tier.value, _STYLES[tier])
        table.add_row(name, str(report.tokens[tier]), _kilobytes(report.n_bytes[tier]))
    table.add_row("window (exact)", str(report.window_tokens), _kilobytes(report.window_bytes))
    table.add_section()
    table.add_row("together", str(report.total_tokens), _kilobytes(report.total_bytes))
    table.add_row("all kept exactly", str(report.total_tokens), _kilobytes(report.exact_bytes))
    return table


def _kilobytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e3:.1f}"
