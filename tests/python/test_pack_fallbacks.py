"""What answers when a pack cannot be had, and that the result tells what was given up and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modularbase import Engine, PackRequest, PackUse
from modularbase.errors import (
    BudgetExceededError,
    DependencyError,
    InvalidRequestError,
    ModularBaseError,
    PackFormatError,
    PackIncompatibleError,
    PackNotFoundError,
)
from tests.python.conftest import PackEngineFactory
from tests.tools.engine_packs import answer, install_pack, pack_file, spoil, tokens
from tests.tools.tiny_requests import ids


def request(*packs: str, fallback: Any = "on_failure") -> PackRequest:
    return PackRequest(packs=tuple(map(PackUse, packs)), fallback=fallback)


def test_nothing_is_given_up_when_all_is_well(pack_engine: Engine, tmp_path: Path) -> None:
    install_pack(tmp_path, "spare")
    install_pack(tmp_path, "code", fallback=["spare"])
    result = answer(pack_engine, "code")
    assert [used.id for used in result.packs] == ["code"]
    assert result.fallbacks == ()
    assert pack_engine.packs.stats().n_loads == 1  # the spare one waits until it is needed


def test_the_chain_of_the_manifest_comes_first(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    engine = pack_engines(arguments={"default_packs": ["always_there"]})
    for name in ("good", "always_there"):
        install_pack(tmp_path, name)
    also_broken = spoil(install_pack(tmp_path, "also_broken"))
    broken = install_pack(tmp_path, "code", fallback=["no_such", also_broken, "good"])
    spoil(broken)
    result = answer(engine, "code")
    assert [(used.id, used.weight) for used in result.packs] == [("good", 1.0)]
    assert [step.packs for step in result.fallbacks] == [("code",), ("no_such",), ("also_broken",)]
    reasons = [step.reason for step in result.fallbacks]
    assert str(broken.path) in reasons[0] and broken.record.sha256 in reasons[0]
    assert reasons[1].startswith("no pack no_such")
    assert "also_broken" in reasons[2] and "digest" in reasons[2]
    assert result.token_ids == tokens(engine, "good")
    assert [status.id for status in engine.packs.list()] == ["good"]


def test_then_the_engines_default_packs_together(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    engine = pack_engines(arguments={"default_packs": ["a", "b"]})
    for name in ("a", "b"):
        install_pack(tmp_path, name)
    spoil(install_pack(tmp_path, "code", fallback=["no_such"]))
    result = answer(engine, "code")
    assert [(used.id, used.weight) for used in result.packs] == [("a", 1.0), ("b", 1.0)]
    assert [step.packs for step in result.fallbacks] == [("code",), ("no_such",)]
    assert result.token_ids == tokens(engine, ["a", "b"])


def test_at_last_the_plain_base(pack_engines: PackEngineFactory, tmp_path: Path) -> None:
    engine = pack_engines(arguments={"default_packs": ["b"]})
    spoil(install_pack(tmp_path, "b"))
    spoil(install_pack(tmp_path, "code"))
    result = answer(engine, "code")
    assert result.packs == ()
    assert [step.packs for step in result.fallbacks] == [("code",), ("b",)]
    assert result.token_ids == tokens(engine)


def test_all_packs_of_a_request_fail_together(pack_engine: Engine, tmp_path: Path) -> None:
    install_pack(tmp_path, "good", fallback=["spare"])
    install_pack(tmp_path, "spare")
    spoil(install_pack(tmp_path, "code", fallback=["other"]))
    result = answer(pack_engine, ["good", "code"])
    assert [step.packs for step in result.fallbacks] == [("good", "code")]
    assert [used.id for used in result.packs] == ["spare"]


def test_a_version_in_a_fallback_step(pack_engines: PackEngineFactory, tmp_path: Path) -> None:
    engine = pack_engines(arguments={"default_packs": ["spare@<2"]})
    for name in ("spare@1.0.0", "spare@2.0.0"):
        install_pack(tmp_path, name)
    assert answer(engine, "spare").packs[0].version == "2.0.0"
    spoil(install_pack(tmp_path, "code"))
    assert answer(engine, "code").packs[0].version == "1.0.0"


@pytest.mark.parametrize("fallback", ["on_failure", "never"])
def test_an_unknown_pack_is_an_error(fallback: str, pack_engine: Engine, tmp_path: Path) -> None:
    install_pack(tmp_path, "code")
    for packs in (["poems"], ["code", "poems"], ["code@>=2"]):
        with pytest.raises(PackNotFoundError) as caught:
            pack_engine.submit(ids(5), packs=request(*packs, fallback=fallback))
        assert "code 1.0.0" in caught.value.known


def test_always_forgives_unknown_packs_too(pack_engines: PackEngineFactory, tmp_path: Path) -> None:
    engine = pack_engines(arguments={"default_packs": ["spare"]})
    result = answer(engine, request("poems", fallback="always"))
    assert result.packs == ()
    assert [step.packs for step in result.fallbacks] == [("poems",), ("spare",)]
    assert all(step.reason.startswith("no pack") for step in result.fallbacks)
    install_pack(tmp_path, "spare")
    result = answer(engine, request("poems", fallback="always"))
    assert [used.id for used in result.packs] == ["spare"]


def test_never_makes_every_failure_an_error(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    engine = pack_engines(n_slots=1, arguments={"default_packs": ["good"]})
    install_pack(tmp_path, "good", fallback=["spare"])
    install_pack(tmp_path, "spare", conflicts=["good"])
    spoil(install_pack(tmp_path, "code", fallback=["good"]))
    install_pack(tmp_path, "wide", d_ff=1024)
    install_pack(tmp_path, "elsewhere", base_id="other-base")
    expected: dict[tuple[str, ...], type[ModularBaseError]] = {
        ("code",): PackFormatError,
        ("elsewhere",): PackIncompatibleError,
        ("wide",): BudgetExceededError,
        ("spare", "good"): DependencyError,
        ("poems",): PackNotFoundError,
    }
    for packs, error in expected.items():
        with pytest.raises(error):
            engine.generate(ids(5), packs=request(*packs, fallback="never"))
        if error is not PackNotFoundError:
            assert answer(engine, request(*packs)).fallbacks[0].packs == packs


def test_packs_that_fail_only_when_they_are_loaded_again(
    pack_engine: Engine, tmp_path: Path
) -> None:
    """Their names are known and were fine; the engine finds out when the request is its own."""
    for name in ("spare", "unused"):
        install_pack(tmp_path, name)
    install_pack(tmp_path, "untried", strength=0.0)
    pack_engine.packs.preload("untried")
    chain = ["unused", "no_such", "untried", "spare"]
    broken = install_pack(tmp_path, "code@1.2.0", fallback=chain)
    plain, spare = tokens(pack_engine), tokens(pack_engine, "spare")
    tokens(pack_engine, "code")
    pack_engine.packs.evict("code")
    spoil(broken)
    result = answer(pack_engine, "code")
    # What the engine has not tried yet is not looked for while the request waits.
    assert [used.id for used in result.packs] == ["spare"]
    assert result.token_ids == spare
    (step,) = result.fallbacks
    assert step.packs == ("code@1.2.0",)
    assert str(broken.path) in step.reason and "changed since" in step.reason
    assert pack_engine.packs.status("code").last_error == step.reason
    assert pack_engine.packs.stats().n_failed_loads == 1

    pack_engine.packs.forget("spare")
    result = answer(pack_engine, "code")
    assert (result.packs, result.token_ids) == ((), plain)
    assert [step.packs for step in result.fallbacks] == [("code@1.2.0",)]
    with pytest.raises(PackFormatError, match="changed since"):
        answer(pack_engine, request("code", fallback="never"))


def test_scores_fall_back_as_well(pack_engine: Engine, tmp_path: Path) -> None:
    spoil(install_pack(tmp_path, "code"))
    plain = pack_engine.score(ids(20))
    assert (pack_engine.score(ids(20), packs="code").logprobs == plain.logprobs).all()
    with pytest.raises(PackFormatError):
        pack_engine.score(ids(20), packs=request("code", fallback="never"))


def test_a_fallback_that_there_is_not(pack_engine: Engine, tmp_path: Path) -> None:
    pack_engine.packs.load(str(pack_file(tmp_path)))
    with pytest.raises(InvalidRequestError) as caught:
        pack_engine.generate(ids(5), packs=request("code", fallback="sometimes"))
    assert caught.value.field == "fallback"
