"""A graded dialogue as a web page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import jinja2

from modularbase.context_types import ContextReport, Tier, TierDecision

_MEANING = {
    Tier.KEY: "kept exactly",
    Tier.IMPORTANT: "kept in about 4 bits",
    Tier.REDUNDANT: "kept as a part of a summary",
}
_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #8884; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
section { margin: 1rem 0; }
h2 { font-size: .8rem; margin: 0; opacity: .6; text-transform: uppercase; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.key { background: #2a92; }
.important { background: #28f2; }
.redundant { background: #8883; opacity: .65; }
.window { text-decoration: underline dotted; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table>
<tr><th>tier</th><th>meaning</th><th class="number">tokens</th><th class="number">bytes</th></tr>
{% for tier, meaning in meanings.items() %}
<tr><td><span class="{{ tier.value }}">{{ tier.value }}</span></td><td>{{ meaning }}</td>
<td class="number">{{ report.tokens[tier] }}</td>
<td class="number">{{ report.n_bytes[tier] }}</td></tr>
{% endfor %}
<tr><td><span class="window">window</span></td><td>the last tokens, still exact</td>
<td class="number">{{ report.window_tokens }}</td>
<td class="number">{{ report.window_bytes }}</td></tr>
<tr><td>together</td><td>all kept exactly: {{ report.exact_bytes }} bytes</td>
<td class="number">{{ report.total_tokens }}</td>
<td class="number">{{ report.total_bytes }}</td></tr>
</table>
{% for role, spans in messages %}
<section>
<h2>{{ role }}</h2>
<div class="text">
{%- for span in spans -%}
<span class="{{ span.tier.value }}{{ ' window' if span.start + span.n_tokens > window_start }}"
 title="{{ span.tier.value }}, {{ span.n_tokens }} tokens: {{ span.reason }}">{{ span.text }}</span>
{%- endfor -%}
</div>
</section>
{% endfor %}
</body>
</html>
"""
)


def context_page(report: ContextReport, title: str) -> str:
    """The page: totals with a legend, then the dialogue; a span tells its reason when hovered."""
    return _PAGE.render(
        title=title,
        report=report,
        meanings=_MEANING,
        messages=list(_messages(report)),
        window_start=report.total_tokens - report.window_tokens,
    )


def _messages(report: ContextReport) -> Iterator[tuple[str, list[TierDecision]]]:
    for role, spans in groupby(report.decisions, lambda decision: decision.role):
        yield role, list(spans)
