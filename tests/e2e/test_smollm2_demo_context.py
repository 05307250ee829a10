"""The short version of `modularbase demo context`, on real weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("modularbase")


def test_a_context_shrinks_and_its_first_rule_holds(smollm2: Path) -> None:
    arguments = ("--turns", "10", "--budget", "9MB", "--threads", "1", "--json")
    done = subprocess.run(
        [COMMAND, "demo", "context", "--base", smollm2, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["turn"] for row in rows] == [*range(1, 11)]
    assert [row["turn"] for row in rows if row["probe"]] == [5, 10]
    for row in rows:
        assert sum(row["tokens"].values()) == row["total_tokens"]
        assert sum(row["n_bytes"].values()) == row["total_bytes"]
        assert row["ratio"] == row["f16_bytes"] / row["total_bytes"]
    last = rows[-1]
    assert last["tokens"]["important"] > 200 and last["tokens"]["key"] < 200
    assert last["tokens"]["redundant"] > 0 and any(row["demoted"] for row in rows)
    assert last["total_bytes"] <= 9_000_000 and last["ratio"] > 1.6  # a window of 4.4 MB is in it
    for row in rows[4:]:
        assert row["f16"]["obeys"] and row["tiered"]["obeys"], row
        if row["probe"]:
            assert row["probe"]["f16"]["obeys"] and row["probe"]["tiered"]["obeys"], row["probe"]
