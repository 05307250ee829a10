"""The packs of an engine by name: loading, versions, swaps, pins, evictions, and what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modularbase import Engine
from modularbase.errors import (
    BudgetExceededError,
    InvalidRequestError,
    PackIncompatibleError,
    PackNotFoundError,
)
from tests.python.conftest import PackEngineFactory
from tests.tools.engine_packs import (
    WAIT_S,
    answer,
    eventually,
    install_pack,
    leased,
    pack_file,
    tokens,
)
from tests.tools.tiny_models import N_EMBD, N_LAYER


def load_file(engine: Engine, folder: Path, name: str = "code@1.0.0", **options: Any) -> str:
    """Loads a new pack file; returns its digest."""
    return engine.packs.load(str(pack_file(folder, name, **options))).digest


def states(engine: Engine) -> dict[str, str]:
    return {status.id: status.state for status in engine.packs.list()}


def test_a_file_is_loaded_under_its_manifests_id(pack_engine: Engine, tmp_path: Path) -> None:
    path = pack_file(tmp_path, "code@1.2.0")
    status = pack_engine.packs.load(str(path))
    assert (status.id, status.version, status.path) == ("code", "1.2.0", str(path))
    assert status.digest.startswith("sha256:") and len(status.digest) == 71
    with_pack = answer(pack_engine, "code")
    assert [(used.id, used.version, used.digest) for used in with_pack.packs] == [
        ("code", "1.2.0", status.digest)
    ]
    assert with_pack.token_ids != tokens(pack_engine)
    assert answer(pack_engine).packs == ()


@pytest.mark.parametrize(
    ("spec", "version"),
    [
        ("code", "1.1.0"),  # a pre-release only where no release suits
        ("code@1.0.0", "1.0.0"),
        ("code@>=1,<1.1", "1.0.0"),
        ("code@*", "1.1.0"),
        ("code@>=2.0.0a1", "2.0.0rc1"),
    ],
)
def test_a_name_means_the_newest_installed_version_that_suits(
    spec: str, version: str, pack_engine: Engine, tmp_path: Path
) -> None:
    for installed in ("1.1.0", "1.0.0", "2.0.0rc1"):
        install_pack(tmp_path, f"code@{installed}")
    install_pack(tmp_path, "code@3.0.0", manifest={"base_compatibility": (">=2",)})
    assert answer(pack_engine, spec).packs[0].version == version
    assert pack_engine.packs.load(spec).version == version


def test_a_version_that_is_not_installed(pack_engine: Engine, tmp_path: Path) -> None:
    install_pack(tmp_path, "code@1.0.0")
    with pytest.raises(PackNotFoundError) as caught:
        pack_engine.packs.load("code@>=2")
    assert (caught.value.pack_id, caught.value.required) == ("code", ">=2")
    assert "code 1.0.0" in caught.value.known
    with pytest.raises(PackNotFoundError, match="code >=2"):
        pack_engine.generate("a", packs="code@>=2")
    assert pack_engine.packs.list() == []


def test_a_request_for_another_version_leaves_the_name_alone(
    pack_engine: Engine, tmp_path: Path
) -> None:
    for version in ("1.0.0", "2.0.0"):
        install_pack(tmp_path, f"code@{version}")
    newest = tokens(pack_engine, "code")
    oldest = tokens(pack_engine, "code@1.0.0")
    assert newest != oldest
    assert pack_engine.packs.status("code").version == "2.0.0"
    assert tokens(pack_engine, "code") == newest
    n_loads = pack_engine.packs.stats().n_loads
    both = answer(pack_engine, ["code@2.0.0", "code@1.0.0"])
    assert [used.version for used in both.packs] == ["2.0.0", "1.0.0"]
    assert tokens(pack_engine, "code@1.0.0") == oldest
    assert pack_engine.packs.stats().n_loads == n_loads == 2
    pack_engine.packs.forget("code")
    assert pack_engine.packs.list() == []


def test_load_points_a_name_to_another_version(pack_engine: Engine, tmp_path: Path) -> None:
    install_pack(tmp_path, "code@1.0.0")
    old = tokens(pack_engine, "code")
    install_pack(tmp_path, "code@1.1.0")
    assert pack_engine.packs.status("code").version == "1.0.0"
    assert pack_engine.packs.load("code").version == "1.1.0"
    assert tokens(pack_engine, "code") != old
    pack_engine.packs.load("code@1.0.0")
    assert tokens(pack_engine, "code") == old
    assert [status.version for status in pack_engine.packs.list()] == ["1.0.0"]


def test_status_tells_what_happened(pack_engine: Engine, tmp_path: Path, slot_bytes: int) -> None:
    load_file(pack_engine, tmp_path)
    fresh = pack_engine.packs.status("code")
    assert (fresh.state, fresh.n_bytes, fresh.n_loads) == ("resident", slot_bytes, 1)
    assert (fresh.n_hits, fresh.n_leases, fresh.last_error) == (1, 0, "")  # the probe's
    assert fresh.slot is not None and fresh.slot > 0  # slot 0 is the zero pack
    assert fresh.verify_us > 0 and fresh.load_us > 0
    assert not fresh.is_pinned and not fresh.is_retired
    answer(pack_engine, "code")
    used = pack_engine.packs.status("code")
    assert (used.n_hits, used.n_leases) == (2, 0)
    assert used.idle_s is not None and 0 <= used.idle_s < WAIT_S
    with leased(pack_engine, "code"):
        assert pack_engine.packs.status("code").n_leases == 1
    assert pack_engine.packs.status("code").n_leases == 0


def test_stats_count_what_happened(
    pack_engines: PackEngineFactory, tmp_path: Path, slot_bytes: int
) -> None:
    engine = pack_engines(n_slots=2)
    assert engine.packs.stats().budget_bytes == 2 * slot_bytes
    assert engine.packs.stats().used_bytes == 0
    for name in ("a@1.0.0", "b@1.0.0", "c@1.0.0"):
        load_file(engine, tmp_path, name)
    stats = engine.packs.stats()
    assert (stats.n_loads, stats.n_evictions, stats.n_failed_loads) == (3, 1, 0)
    assert stats.used_bytes == 2 * slot_bytes
    engine.packs.evict("c")
    assert engine.packs.stats().used_bytes == slot_bytes


def test_the_least_recently_used_pack_goes_first(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    engine = pack_engines(n_slots=2)
    alone = {}
    for name in ("a", "b", "c"):
        load_file(engine, tmp_path, f"{name}@1.0.0")
        alone[name] = tokens(engine, name)
    assert states(engine) == {"a": "known", "b": "resident", "c": "resident"}
    tokens(engine, "b")
    assert tokens(engine, "a") == alone["a"]
    assert states(engine) == {"a": "resident", "b": "resident", "c": "known"}
    assert tokens(engine, "c") == alone["c"]
    assert engine.packs.status("a").n_loads == 2


def test_an_evicted_pack_is_loaded_again_when_needed(pack_engine: Engine, tmp_path: Path) -> None:
    load_file(pack_engine, tmp_path)
    before = tokens(pack_engine, "code")
    pack_engine.packs.evict("code")
    evicted = pack_engine.packs.status("code")
    assert (evicted.state, evicted.slot) == ("known", None)
    pack_engine.packs.evict("code")  # which it is
    assert tokens(pack_engine, "code") == before
    assert pack_engine.packs.status("code").n_loads == 2


def test_a_running_request_keeps_its_pack(pack_engine: Engine, tmp_path: Path) -> None:
    load_file(pack_engine, tmp_path)
    with leased(pack_engine, "code") as running:
        with pytest.raises(BudgetExceededError, match="requests are using it"):
            pack_engine.packs.evict("code")
        assert pack_engine.packs.status("code").state == "resident"
        n_pieces = sum(1 for _ in zip(range(20), running, strict=False))
        assert n_pieces == 20  # it goes on
    pack_engine.packs.evict("code")


def test_a_running_request_stays_with_what_it_began_with(
    pack_engine: Engine, tmp_path: Path
) -> None:
    old = load_file(pack_engine, tmp_path, "code@1.0.0")
    path = pack_file(tmp_path, "code@1.1.0")
    with leased(pack_engine, "code") as running:
        pieces = iter(running)
        new = pack_engine.packs.swap("code", str(path)).digest
        listed = [(s.digest, s.is_retired, s.n_leases) for s in pack_engine.packs.list()]
        assert listed == [(new, False, 0), (old, True, 1)]
        assert answer(pack_engine, "code").packs[0].digest == new
        # The first piece holds what came before the swap; the others came behind it.
        seen = [i for _, piece in zip(range(20), pieces, strict=False) for i in piece.token_ids]
    assert [status.digest for status in pack_engine.packs.list()] == [new]
    pack_engine.packs.swap("old", str(tmp_path / "code-1.0.0.gguf"))
    assert seen == tokens(pack_engine, "old", max_tokens=len(seen))
    assert seen != tokens(pack_engine, "code", max_tokens=len(seen))


def test_two_names_of_one_content(pack_engine: Engine, tmp_path: Path) -> None:
    path = str(pack_file(tmp_path))
    digest = pack_engine.packs.load(path).digest
    status = pack_engine.packs.swap("alias", path)
    assert (status.id, status.digest) == ("alias", digest)
    assert pack_engine.packs.status("alias").id == "alias"
    assert [status.id for status in pack_engine.packs.list()] == ["alias", "code"]
    assert pack_engine.packs.stats().n_loads == 1
    expected = tokens(pack_engine, "code")
    pack_engine.packs.forget("code")
    with pytest.raises(PackNotFoundError):
        pack_engine.packs.status("code")
    assert tokens(pack_engine, "alias") == expected
    pack_engine.packs.forget("alias")
    assert pack_engine.packs.list() == []
    assert pack_engine.packs.stats().used_bytes == 0


def test_create_wants_a_new_name(pack_engine: Engine, tmp_path: Path) -> None:
    first = pack_engine.packs.swap("code", str(pack_file(tmp_path)), mode="create")
    other = str(pack_file(tmp_path, "code@2.0.0"))
    with pytest.raises(PackIncompatibleError) as caught:
        pack_engine.packs.swap("code", other, mode="create")
    assert (caught.value.field, caught.value.found) == ("name", first.digest)
    assert [status.digest for status in pack_engine.packs.list()] == [first.digest]


def test_compare_and_swap_wants_the_generation_it_knows(
    pack_engine: Engine, tmp_path: Path
) -> None:
    path, other = str(pack_file(tmp_path)), str(pack_file(tmp_path, "code@2.0.0"))
    with pytest.raises(PackIncompatibleError) as caught:
        pack_engine.packs.swap("code", path, mode="compare_and_swap", expected="sha256:0")
    assert caught.value.found == "nothing"
    first = pack_engine.packs.load(path)
    with pytest.raises(PackIncompatibleError) as caught:
        pack_engine.packs.swap("code", other, mode="compare_and_swap", expected="sha256:0")
    assert (caught.value.field, caught.value.required) == ("generation", "sha256:0")
    assert caught.value.found == first.digest == pack_engine.packs.status("code").digest
    expected = first.digest
    new = pack_engine.packs.swap("code", other, mode="compare_and_swap", expected=expected)
    assert pack_engine.packs.status("code").digest == new.digest != first.digest


def test_swaps_that_make_no_sense(pack_engine: Engine, tmp_path: Path) -> None:
    path = str(pack_file(tmp_path))
    for name in ("", "code@1.0.0", "a b", "../up", "cafe\u0301"):
        with pytest.raises(InvalidRequestError):
            pack_engine.packs.swap(name, path)
    unknown: Any = "replace"
    with pytest.raises(InvalidRequestError, match="mode"):
        pack_engine.packs.swap("code", path, mode=unknown)
    assert pack_engine.packs.list() == []


def test_swap_takes_an_installed_version(pack_engine: Engine, tmp_path: Path) -> None:
    for version in ("1.0.0", "2.0.0"):
        install_pack(tmp_path, f"code@{version}")
    assert pack_engine.packs.swap("tuned", "code@<2").version == "1.0.0"
    assert answer(pack_engine, "tuned").packs[0].version == "1.0.0"
    assert tokens(pack_engine, "code") != tokens(pack_engine, "tuned")


def test_a_pinned_pack_stays(pack_engines: PackEngineFactory, tmp_path: Path) -> None:
    engine = pack_engines(n_slots=2)
    for name in ("a@1.0.0", "b@1.0.0", "c@1.0.0"):
        install_pack(tmp_path, name)
    engine.packs.pin("a")  # which loads it
    assert engine.packs.status("a").is_pinned
    for name in ("b", "c", "b"):
        tokens(engine, name)
    assert engine.packs.status("a").state == "resident"
    assert engine.packs.status("a").n_loads == 1
    with pytest.raises(BudgetExceededError, match="pinned"):
        engine.packs.evict("a")
    engine.packs.pin("b")
    with pytest.raises(BudgetExceededError, match="bytes are pinned"):
        engine.packs.pin("c")
    engine.packs.unpin("a")
    engine.packs.load("c")
    assert states(engine) == {"a": "known", "b": "resident", "c": "resident"}
    assert not engine.packs.status("c").is_pinned  # the pin that failed has not stayed


def test_a_pin_stays_with_its_name(pack_engine: Engine, tmp_path: Path) -> None:
    load_file(pack_engine, tmp_path, "code@1.0.0")
    pack_engine.packs.pin("code")
    with leased(pack_engine, "code"):
        assert load_file(pack_engine, tmp_path, "code@1.1.0")
        new, old = pack_engine.packs.list()
        assert (new.version, new.is_pinned, new.is_retired) == ("1.1.0", True, False)
        assert (old.version, old.is_pinned, old.is_retired) == ("1.0.0", False, True)
    pack_engine.packs.unpin("code")
    load_file(pack_engine, tmp_path, "code@1.2.0")
    assert not pack_engine.packs.status("code").is_pinned


def test_preload_loads_when_there_is_time(pack_engine: Engine, tmp_path: Path) -> None:
    install_pack(tmp_path)
    pack_engine.packs.preload("code")
    eventually(lambda: pack_engine.packs.status("code").state == "resident")
    stats = pack_engine.packs.stats()
    assert (stats.n_loads, stats.n_preloads, stats.n_preload_hits) == (1, 1, 0)
    tokens(pack_engine, "code")
    stats = pack_engine.packs.stats()
    assert (stats.n_loads, stats.n_preload_hits, stats.n_preload_wastes) == (1, 1, 0)
    pack_engine.packs.evict("code")
    pack_engine.packs.preload("code")
    eventually(lambda: pack_engine.packs.status("code").state == "resident")
    pack_engine.packs.evict("code")
    assert pack_engine.packs.stats().n_preload_wastes == 1
    with pytest.raises(PackNotFoundError):
        pack_engine.packs.preload("poems")


@pytest.mark.parametrize("call", ["status", "evict", "pin", "unpin", "load"])
def test_names_that_nobody_knows(call: str, pack_engine: Engine, tmp_path: Path) -> None:
    load_file(pack_engine, tmp_path)
    with pytest.raises(PackNotFoundError) as caught:
        getattr(pack_engine.packs, call)("poems")
    assert caught.value.pack_id == "poems"
    pack_engine.packs.forget("poems")


def test_scores_and_hidden_states_with_packs(pack_engine: Engine, tmp_path: Path) -> None:
    load_file(pack_engine, tmp_path)
    prompt = list(range(20))
    plain, changed = pack_engine.score(prompt), pack_engine.score(prompt, packs="code")
    assert plain.perplexity != changed.perplexity
    first, last = 1, N_LAYER + 1
    for layer, is_same in ((first, True), (last, False)):
        with_pack = pack_engine.hidden(prompt, layer, packs="code")
        assert with_pack.shape == (20, N_EMBD)
        assert (with_pack == pack_engine.hidden(prompt, layer)).all() == is_same
    assert pack_engine.packs.status("code").n_leases == 0


def test_an_engine_without_packs(pack_engines: PackEngineFactory) -> None:
    engine = pack_engines(n_slots=0)
    assert tokens(engine)
    for call in (lambda: engine.packs, lambda: engine.submit((1, 2), packs="code")):
        with pytest.raises(InvalidRequestError, match="pack_budget_bytes"):
            call()
    assert tokens(engine, "none") == tokens(engine, ()) == tokens(engine)
