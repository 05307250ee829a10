"""Packs that a user's history says come next: preloaded, and counted as hits or wastes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modularbase import Engine, PackRequest, PackUse
from modularbase.errors import InvalidRequestError, PackNotFoundError
from modularbase.routing.predictor import PackPredictor
from tests.python.conftest import PackEngineFactory
from tests.tools.engine_packs import answer, eventually, install_pack, leased, tokens


@pytest.fixture
def predictor(tmp_path: Path) -> Iterator[PackPredictor]:
    with PackPredictor(tmp_path / "history.sqlite") as predictor:
        yield predictor


@pytest.fixture
def engine(pack_engines: PackEngineFactory, predictor: PackPredictor, tmp_path: Path) -> Engine:
    """An engine that has used the packs a, b and c and holds none of them."""
    engine = pack_engines(arguments={"predictor": predictor})
    for name in ("a", "b", "c"):
        install_pack(tmp_path, name)
        tokens(engine, name)
        engine.packs.evict(name)
    return engine


def use(engine: Engine, *packs: str, user: str = "ada") -> None:
    assert answer(engine, PackRequest(packs=tuple(map(PackUse, packs)), user=user)).packs


def state(engine: Engine, name: str) -> str:
    return engine.packs.status(name).state


def teach(predictor: PackPredictor, turns: str, user: str = "ada") -> None:
    for pack in turns:
        predictor.record(user, [pack])


def test_what_comes_next_is_loaded_ahead(engine: Engine, predictor: PackPredictor) -> None:
    teach(predictor, "abab")
    use(engine, "a")
    eventually(lambda: state(engine, "b") == "resident")
    stats = engine.packs.stats()
    assert (stats.n_preloads, stats.n_preload_hits, stats.n_preload_wastes) == (1, 0, 0)
    assert state(engine, "c") == "known"
    n_loads = engine.packs.stats().n_loads
    use(engine, "b")
    stats = engine.packs.stats()
    assert (stats.n_loads, stats.n_preload_hits) == (n_loads, 1)
    assert (predictor.stats().hits, predictor.stats().wasted) == (1, 0)


def test_what_never_comes_is_a_waste(engine: Engine, predictor: PackPredictor) -> None:
    teach(predictor, "abab")
    use(engine, "a")
    eventually(lambda: state(engine, "b") == "resident")
    use(engine, "c")
    assert predictor.stats().wasted == 1
    engine.packs.evict("b")
    stats = engine.packs.stats()
    assert (stats.n_preloads, stats.n_preload_hits, stats.n_preload_wastes) == (1, 0, 1)


def test_packs_that_are_there_are_not_preloaded(engine: Engine, predictor: PackPredictor) -> None:
    teach(predictor, "abab")
    engine.packs.load("b")
    use(engine, "a")
    assert engine.packs.stats().n_preloads == 0
    assert predictor.stats().issued == 0


def test_packs_the_engine_does_not_know_are_not_guessed(
    pack_engines: PackEngineFactory, predictor: PackPredictor, tmp_path: Path
) -> None:
    engine = pack_engines(arguments={"predictor": predictor})
    for name in ("a", "b"):
        install_pack(tmp_path, name)
    teach(predictor, "abab")
    use(engine, "a")
    assert [status.id for status in engine.packs.list()] == ["a"]


def test_users_do_not_share_a_history(engine: Engine, predictor: PackPredictor) -> None:
    teach(predictor, "abab", user="bob")
    use(engine, "a", user="ada")
    assert engine.packs.stats().n_preloads == 0


def test_requests_of_nobody_teach_nothing(engine: Engine, predictor: PackPredictor) -> None:
    use(engine, "a", user="")
    tokens(engine, "a")
    tokens(engine)
    assert predictor.predict_next_packs("ada", 3) == []
    assert engine.packs.stats().n_preloads == 0


def test_only_what_exists_is_learned(engine: Engine, predictor: PackPredictor) -> None:
    with pytest.raises(PackNotFoundError):
        answer(engine, PackRequest(packs=(PackUse("poems"),), user="ada"))
    assert predictor.predict_next_packs("ada", 3) == []
    use(engine, "a@1.0.0", "b")
    assert {p.pack for p in predictor.predict_next_packs("ada", 3)} == {"a", "b"}


def test_a_guess_takes_no_room_from_who_runs(
    pack_engines: PackEngineFactory, predictor: PackPredictor, tmp_path: Path
) -> None:
    engine = pack_engines(n_slots=1, arguments={"predictor": predictor})
    for name in ("b", "a"):
        install_pack(tmp_path, name)
        tokens(engine, name)
    teach(predictor, "abab")
    with leased(engine, "a"):
        use(engine, "a")
        assert predictor.stats().issued == 1
        assert (state(engine, "a"), state(engine, "b")) == ("resident", "known")
        assert engine.packs.stats().n_preloads == 0


def test_a_history_that_fails_fails_no_request(
    pack_engines: PackEngineFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "history"
    with PackPredictor(folder / "history.sqlite") as predictor:
        predictor.close()
        shutil.rmtree(folder)
        folder.write_text("no folder any more")
        engine = pack_engines(arguments={"predictor": predictor})
        install_pack(tmp_path, "a")
        use(engine, "a")
    assert "no prediction of packs" in caplog.text


@pytest.mark.parametrize("user", ["\ud800", 5], ids=ascii)
def test_users_that_are_none(user: Any, engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="user"):
        answer(engine, PackRequest(packs=(PackUse("a"),), user=user), max_tokens=30_000)
    eventually(lambda: engine.stats["n_running"] == engine.stats["n_waiting"] == 0)
