"""The short version of `modularbase demo live`, on real weights and with the real trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.python.training.segment_bytes import shm_file

COMMAND = Path(sys.executable).with_name("modularbase")


def test_a_served_pack_gets_better(smollm2: Path) -> None:
    channel = f"pytest-e2e-live-{os.getpid()}"
    arguments = ("--steps", "8", "--publishes", "4", "--channel", channel, "--json")
    done = subprocess.run(
        [COMMAND, "demo", "live", "--base", smollm2, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert not shm_file(channel).exists()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[0]["generation"] == 0 and rows[-1]["generation"] == 4
    # Eight steps teach what such answers look like, not yet the table.
    assert rows[-1]["perplexity"] < 0.3 * rows[0]["perplexity"]
    assert rows[-1]["other_tokens"] > rows[0]["other_tokens"] > 0
