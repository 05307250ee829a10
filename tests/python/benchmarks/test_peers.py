"""How the peer's output is read, its build is cached and its archive is checked."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.peers import build, llama_cpp, server
from benchmarks.peers.process import PeerRunError, parse_peak_rss, run, time_first_output

DATA = Path(__file__).parent / "data"


def test_llama_bench_output_gives_the_median_of_the_test_asked_for() -> None:
    text = (DATA / "llama_bench.json").read_text()
    assert llama_cpp.parse_bench(text, n_prompt=64, n_gen=0) == 203.583
    assert llama_cpp.parse_bench(text, n_prompt=0, n_gen=16) == 50.586


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[]", '[{"n_prompt": 64}]'])
def test_unexpected_llama_bench_output_is_an_error(text: str) -> None:
    with pytest.raises(PeerRunError, match="llama-bench"):
        llama_cpp.parse_bench(text, n_prompt=64, n_gen=0)


def test_batched_bench_output_gives_decode_and_whole_rates() -> None:
    rates = llama_cpp.parse_batched((DATA / "llama_batched_bench.jsonl").read_text(), 8)
    assert rates.decode_tps == 86.80838
    assert rates.prefill_tps == 189.721817
    assert rates.generated_per_s == pytest.approx(8 * 4 / 1.043300)


def test_batched_bench_output_without_the_batch_is_an_error() -> None:
    with pytest.raises(PeerRunError, match="pl=4"):
        llama_cpp.parse_batched((DATA / "llama_batched_bench.jsonl").read_text(), 4)


def events(*objects: dict[str, object]) -> Iterator[bytes]:
    for item in objects:
        yield b"data: " + json.dumps(item).encode() + b"\n"
        yield b"\n"


TIMINGS = {"prompt_ms": 8.5, "cache_n": 1023, "predicted_per_second": 99.0, "predicted_n": 2}


def test_streamed_completion_carries_the_servers_timings() -> None:
    stream = events({"content": "a", "stop": False}, {"content": "", "timings": TIMINGS})
    answer = server.read_completion(server.read_events(stream), start=0.0)
    assert (answer.prompt_ms, answer.n_cached, answer.decode_tps) == (8.5, 1023, 99.0)
    assert answer.n_drafted == 0
    assert answer.first_token_ms > 0.0


@pytest.mark.parametrize(
    ("last", "said"),
    [({"content": ""}, "without timings"), ({"error": {"message": "no slot"}}, "no slot")],
)
def test_a_stream_that_ends_badly_is_an_error(last: dict[str, object], said: str) -> None:
    with pytest.raises(PeerRunError, match=said):
        server.read_completion(server.read_events(events({"content": "a"}, last)), start=0.0)


def test_first_output_is_timed_and_peak_memory_is_the_childs_own() -> None:
    program = "import sys, time; block = bytearray(64 << 20); time.sleep(0.2)\n"
    program += "print('x', flush=True); time.sleep(0.3)"
    first = time_first_output([sys.executable, "-c", program])
    assert 0.2 <= first.seconds < 30.0
    assert 64 << 20 <= first.peak_rss_bytes < 256 << 20  # an interpreter takes 10 to 40 MiB more


@pytest.mark.parametrize(
    "program", ["pass", "raise SystemExit(3)", "print(1); raise SystemExit(3)"]
)
def test_a_process_that_fails_or_is_silent_is_an_error(program: str) -> None:
    with pytest.raises(PeerRunError):
        time_first_output([sys.executable, "-c", program])


def test_a_failing_program_shows_what_it_said() -> None:
    with pytest.raises(PeerRunError, match=r"(?s)exit code 3.*bad model"):
        run([sys.executable, "-c", "import sys; sys.stderr.write('bad model'); sys.exit(3)"])


def test_peak_memory_of_an_ended_process_is_an_error() -> None:
    assert parse_peak_rss("Name:\tx\nVmHWM:\t   2048 kB\n") == 2048 * 1024
    with pytest.raises(PeerRunError, match="ended"):
        parse_peak_rss("Name:\tx\nState:\tZ (zombie)\n")


def built(folder: Path) -> None:
    (folder / "bin").mkdir()
    for tool in build.TOOLS:
        (folder / "bin" / tool).touch()
    (folder / "stamp.json").write_text(json.dumps(build.recipe_stamp()))


def test_a_finished_build_is_used_again(tmp_path: Path) -> None:
    built(tmp_path)
    assert build.ensure_built(tmp_path) == tmp_path / "bin"


@pytest.mark.parametrize("field", ["version", "recipe", "cpu"])
def test_a_build_of_another_recipe_or_cpu_is_not(tmp_path: Path, field: str) -> None:
    built(tmp_path)
    stamp = {**build.recipe_stamp(), field: "other"}
    (tmp_path / "stamp.json").write_text(json.dumps(stamp))
    assert not build.is_built(tmp_path)


def test_a_build_without_a_tool_or_stamp_is_not_used(tmp_path: Path) -> None:
    assert not build.is_built(tmp_path)
    built(tmp_path)
    (tmp_path / "bin" / build.TOOLS[0]).unlink()
    assert not build.is_built(tmp_path)


def test_an_archive_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(b"other")
    monkeypatch.setenv(build.ARCHIVE_VARIABLE, str(archive))
    with pytest.raises(build.PeerBuildError, match="sha256: expected 832db069"):
        build.obtain_archive(tmp_path)


def write_archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(build.SOURCE_PREFIX + name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    return path


def test_only_what_the_build_needs_is_extracted(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", ["CMakeLists.txt", "src/a.cpp", "docs/a.md"])
    source = build.extract_source(archive, tmp_path / "source")
    assert (source / "src" / "a.cpp").is_file()
    assert not (source / "docs").exists()


def test_an_archive_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", ["src/../../escaped"])
    with pytest.raises(build.PeerBuildError, match="unexpected member"):
        build.extract_source(archive, tmp_path / "source")
    assert not (tmp_path / "escaped").exists()


def test_an_archive_without_sources_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", ["src/a.cpp"])
    with pytest.raises(build.PeerBuildError, match="no llama_cpp_python"):
        build.extract_source(archive, tmp_path / "source")
