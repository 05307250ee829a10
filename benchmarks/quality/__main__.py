"""Computes parts of the table ahead: ``python -m benchmarks.quality [STAGE ...]``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.quality.stages import result, stage_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs stages, each in a process of its own where there are several."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    names = stage_names()
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of: {', '.join(names)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, default cpu")
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time, default 1")
    chosen = parser.parse_args(arguments)
    wanted = chosen.stages or names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"STAGE: expected names of {', '.join(names)}, found {', '.join(unknown)}")
    if len(wanted) == 1:
        print(result(wanted[0], chosen.device), file=sys.stderr)
        return 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        codes = list(pool.map(lambda name: _run(name, chosen.device), wanted))
    return max(codes)


def _run(name: str, device: str) -> int:
    command = [sys.executable, "-m", "benchmarks.quality", name, "--device", device]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
