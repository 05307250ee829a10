"""Where the benchmarks keep what they build, and where their results go."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
PEERS = CACHE / "peers"
MODELS = CACHE / "models"
RESULTS = ROOT / "benchmarks" / "results"
