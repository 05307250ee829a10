"""The pure parts of the benchmarks: rounds, ratios and their spread, tables and the byte model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import byte_model, harness, machine, report
from benchmarks.harness import Case, Spread
from benchmarks.models import Geometry
from benchmarks.ours import MeasurementError, Span, aggregate_decode_tps, check_clock
from benchmarks.peers.process import PeerRunError


def silent(_: str) -> None:
    pass


def playback(values: list[float], log: list[str], name: str) -> Callable[[], float]:
    remaining = iter(values)

    def measure() -> float:
        log.append(name)
        return next(remaining)

    return measure


def test_ratio_is_above_one_where_the_contender_is_better() -> None:
    assert harness.ratios([100.0, 200.0], [150.0, 300.0], "higher") == [1.5, 1.5]
    assert harness.ratios([30.0, 20.0], [15.0, 40.0], "lower") == [2.0, 0.5]


@pytest.mark.parametrize("ours", [[1.0], [0.0, 1.0], [-1.0, 1.0]])
def test_ratio_of_unequal_or_empty_measurements_is_an_error(ours: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected|above zero"):
        harness.ratios([1.0, 1.0], ours, "higher")


def test_spread_is_median_and_extremes() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0, [3.0, 1.0, 10.0])


def test_rounds_are_interleaved_and_the_best_option_counts() -> None:
    log: list[str] = []
    case = Case(
        name="decode",
        unit="tokens/s",
        baseline={
            "fa on": playback([100.0, 80.0, 100.0], log, "on"),
            "fa off": playback([99.0, 110.0, 110.0], log, "off"),
        },
        contenders={"keep": playback([220.0, 110.0, 165.0], log, "ours")},
        targets={"keep": 1.4},
    )
    result = harness.run_case(case, 3, silent)
    assert log == ["on", "off", "ours"] * 3
    assert result.best_option == "fa off"
    compared = result.contenders["keep"]
    assert compared.ratio is not None
    assert compared.ratio.values == pytest.approx([220 / 99, 1.0, 1.5])
    assert compared.ratio.median == 1.5
    assert compared.is_met is True


def test_an_option_clearly_behind_is_run_once_and_never_wins() -> None:
    log: list[str] = []
    case = Case(
        name="decode",
        unit="ms",
        better="lower",
        baseline={
            "quick": playback([10.0, 30.0, 30.0], log, "quick"),
            "slow": playback([20.0], log, "slow"),
        },
        contenders={},
    )
    result = harness.run_case(case, 3, silent)
    assert log == ["quick", "slow", "quick", "quick"]
    assert result.best_option == "quick"  # though its median is above the slow one's only value


@pytest.mark.parametrize(
    ("better", "kept"), [("higher", ["a", "b"]), ("lower", ["c"])], ids=["higher", "lower"]
)
def test_promising_options_are_near_the_best(better: str, kept: list[str]) -> None:
    assert harness.promising({"a": 100.0, "b": 90.0, "c": 50.0}, better) == kept


def test_a_missed_target_and_a_missing_one() -> None:
    case = Case("x", "s", {}, {}, targets={"keep": 2.0})
    result = harness.summarise(case, {"peer": [1.0]}, {"keep": [1.9], "auto": [5.0]})
    assert result.contenders["keep"].is_met is False
    assert result.contenders["auto"].is_met is None


def test_an_option_that_crashes_is_left_out() -> None:
    def crash() -> float:
        raise PeerRunError("exit code -11")

    said: list[str] = []
    case = Case("c", "s", {"a": crash, "b": lambda: 2.0}, {"ours": lambda: 4.0})
    result = harness.run_case(case, 2, said.append)
    assert result.best_option == "b"
    assert list(result.baseline) == ["b"]
    assert sum("a is left out: exit code -11" in line for line in said) == 1
    alone = harness.run_case(Case("c", "s", {"a": crash}, {"ours": lambda: 4.0}), 2, said.append)
    assert alone.best_option is None
    assert alone.contenders["ours"].ratio is None


def test_no_rounds_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        harness.run_case(Case("x", "s", {}, {}), 0, silent)


def test_results_table_shows_ratio_target_and_verdict() -> None:
    case = Case("decode F16", "tokens/s", {}, {}, targets={"keep": 1.15})
    result = harness.summarise(case, {"fa off": [100.0, 100.0]}, {"keep": [110.0, 130.0]})
    text = report.markdown(report.results_table("Decode", [result]))
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == [
        "decode F16, tokens/s",
        "100 (fa off)",
        "120 (keep)",
        "1.20 [1.10..1.30]",
        ">= 1.15",
        "met",
    ]


def test_results_table_without_contenders_shows_the_peer() -> None:
    result = harness.summarise(Case("decode", "tokens/s", {}, {}), {"fa on": [1234.0]}, {})
    assert report.results_table("t", [result]).rows[0][:3] == [
        "decode, tokens/s",
        "1,234 (fa on)",
        "-",
    ]


def machine_with(busy: float) -> machine.Machine:
    return machine.Machine("cpu", 2, ["avx2"], 1 << 30, "6.1", busy, 2, 30e9)


def test_a_busy_machine_and_a_busy_engine_are_warned_about() -> None:
    result = harness.summarise(Case("decode", "tokens/s", {}, {}), {"fa on": [1.0]}, {}, 0.5)
    assert report.warnings(machine_with(0.0), []) == []
    assert "50%" in report.warnings(machine_with(0.0), [result])[0]
    assert "1.5 cores busy" in report.warnings(machine_with(1.5), [])[0]


GEOMETRY = Geometry(
    weight_bytes=269_100_288, head_bytes=56_623_104, n_layer=30, n_head_kv=3, head_dim=64
)


def test_bytes_per_token_are_the_weights_and_the_context() -> None:
    assert GEOMETRY.kv_bytes(1) == 30 * 3 * 64 * 2 * 2
    assert byte_model.bytes_per_token(GEOMETRY, 0) == 269_100_288
    assert byte_model.bytes_per_token(GEOMETRY, 4096) == 269_100_288 + 94_371_840
    assert byte_model.bytes_per_token(GEOMETRY, 0, n_rows=8) == 269_100_288 / 8


def test_share_of_the_memory_limit() -> None:
    rate = byte_model.Rate("F16", 0, "peer (fa off)", 30e9 / 269_100_288 / 2)
    table = byte_model.share_table([rate], {"F16": GEOMETRY}, machine_with(0.0))
    assert table.rows[0][-1] == "50%"


def test_depth_table_gives_the_cost_of_a_thousand_tokens() -> None:
    rates = [
        byte_model.Rate("F16", 0, "peer (fa on)", 100.0),
        byte_model.Rate("F16", 2000, "peer (fa off)", 50.0),  # the same side, another best option
    ]
    assert [row[-1] for row in byte_model.depth_table(rates).rows] == ["-", "5.00"]


def test_aggregate_rate_counts_from_the_first_token_to_the_last() -> None:
    spans = [Span(1.0, 3.0, 48), Span(1.5, 5.0, 48)]
    assert aggregate_decode_tps(spans) == 96 / 4.0


def test_an_engine_clock_that_disagrees_with_the_callers_is_an_error() -> None:
    check_clock(105.0, 100.0)
    with pytest.raises(MeasurementError, match=r"expected about 100\.0 .* found 120\.0"):
        check_clock(120.0, 100.0)


def test_busy_ticks_leave_out_idle_and_iowait() -> None:
    assert machine.read_busy_ticks("cpu  10 20 30 4000 500 6 7 0 0 0\ncpu0 1 2 3") == 73


def test_cpuinfo_field_is_the_first_processors() -> None:
    text = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n"
    assert machine.cpuinfo_field(text, "model name") == "AMD EPYC"
    assert machine.cpuinfo_field(text, "microcode") == ""
