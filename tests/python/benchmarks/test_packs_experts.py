"""How the program that measures experts is run and read, and which cases are made of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import packs_experts, programs
from benchmarks.harness import run_case
from benchmarks.ours import MeasurementError
from benchmarks.packs_experts import Bench, Part


def test_a_program_prints_one_number() -> None:
    assert programs.read_number("41.250\n") == 41.25


@pytest.mark.parametrize("text", ["", "0.0\n", "-1\n", "nan\n", "inf\n", "41 us\n", "1\n2\n"])
def test_anything_else_is_an_error(text: str) -> None:
    with pytest.raises(MeasurementError, match="expected one number above 0"):
        programs.read_number(text)


def test_a_program_that_fails_is_an_error() -> None:
    program = Path(sys.executable)
    assert programs.measure(program, ["-c", "print(2.5)"]) == 2.5
    with pytest.raises(MeasurementError, match="no such pack"):
        programs.measure(program, ["-c", "raise SystemExit('no such pack')"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the program was asked for; it takes 10 us for each expert used."""
    seen: list[list[str]] = []

    def measure(_: Path, arguments: list[str]) -> float:
        seen.append(arguments)
        return 10.0 * int(arguments[2])

    monkeypatch.setattr(packs_experts, "measure", measure)
    return seen


BENCH = Bench(Path("pack_bench"), n_threads=2, bytes_between=1000)


def test_two_experts_are_compared_with_all_eight(calls: list[list[str]]) -> None:
    rows = packs_experts.ROWS[1]
    case = packs_experts.make_case(BENCH, "experts", Path("p.gguf"), "S q4_0", rows)
    result = run_case(case, 1, lambda _: None)
    assert calls == [
        ["experts", "p.gguf", "8", "8", "8", "2", str(packs_experts.N_STEPS), "1000"],
        ["experts", "p.gguf", "2", "8", "8", "2", str(packs_experts.N_STEPS), "1000"],
    ]
    compared = result.contenders["top-2"]
    assert compared.ratio is not None
    assert compared.ratio.median == 4.0
    assert compared.target == pytest.approx(3.333, abs=1e-3)
    assert compared.is_met is True


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(("part", "number"), [("site", 0), ("experts", 2)])
def test_whole_sites_and_rows_that_share_a_pack_have_no_target(part: Part, number: int) -> None:
    rows = packs_experts.ROWS[number]
    case = packs_experts.make_case(BENCH, part, Path("p.gguf"), "S q4_0", rows)
    assert run_case(case, 1, lambda _: None).contenders["top-2"].is_met is None
