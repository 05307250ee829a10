"""Choosing versions that go together, and saying why none do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modularbase.errors import DependencyError
from modularbase.packs.manifest import Manifest, PackRequirement
from modularbase.packs.resolver import BaseVersion, Resolution, resolve

BASE = BaseVersion("smollm2-135m", "1.0.0")


class Shelf:
    """Manifests in memory."""

    def __init__(self, *manifests: Manifest) -> None:
        self.manifests = manifests

    def versions(self, pack_id: str) -> Sequence[Manifest]:
        return [manifest for manifest in self.manifests if manifest.id == pack_id]


def pack(
    name: str,
    *needs: str,
    conflicts: Sequence[str] = (),
    base_id: str = BASE.id,
    bases: Sequence[str] = ("",),
) -> Manifest:
    pack_id, _, version = name.partition("@")
    return Manifest(
        id=pack_id,
        version=version or "1.0.0",
        name=pack_id,
        domain="test",
        licence="CC0-1.0",
        base_id=base_id,
        base_compatibility=tuple(bases),
        dependencies=tuple(wanted(need) for need in needs),
        conflicts=tuple(wanted(conflict) for conflict in conflicts),
    )


def wanted(text: str) -> PackRequirement:
    pack_id, _, version = text.partition(" ")
    return PackRequirement(id=pack_id, version=version)


def solve(shelf: Shelf, *texts: str) -> Resolution:
    return resolve([wanted(text) for text in texts], shelf, BASE)


def names(resolution: Resolution) -> list[str]:
    return [f"{manifest.id}@{manifest.version}" for manifest in resolution.packs]


def test_the_newest_that_suits_everybody_dependencies_first() -> None:
    shelf = Shelf(
        pack("code@1.0.0", "reasoning >=1.1"),
        pack("maths@1.0.0", "reasoning <1.3"),
        *(pack(f"reasoning@1.{minor}.0") for minor in range(5)),
    )
    found = solve(shelf, "code", "maths")
    assert names(found) == ["reasoning@1.2.0", "code@1.0.0", "maths@1.0.0"]
    assert found.needed_by["reasoning"] == ("code", "maths")


def test_an_older_version_is_taken_when_the_newest_cannot_be_satisfied() -> None:
    shelf = Shelf(pack("code@2.0.0", "reasoning >=9"), pack("code@1.0.0"), pack("reasoning@1.0.0"))
    assert names(solve(shelf, "code")) == ["code@1.0.0"]


def test_a_pre_release_only_where_no_release_suits() -> None:
    shelf = Shelf(pack("code@1.0.0"), pack("code@1.1.0rc1"))
    assert names(solve(shelf, "code")) == ["code@1.0.0"]
    assert names(solve(shelf, "code >1.0.0")) == ["code@1.1.0rc1"]


def test_packs_of_another_base_do_not_count() -> None:
    shelf = Shelf(pack("code@2.0.0", base_id="qwen"), pack("code@1.0.0", bases=["<1.1"]))
    assert names(solve(shelf, "code")) == ["code@1.0.0"]
    with pytest.raises(DependencyError, match=r"not for base smollm2-135m 1\.0\.0 but qwen"):
        solve(Shelf(pack("code@2.0.0", base_id="qwen")), "code")


def test_a_conflict_of_versions_says_who_needs_what() -> None:
    shelf = Shelf(
        pack("code", "reasoning >=2"),
        pack("maths", "reasoning <2"),
        pack("reasoning@1.0.0"),
        pack("reasoning@2.0.0"),
    )
    with pytest.raises(DependencyError) as caught:
        solve(shelf, "code", "maths")
    message = str(caught.value)
    assert "code 1.0.0 needs reasoning >=2" in message
    assert "maths 1.0.0 needs reasoning <2" in message
    assert "known: 1.0.0, 2.0.0" in message


def test_an_unknown_pack_is_named() -> None:
    with pytest.raises(DependencyError, match=r"you ask for nothing.*no such pack is known"):
        solve(Shelf(), "nothing")
    with pytest.raises(DependencyError, match=r"code 1\.0\.0 needs nothing"):
        solve(Shelf(pack("code", "nothing")), "code")


def test_a_declared_conflict_is_refused_only_for_its_versions() -> None:
    shelf = Shelf(pack("code", conflicts=["poems <2"]), pack("poems@1.0.0"))
    with pytest.raises(DependencyError, match=r"code 1\.0\.0 declares a conflict with poems <2"):
        solve(shelf, "code", "poems")
    newer = Shelf(*shelf.manifests, pack("poems@2.0.0"))
    assert names(solve(newer, "code", "poems")) == ["code@1.0.0", "poems@2.0.0"]


def test_a_circle_is_shown() -> None:
    shelf = Shelf(pack("a", "b"), pack("b", "c"), pack("c", "a"))
    with pytest.raises(DependencyError, match="a -> b -> c -> a"):
        solve(shelf, "a")


@given(
    needs=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 4), st.integers(0, 2)),
        max_size=8,
    )
)
def test_agrees_with_trying_every_combination(needs: list[tuple[int, int, int, int]]) -> None:
    ids, versions = range(5), range(3)
    wants: dict[tuple[int, int], dict[str, str]] = {}
    for owner, version, other, exactly in needs:
        if owner < other:  # no circles: they are another test's
            wants.setdefault((owner, version), {})[f"p{other}"] = f"=={exactly}.0.0"
    shelf = Shelf(
        *(
            pack(f"p{i}@{v}.0.0", *(f"{k} {s}" for k, s in wants.get((i, v), {}).items()))
            for i in ids
            for v in versions
        )
    )

    def holds(choice: tuple[int, ...]) -> bool:
        chosen = {0}
        for i in ids:
            if i in chosen:
                for other, specifier in wants.get((i, choice[i]), {}).items():
                    chosen.add(int(other[1:]))
                    if not wanted(f"{other} {specifier}").accepts(f"{choice[int(other[1:])]}.0.0"):
                        return False
        return True

    if not any(holds(choice) for choice in itertools.product(versions, repeat=5)):
        with pytest.raises(DependencyError):
            solve(shelf, "p0")
        return
    found = {manifest.id: manifest for manifest in solve(shelf, "p0").packs}
    for manifest in found.values():
        for dependency in manifest.dependencies:
            assert dependency.accepts(found[dependency.id].version)
