"""What a request says about packs: its forms, weights, policies, conflicts and dependencies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modularbase import Engine, PackRequest, PackUse
from modularbase.errors import BudgetExceededError, DependencyError, InvalidRequestError
from modularbase.pack_requests import parse_packs
from modularbase.types import Packs
from tests.python.conftest import PackEngineFactory
from tests.tools.engine_packs import (
    GREEDY,
    PROMPT,
    WAIT_S,
    answer,
    eventually,
    install_pack,
    pack_file,
    tokens,
)
from tests.tools.tiny_requests import ids, load

NAMES = ("a", "b", "c", "d")
NO_NAME: Any = 5


@pytest.fixture(scope="module")
def engine(pack_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with the four packs of NAMES."""
    with load(pack_model) as engine:
        for name in NAMES:
            path = pack_file(tmp_path_factory.mktemp("files"), name, token_gates=True)
            engine.packs.load(str(path))
        yield engine


def weighted(*weights: Any, **fields: Any) -> PackRequest:
    uses = tuple(map(PackUse, NAMES, weights))
    return PackRequest(packs=uses, fallback="never", **fields)


def request(packs: Any, **fields: Any) -> PackRequest:
    """A request that type checkers would refuse."""
    return PackRequest(packs=packs, **fields)


def test_the_forms_of_packs(engine: Engine) -> None:
    one = tokens(engine, "a")
    forms: list[Any] = [
        "a@1.0.0",
        "a@>=1,<2",
        ["a"],
        ("a",),
        [PackUse("a")],
        PackRequest(packs=(PackUse("a"),)),
        request(["a"]),
        request("a"),
    ]
    for form in forms:
        assert tokens(engine, form) == one, form
    two = tokens(engine, ["a", PackUse("b")])
    assert two == tokens(engine, PackRequest(packs=(PackUse("a"), PackUse("b")))) != one
    plain = tokens(engine)
    assert plain != one
    nothings: list[Packs] = ["none", None, [], (), PackRequest()]
    for nothing in nothings:
        assert tokens(engine, nothing) == plain


@pytest.mark.parametrize(
    "packs",
    [
        5,
        {"a"},
        [None],
        [["a"]],
        [PackUse(NO_NAME)],
        "",
        "@1.0.0",
        "a@",
        "a@new",
        "a b",
        request(5),
        request([5]),
        request("a", policy="mean"),
        request("a", activation="later"),
        ["a", "a"],
        ["a", "a@1.0.0"],
        [*NAMES, "e"],
        request([*NAMES, "e"]),
        weighted(-1.0),
        weighted(math.nan),
        weighted(math.inf),
        weighted(1.0, -0.5),
        weighted(1.0, math.nan),
        weighted(1e38, 1e38, 1e38, 1e38),
        weighted("heavy"),
        weighted(None),
    ],
    ids=repr,
)
def test_requests_that_make_no_sense(packs: Any, engine: Engine) -> None:
    n_steps = engine.stats["n_steps"]
    for call in (engine.submit, engine.score):
        with pytest.raises(InvalidRequestError):
            call(ids(5), packs=packs)
    assert engine.stats["n_steps"] == n_steps
    assert [status.n_leases for status in engine.packs.list()] == [0, 0, 0, 0]


def test_from_here_is_for_generations(engine: Engine) -> None:
    request = weighted(1.0, activation="from_here")
    with pytest.raises(InvalidRequestError, match="activation"):
        engine.score(ids(5), packs=request)
    result = answer(engine, request)
    assert [used.id for used in result.packs] == ["a"]
    assert result.token_ids not in (tokens(engine), tokens(engine, "a"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.floats(0.0, 2.0**10, width=32), min_size=1, max_size=3),
    policy=st.sampled_from(["blend", "best", "ties"]),
)
def test_packs_keep_their_weights(engine: Engine, weights: list[float], policy: Any) -> None:
    """A pack acts at its own weight, whatever others are there; at weight 0 it is not."""
    result = answer(engine, weighted(*weights, policy=policy))
    assert [(used.id, used.weight) for used in result.packs] == list(
        zip(NAMES, weights, strict=False)
    )
    beside_nothing = answer(engine, weighted(*weights, 0.0, policy=policy))
    assert beside_nothing.token_ids == result.token_ids


def test_weights(engine: Engine) -> None:
    found = {weight: answer(engine, weighted(weight)) for weight in (0.0, 0.5, 1.0, 3.0)}
    assert [result.packs[0].weight for result in found.values()] == list(found)
    assert len({tuple(result.token_ids) for result in found.values()}) == 4
    assert found[0.0].token_ids == tokens(engine)
    assert found[1.0].token_ids == tokens(engine, "a")
    assert tokens(engine, weighted(1.0, 0.0)) == tokens(engine, "a")
    assert tokens(engine, weighted(0.0, 0.0)) == tokens(engine)
    two = {tuple(tokens(engine, weighted(weight, weight))) for weight in (0.25, 0.5, 1.0)}
    assert len(two) == 3, "more than proportions count"


def test_policies_differ(engine: Engine) -> None:
    found = {
        policy: answer(engine, weighted(1.0, 0.5, policy=policy))
        for policy in ("blend", "best", "priority", "ties")
    }
    assert len({tuple(result.token_ids) for result in found.values()}) == 4
    for result in found.values():
        assert [used.id for used in result.packs] == ["a", "b"]
        assert set(result.pack_conflict) == {1, 2}  # the layers where both have a site
        assert all(-1 <= cosine <= 1 for cosine in result.pack_conflict.values())
    assert answer(engine, "a").pack_conflict == {}
    # The first whose gate is open: the order decides, where some token opens both.
    c_first, d_first = (
        tokens(engine, PackRequest(packs=tuple(map(PackUse, order)), policy="priority"))
        for order in ("cd", "dc")
    )
    assert c_first != d_first


def test_requests_with_other_packs_share_a_batch(engine: Engine) -> None:
    ties = weighted(1.0, 2.0, policy="ties")
    requests: list[Packs] = [weighted(1.0), ["b"], ["c", "d"], None, ties]
    alone = [tokens(engine, packs, max_tokens=64) for packs in requests]
    n_steps = engine.stats["n_steps"]
    running = [
        engine.submit(PROMPT, packs=packs, max_tokens=64, **GREEDY) for packs in requests * 2
    ]
    together = [generation.result(WAIT_S).token_ids for generation in running]
    assert together == alone * 2
    # One by one they take a step a token each.
    assert engine.stats["n_steps"] - n_steps < 5 * 64


@pytest.mark.parametrize(
    ("conflict", "is_refused"), [("b", True), ("b@>=1", True), ("b@>=2", False)]
)
def test_declared_conflicts(
    conflict: str, is_refused: bool, pack_engine: Engine, tmp_path: Path
) -> None:
    install_pack(tmp_path, "a", conflicts=[conflict])
    install_pack(tmp_path, "b")
    assert tokens(pack_engine, "a") != tokens(pack_engine, "b")
    for order in (("a", "b"), ("b", "a")):
        request = PackRequest(packs=tuple(map(PackUse, order)), fallback="never")
        if not is_refused:
            assert len(answer(pack_engine, request).packs) == 2
            continue
        with pytest.raises(DependencyError, match=r"a 1\.0\.0 declares a conflict with b"):
            pack_engine.submit(ids(5), packs=request)


def test_dependencies_are_resident_with_a_pack(pack_engine: Engine, tmp_path: Path) -> None:
    for version in ("1.0.0", "1.1.0", "2.0.0"):
        install_pack(tmp_path, f"logic@{version}")
    install_pack(tmp_path, "reasoning", needs=["logic@<2"])
    install_pack(tmp_path, "code", needs=["reasoning"])
    result = answer(pack_engine, "code")
    assert [used.id for used in result.packs] == ["code"]
    found = {status.id: (status.version, status.state) for status in pack_engine.packs.list()}
    assert found == {
        "code": ("1.0.0", "resident"),
        "reasoning": ("1.0.0", "resident"),
        "logic": ("1.1.0", "resident"),
    }
    pack_engine.packs.evict("reasoning")
    tokens(pack_engine, "code")
    eventually(lambda: pack_engine.packs.status("reasoning").state == "resident")


def test_a_dependency_in_another_version_than_its_name_means(
    pack_engine: Engine, tmp_path: Path
) -> None:
    for version in ("1.0.0", "2.0.0"):
        install_pack(tmp_path, f"logic@{version}")
    install_pack(tmp_path, "code", needs=["logic@<2"])
    newest = tokens(pack_engine, "logic")
    for _ in range(2):
        tokens(pack_engine, "code")
    found = [(status.id, status.version, status.n_loads) for status in pack_engine.packs.list()]
    assert found == [("code", "1.0.0", 1), ("logic", "1.0.0", 1), ("logic", "2.0.0", 1)]
    assert tokens(pack_engine, "logic") == newest


def test_dependencies_of_a_file(pack_engine: Engine, tmp_path: Path) -> None:
    path = str(pack_file(tmp_path, "code", needs=["logic"]))
    with pytest.raises(DependencyError, match=r"code 1\.0\.0 needs logic"):
        pack_engine.packs.load(path)
    assert pack_engine.packs.list() == []
    install_pack(tmp_path, "logic")
    pack_engine.packs.load(path)
    states = {status.id: status.state for status in pack_engine.packs.list()}
    assert states == {"code": "resident", "logic": "resident"}


def test_a_dependency_that_is_gone(pack_engine: Engine, tmp_path: Path) -> None:
    logic = install_pack(tmp_path, "logic")
    install_pack(tmp_path, "code", needs=["logic"])
    logic.path.unlink()
    request = PackRequest(packs=(PackUse("code"),), fallback="never")
    with pytest.raises(DependencyError, match=r"no version of logic suits"):
        pack_engine.submit(ids(5), packs=request)
    # The pack asked for is known, so that is a failure, and the base answers.
    (step,) = answer(pack_engine, "code").fallbacks
    assert "logic" in step.reason


def test_packs_of_one_request_that_never_fit_together(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    engine = pack_engines(n_slots=2)
    for name in ("a", "b", "c"):
        install_pack(tmp_path, name)
    never = PackRequest(packs=tuple(map(PackUse, "abc")), fallback="never")
    with pytest.raises(BudgetExceededError, match="smaller than the packs of one request"):
        answer(engine, never)
    assert len(answer(engine, ["a", "b"]).packs) == 2
    result = answer(engine, ["a", "b", "c"])
    assert (result.packs, result.token_ids) == ((), tokens(engine))
    assert result.fallbacks[0].packs == ("a@1.0.0", "b@1.0.0", "c@1.0.0")


@settings(derandomize=True)
@given(st.lists(st.sampled_from([*NAMES, "a@1.0.0", "b@>=1"]), max_size=4))
def test_parsing_keeps_what_it_is_given(names: list[str]) -> None:
    parsed = parse_packs(names)
    assert [use.pack for use in parsed.packs] == names
    assert parse_packs(parsed) == parsed
