"""Runs the benchmarks: ``python -m benchmarks [--only decode_depth,prefill] [--rounds 5]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import (
    ablation,
    channel,
    decode_batch,
    decode_depth,
    decode_tiers,
    load,
    machine,
    models,
    ours,
    packs_experts,
    packs_mixing,
    packs_peer,
    packs_quality,
    packs_residency,
    packs_speed,
    prefill,
    prefix_ttft,
    report,
    speculative,
    train_speed,
)
from benchmarks.harness import CaseResult, run_case
from benchmarks.paths import RESULTS
from benchmarks.peers import build
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.process import PeerRunError
from benchmarks.suite import Settings, Suite

MODULES = (
    decode_depth,
    decode_tiers,
    decode_batch,
    prefill,
    prefix_ttft,
    load,
    speculative,
    ablation,
    packs_speed,
    packs_experts,
    packs_residency,
    packs_peer,
    channel,
    train_speed,
    packs_quality,
    packs_mixing,
)
SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in MODULES}
DEFAULT_ROUNDS = 5
QUICK_ROUNDS = 2


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ", ".join(SUITES)
    parser.add_argument("--only", default=names, help=f"comma-separated, of: {names}")
    parser.add_argument(
        "--rounds", type=int, help=f"default {DEFAULT_ROUNDS}, quick {QUICK_ROUNDS}"
    )
    parser.add_argument("--quick", action="store_true", help="shallow contexts, fewer rounds")
    parser.add_argument("--peer-only", action="store_true", help="measure the peer alone")
    parser.add_argument("--threads", type=int, default=2, help="of both sides, default 2")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, no tables")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    chosen = parser.parse_args(arguments)
    chosen.only = [name.strip() for name in chosen.only.split(",") if name.strip()]
    unknown = sorted(set(chosen.only) - set(SUITES))
    if unknown:
        parser.error(f"--only: expected names of {names}, found {', '.join(unknown)}")
    if chosen.rounds is None:
        chosen.rounds = QUICK_ROUNDS if chosen.quick else DEFAULT_ROUNDS
    if chosen.rounds < 1 or chosen.threads < 1:
        parser.error("--rounds and --threads: expected at least 1")
    return chosen


def say(text: str) -> None:
    """Shows progress."""
    print(text, file=sys.stderr, flush=True)


def run_suite(suite: Suite, settings: Settings, chosen: argparse.Namespace) -> dict[str, object]:
    """Runs the cases of one benchmark, writes its file and prints its tables."""
    say(f"== {suite.name}: {suite.about}")
    facts = machine.describe(settings.n_threads)
    results: list[CaseResult] = []
    for case in suite.cases(settings):
        if chosen.peer_only:
            if suite is ablation.SUITE:
                continue
            case = case.without_contenders()
        results.append(run_case(case, chosen.rounds, say))
    facts = machine.with_bandwidth_again(facts)
    tables = suite.tables(settings, results, facts)
    for warning in report.warnings(facts, results):
        say(f"warning: {warning}")
    content = report.document(suite.name, facts, results, tables)
    suffix = ".peer" if chosen.peer_only else ""
    report.write_json(chosen.output / f"{suite.name}{suffix}.json", content)
    title = f"{suite.about} ({settings.n_threads} threads)"
    shown = [report.markdown(table) for table in (report.results_table(title, results), *tables)]
    report.write_text(chosen.output / f"{suite.name}{suffix}.md", "\n\n".join(shown) + "\n")
    if not chosen.json:
        print("\n\n".join(shown), end="\n\n", flush=True)
    return content


def try_suite(
    suite: Suite, settings: Settings, chosen: argparse.Namespace
) -> dict[str, object] | None:
    """Runs a benchmark; one that fails (None) does not cost the hour that the others take."""
    try:
        return run_suite(suite, settings, chosen)
    except (PeerRunError, ours.MeasurementError) as error:
        say(f"error: {suite.name}: {error}")
        return None


def main(arguments: list[str]) -> int:
    """Builds the peer and the model files where missing, and runs what was asked for."""
    chosen = parse_arguments(arguments)
    try:
        tools = build.ensure_built()
        files = models.ensure_models(tools)
        peer = LlamaCpp(tools, chosen.threads)
        settings = Settings(files, peer, chosen.threads, chosen.quick)
    except (build.PeerBuildError, models.ModelFileError) as error:
        say(f"error: {error}")
        return 1
    documents = {name: try_suite(SUITES[name], settings, chosen) for name in chosen.only}
    if chosen.json:
        print(json.dumps([document for document in documents.values() if document], indent=2))
    failed = [name for name, document in documents.items() if document is None]
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
