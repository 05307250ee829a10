"""The predictor's file: accounting, bounds, several processes, and damage."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from modularbase.errors import HistoryError
from modularbase.routing.history import PackHistory, PredictorStats
from modularbase.routing.predictor import PackPredictor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "history.sqlite"


@pytest.fixture
def predictor(path: Path) -> Iterator[PackPredictor]:
    with PackPredictor(path, max_uses_per_user=6, max_users=3) as predictor:
        yield predictor


def packs_known(predictor: PackPredictor, user: str) -> set[str]:
    return {p.pack for p in predictor.predict_next_packs(user, 10_000)}


def count(path: Path, table: str) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_hits_and_wastes_are_counted(predictor: PackPredictor) -> None:
    assert (predictor.stats().hit_rate, predictor.stats().waste_rate) == (0, 0)
    predictor.acted_on("ada", ["a", "b"])
    predictor.acted_on("ada", ["b", "c"])  # b is pending already
    assert predictor.stats() == PredictorStats(issued=3, hits=0, wasted=0)
    predictor.record("bob", ["a"])  # another user's turn says nothing of Ada's
    assert predictor.stats() == PredictorStats(issued=3, hits=0, wasted=0)
    predictor.record("ada", ["b", "x"])
    assert predictor.stats() == PredictorStats(issued=3, hits=1, wasted=2)
    predictor.record("ada", ["a"])  # already judged
    predictor.acted_on("bob", ["a"])
    predictor.record("bob", ["a"])
    found = predictor.stats()
    assert found == PredictorStats(issued=4, hits=2, wasted=2)
    assert (found.hit_rate, found.waste_rate) == (0.5, 0.5)


def test_all_is_kept_in_the_file(predictor: PackPredictor, path: Path) -> None:
    predictor.record("ada", ["医疗问答包"])
    predictor.acted_on("ada", ["医疗问答包"])
    predictor.close()
    with PackPredictor(path) as again:
        assert packs_known(again, "ada") == {"医疗问答包"}
        again.record("ada", ["医疗问答包"])
        assert again.stats() == PredictorStats(issued=1, hits=1, wasted=0)
    assert path.stat().st_mode & 0o077 == 0


def test_old_turns_are_pruned(predictor: PackPredictor, path: Path) -> None:
    for i in range(20):
        predictor.record("ada", [f"p{i}", f"q{i}"])
    assert packs_known(predictor, "ada") == {f"{p}{i}" for i in (17, 18, 19) for p in "pq"}
    assert count(path, "uses") == 6


def test_users_who_stay_away_are_pruned(predictor: PackPredictor, path: Path) -> None:
    for user in ("ada", "bob", "cem", "ada", "dan"):
        predictor.record(user, ["a"])
    predictor.acted_on("eva", ["a"])
    known = [u for u in ("ada", "bob", "cem", "dan") if packs_known(predictor, u)]
    assert known == ["ada", "dan"]
    assert count(path, "users") == 3


def test_forgetting_leaves_no_trace_of_a_user(predictor: PackPredictor, path: Path) -> None:
    predictor.record("bob", ["kept"])
    predictor.record("unforgettable-ada", ["private_pack"])
    predictor.acted_on("unforgettable-ada", ["private_pack"])
    assert any(b"private_pack" in file.read_bytes() for file in path.parent.iterdir())
    predictor.forget("unforgettable-ada")
    assert predictor.stats() == PredictorStats()
    assert packs_known(predictor, "unforgettable-ada") == set()
    assert packs_known(predictor, "bob") == {"kept"}
    for file in path.parent.iterdir():
        assert b"private_pack" not in file.read_bytes()
        assert b"unforgettable" not in file.read_bytes()


def write_many(path: Path, user: str, start: threading.Barrier) -> None:
    start.wait(60)
    with PackPredictor(path) as predictor:
        for i in range(40):
            predictor.acted_on(user, ["a"])
            predictor.record(user, ["a" if i % 2 else "b"])
            predictor.record("shared", [f"{user}{i}"])


def test_two_processes_write_at_once(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    workers = [context.Process(target=write_many, args=(path, u, start)) for u in ("ada", "bob")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    with PackPredictor(path) as predictor:
        assert predictor.stats() == PredictorStats(issued=80, hits=40, wasted=40)
        expected = {f"{user}{i}" for user in ("ada", "bob") for i in range(40)}
        assert packs_known(predictor, "shared") == expected


def test_many_may_create_the_file_at_once(tmp_path: Path) -> None:
    def work(path: Path, start: threading.Barrier) -> None:
        start.wait(60)
        with PackPredictor(path) as predictor:
            predictor.acted_on("ada", [threading.current_thread().name])

    for i in range(3):
        path, start = tmp_path / f"{i}.sqlite", threading.Barrier(8)
        threads = [threading.Thread(target=work, args=(path, start)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with PackPredictor(path) as predictor:
            assert predictor.stats().issued == 8


def test_threads_share_a_predictor(predictor: PackPredictor) -> None:
    def work() -> None:
        for _ in range(25):
            predictor.record("ada", ["a"])
            predictor.acted_on("ada", ["a"])
            predictor.predict_next_packs("ada", 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    predictor.record("ada", ["a"])
    found = predictor.stats()
    assert found.hits == found.issued > 0
    assert found.wasted == 0


def test_corrupt_file_is_set_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    garbage = b"this is no database at all " * 100
    path.write_bytes(garbage)
    with caplog.at_level(logging.WARNING), PackPredictor(path) as predictor:
        predictor.record("ada", ["a"])
        assert packs_known(predictor, "ada") == {"a"}
    (warning,) = caplog.messages
    assert "set aside as history.sqlite.corrupt" in warning
    assert path.with_name("history.sqlite.corrupt").read_bytes() == garbage


def damage(path: Path) -> None:
    """Spoils all but page 1, the schema, of a file that nobody has open."""
    with closing(PackHistory(path, max_uses_per_user=5000, max_users=9)) as history:
        for i in range(20):
            history.add("ada", [f"pack-{i}-{k}" for k in range(50)], float(i))
    image = path.read_bytes()
    path.write_bytes(image[:4096] + os.urandom(len(image) - 4096))


def test_damage_found_while_running_is_survived(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(path)
    with caplog.at_level(logging.WARNING), PackPredictor(path) as predictor:
        predictor.record("ada", ["a"])
        assert packs_known(predictor, "ada") == {"a"}
    assert len(caplog.messages) == 1
    assert path.with_name("history.sqlite.corrupt").exists()


def test_file_that_another_process_began_anew_is_kept(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(path)
    with caplog.at_level(logging.WARNING), PackPredictor(path) as one, PackPredictor(path) as two:
        one.record("ada", ["a"])
        assert packs_known(two, "ada") == {"a"}
    assert len(caplog.messages) == 1


def test_newer_file_is_refused_and_left_alone(path: Path) -> None:
    PackPredictor(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(HistoryError) as caught:
        PackPredictor(path)
    assert (caught.value.field, caught.value.found) == ("user_version", "2")
    assert path.exists() and not path.with_name("history.sqlite.corrupt").exists()


def test_path_that_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=str(tmp_path)):
        PackPredictor(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError, match="history"):
        PackPredictor(tmp_path / "file" / "history")
