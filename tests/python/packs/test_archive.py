"""Archives: the round trip, and everything a hostile one may try."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modularbase.errors import PackFormatError
from modularbase.packs.archive import read_archive_manifest, unpack, write_archive
from modularbase.packs.pack_file import inspect_pack, write_pack
from tests.python.packs.small_packs import small_gguf, small_weights


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_gguf(tmp_path_factory.mktemp("gguf") / "a.gguf")


def nothing(_: int) -> None: ...


def members(gguf: Path) -> dict[str, bytes]:
    manifest = inspect_pack(gguf).manifest.to_json().encode()
    return {"manifest.json": manifest, "README.md": b"# x\n", "pack.gguf": gguf.read_bytes()}


def write_zip(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return path


def refused(path: Path, tmp_path: Path) -> PackFormatError:
    """What is wrong with an archive; nothing may have been written outside the folder."""
    folder = tmp_path / "deep" / "inside"
    folder.mkdir(parents=True)
    with pytest.raises(PackFormatError) as caught:
        unpack(path, folder, nothing)
    assert {p.name for p in folder.iterdir()} <= {"manifest.json", "README.md", "pack.gguf"}
    assert [p.name for p in folder.parent.iterdir()] == ["inside"]
    assert str(path) in caught.value.file
    return caught.value


def test_round_trip(gguf: Path, tmp_path: Path) -> None:
    target, folder = tmp_path / "a.mbpack", tmp_path / "out"
    folder.mkdir()
    manifest = write_archive(target, gguf, "# 医疗\n", "CC0")
    seen: list[int] = []
    assert unpack(target, folder, seen.append) == manifest == read_archive_manifest(target)
    assert (folder / "pack.gguf").read_bytes() == gguf.read_bytes()
    assert (folder / "README.md").read_text(encoding="utf-8") == "# 医疗\n"
    assert (folder / "LICENSE").read_text() == "CC0"
    assert seen[-1] == gguf.stat().st_size
    before = target.read_bytes()
    write_archive(target, gguf, "# 医疗\n", "CC0")
    assert target.read_bytes() == before, "equal contents give equal archives"
    with zipfile.ZipFile(target) as file:
        assert {m.compress_type for m in file.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/evil",
        "a/../../evil",
        "..\\evil",
        "sub/pack.gguf",
        "extra.txt",
        "pack.gguf\0.txt",
        "./pack.gguf",
        "C:evil",
        "sub/",
    ],
)
def test_names_it_may_not_have(name: str, gguf: Path, tmp_path: Path) -> None:
    content = members(gguf)
    path = write_zip(tmp_path / "a.mbpack", content | {"x" * len(name): b"x"})
    # zipfile cleans names as it writes: put the true one into the bytes.
    raw = path.read_bytes()
    assert raw.count(b"x" * len(name)) >= 2
    path.write_bytes(raw.replace(b"x" * len(name), name.encode()))
    error = refused(path, tmp_path)
    assert error.field == "member"


@pytest.mark.parametrize("missing", ["manifest.json", "README.md", "pack.gguf"])
def test_members_it_must_have(missing: str, gguf: Path, tmp_path: Path) -> None:
    content = members(gguf)
    del content[missing]
    assert refused(write_zip(tmp_path / "a.mbpack", content), tmp_path).field == missing


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice(gguf: Path, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.mbpack", members(gguf))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("README.md", b"another")
    error = refused(path, tmp_path)
    assert (error.field, error.found) == ("README.md", "it twice")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
def test_members_that_are_no_plain_files(kind: int, gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mbpack"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members(gguf).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = ((kind if name == "README.md" else stat.S_IFREG) | 0o777) << 16
            file.writestr(info, b"/etc/passwd" if name == "README.md" else data)
    assert refused(path, tmp_path).expected == "a plain file"


def test_a_bomb_of_text(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mbpack"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("README.md", b"\0" * 50_000_000)
        for name, data in members(gguf).items():
            if name != "README.md":
                file.writestr(name, data, zipfile.ZIP_STORED)
    assert path.stat().st_size < 2_000_000
    error = refused(path, tmp_path)
    assert (error.field, error.found) == ("README.md", "50000000")


def test_a_bomb_that_lies_about_its_size(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mbpack"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("README.md", b"\0" * 50_000_000)
        for name, data in members(gguf).items():
            if name != "README.md":
                file.writestr(name, data, zipfile.ZIP_STORED)
    true, false = struct.pack("<I", 50_000_000), struct.pack("<I", 100)
    path.write_bytes(path.read_bytes().replace(true, false))
    refused(path, tmp_path)
    written = tmp_path / "deep" / "inside" / "README.md"
    assert not written.exists() or written.stat().st_size <= 100


def test_a_member_shorter_than_it_says(gguf: Path, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.mbpack", members(gguf) | {"README.md": b"x" * 77})
    stored = struct.pack("<II", 77, 77)  # sizes in the archive and unpacked
    raw = path.read_bytes()
    assert raw.count(stored) == 2
    path.write_bytes(raw.replace(stored, struct.pack("<II", 77, 78)))
    error = refused(path, tmp_path)
    assert (error.field, error.found) == ("README.md", "77")


def test_a_compressed_pack_file(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mbpack"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members(gguf).items():
            file.writestr(name, data)
    assert refused(path, tmp_path).expected == "a stored member"


def test_a_manifest_that_differs(gguf: Path, tmp_path: Path) -> None:
    other = inspect_pack(gguf).manifest.model_copy(update={"base_id": "qwen3-0.6b"})
    content = members(gguf) | {"manifest.json": other.to_json().encode()}
    error = refused(write_zip(tmp_path / "a.mbpack", content), tmp_path)
    assert error.field == "base_id" and "smollm2-135m" in error.expected


def test_a_pack_file_that_is_none(gguf: Path, tmp_path: Path) -> None:
    content = members(gguf) | {"pack.gguf": gguf.read_bytes()[:5000]}
    error = refused(write_zip(tmp_path / "a.mbpack", content), tmp_path)
    assert error.file.endswith("a.mbpack:pack.gguf")


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.mbpack"):
        with pytest.raises(PackFormatError, match="an archive of a pack"):
            read_archive_manifest(path)


def test_a_truncated_archive(gguf: Path, tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "a.mbpack", members(gguf)).read_bytes()
    for i in range(0, len(whole), 1 + len(whole) // 40):
        (tmp_path / "b.mbpack").write_bytes(whole[:i])
        folder = tmp_path / f"out{i}"
        folder.mkdir()
        with pytest.raises(PackFormatError):
            unpack(tmp_path / "b.mbpack", folder, nothing)


def spoil_headers(raw: bytes, edits: list[tuple[int, int]], n_gguf: int) -> bytes:
    """Changes bytes, but leaves the middle of the large member alone."""
    spoilt = bytearray(raw)
    for position, value in edits:
        at = position % (len(raw) - n_gguf + 2000)
        spoilt[at if at < 1500 else at + n_gguf - 2000] = value
    return bytes(spoilt)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 255)), max_size=4))
@example(edits=[(8969, 7)])  # the directory begins behind its end: members at negative offsets
def test_any_damage_is_named_or_harmless(
    edits: list[tuple[int, int]], gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("fuzz")
    whole = write_zip(tmp_path / "a.mbpack", members(gguf)).read_bytes()
    (tmp_path / "a.mbpack").write_bytes(spoil_headers(whole, edits, gguf.stat().st_size))
    (tmp_path / "out").mkdir()
    try:
        unpack(tmp_path / "a.mbpack", tmp_path / "out", nothing)
    except PackFormatError as error:
        assert error.expected


LINES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)


@settings(max_examples=15, deadline=None)
@given(
    name=LINES,
    description=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    priority=st.integers(-1000, 1000),
    authors=st.lists(LINES, max_size=3),
    evaluation=st.dictionaries(LINES, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)
def test_any_manifest_survives_the_archive(
    name: str,
    description: str,
    priority: int,
    authors: list[str],
    evaluation: dict[str, float],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    weights = small_weights(
        "医疗问答包@2.0.0rc1",
        ["reasoning >=1.1"],
        title=name,
        description=description,
        priority=priority,
        authors=tuple(authors),
        evaluation=evaluation,
    )
    facts = write_pack(folder / "a.gguf", weights)
    write_archive(folder / "a.mbpack", folder / "a.gguf", "# x\n")
    (folder / "out").mkdir()
    found = unpack(folder / "a.mbpack", folder / "out", nothing)
    expected = weights.manifest.model_copy(update={"size_bytes": facts.manifest.size_bytes})
    assert found == expected == read_archive_manifest(folder / "a.mbpack")
