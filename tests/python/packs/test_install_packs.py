"""Installing packs from files, folders, indexes and web servers: all of them, or none."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest

from modularbase.errors import (
    DependencyError,
    InstallError,
    InvalidRequestError,
    PackFormatError,
    PackIncompatibleError,
    PackNotFoundError,
)
from modularbase.packs.index import PackIndex, open_index, write_index
from modularbase.packs.install import install, install_locked
from modularbase.packs.lockfile import Lock, lock_installed, read_lock, write_lock
from modularbase.packs.manifest import PackRequirement
from modularbase.packs.resolver import BaseVersion
from modularbase.packs.store import InstalledPack, PackStore
from modularbase.packs.tree import tree_lines
from modularbase.packs.verify import verify_installed
from modularbase.storage.progress import InstallProgress
from tests.python.packs.small_packs import small_archive, small_gguf
from tests.python.packs.web_server import serving

pytestmark = pytest.mark.usefixtures("home")

BASE = BaseVersion("smollm2-135m", "1.0.0")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of archives; code needs reasoning, which has three versions."""
    folder = tmp_path_factory.mktemp("shelf")
    small_archive(folder, "code@1.0.0", needs=["reasoning >=1.1,<2"])
    for version in ("1.0.0", "1.1.0", "2.0.0"):
        small_archive(folder, f"reasoning@{version}", needs=["logic"])
    small_archive(folder, "logic@1.0.0")
    small_archive(folder, "医疗问答包@1.0.0")
    small_archive(folder, "poems@1.0.0", conflicts=(PackRequirement(id="code"),))
    small_archive(folder, "elsewhere@1.0.0", base_id="qwen3-0.6b")
    return folder


@pytest.fixture
def index(shelf: Path) -> PackIndex:
    return open_index(shelf)


def names(packs: Sequence[InstalledPack]) -> list[str]:
    return [str(pack) for pack in packs]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_clean(home: Path) -> None:
    """No work in progress is left."""
    staging = home / "packs" / ".staging"
    assert not staging.exists() or not list(staging.iterdir())


def test_a_pack_and_what_it_needs(home: Path, index: PackIndex) -> None:
    steps: list[InstallProgress] = []
    installed = install(["code"], indexes=[index], base=BASE, progress=steps.append)
    assert names(installed) == ["logic 1.0.0", "reasoning 1.1.0", "code 1.0.0"]
    code = installed[-1]
    assert code.folder == home / "packs" / "code" / "1.0.0"
    found = {path.name for path in code.folder.iterdir()}
    assert found == {"pack.gguf", "manifest.json", "README.md", "record.json"}
    assert code.record.sha256 == sha256(code.path)
    assert code.record.n_bytes == code.path.stat().st_size
    assert code.record.source.endswith("code-1.0.0.mbpack")
    assert {step.stage for step in steps} >= {"unpack", "verify", "done"}
    assert_clean(home)
    assert names(PackStore().packs()) == ["code 1.0.0", "logic 1.0.0", "reasoning 1.1.0"]
    again = install(["code"], indexes=[index])
    assert again == installed


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("reasoning", "2.0.0"),
        ("reasoning@1.0.0", "1.0.0"),
        ("reasoning@>=1,<2", "1.1.0"),
        ("reasoning@*", "2.0.0"),
    ],
)
def test_specs(spec: str, expected: str, index: PackIndex) -> None:
    assert install([spec], indexes=[index])[-1].manifest.version == expected


@pytest.mark.parametrize("spec", ["", "@1.0", "code@", "code@new", "a b", ".hidden", "code@>1<2"])
def test_specs_that_are_none(spec: str) -> None:
    with pytest.raises(InvalidRequestError):
        install([spec])


def test_unicode_names_in_one_normal_form(home: Path, index: PackIndex, tmp_path: Path) -> None:
    assert names(install(["医疗问答包@1.0.0"], indexes=[index])) == ["医疗问答包 1.0.0"]
    small_archive(tmp_path / "cafe", "caf\u00e9@1.0.0")
    decomposed = unicodedata.normalize("NFD", "caf\u00e9")
    install([decomposed], indexes=[open_index(tmp_path / "cafe")])
    assert (home / "packs" / "caf\u00e9" / "1.0.0").is_dir()
    assert PackStore().find(PackRequirement(id=decomposed)).manifest.id == "caf\u00e9"


def test_from_files(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = small_gguf(tmp_path / "mine.gguf", "mine@1.0.0", description="Mine.")
    monkeypatch.chdir(tmp_path)
    packs = install([str(shelf / "logic-1.0.0.mbpack"), "mine.gguf"])
    assert sorted(names(packs)) == ["logic 1.0.0", "mine 1.0.0"]
    mine = PackStore().find(PackRequirement(id="mine"))
    assert mine.record.sha256 == sha256(gguf) and mine.record.source == str(gguf)
    assert "Mine." in (mine.folder / "README.md").read_text()
    with pytest.raises(InstallError) as caught:
        install(["nothing.mbpack"])
    assert caught.value.kind == "not_found"


def test_a_file_brings_its_dependencies_from_the_index(shelf: Path, index: PackIndex) -> None:
    spec = str(shelf / "code-1.0.0.mbpack")
    with pytest.raises(DependencyError, match=r"code 1\.0\.0 needs reasoning"):
        install([spec])
    assert PackStore().names() == []
    assert len(install([spec], indexes=[index])) == 3


def test_all_or_none(home: Path, shelf: Path, index: PackIndex, tmp_path: Path) -> None:
    bad = tmp_path / "bad-1.0.0.mbpack"
    bad.write_bytes((shelf / "logic-1.0.0.mbpack").read_bytes()[:-100])
    with pytest.raises(PackFormatError) as caught:
        install(["code", str(bad)], indexes=[index])
    assert caught.value.file == str(bad)
    with pytest.raises(DependencyError, match=r"poems 1\.0\.0 declares a conflict with code"):
        install(["code", "poems"], indexes=[index])
    assert PackStore().names() == []
    assert_clean(home)


def test_a_failing_disk_in_the_middle_of_the_last_step(
    home: Path, index: PackIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_at_code(self: Path, target: Path) -> Path:
        if target == home / "packs" / "code" / "1.0.0":
            raise OSError(5, "Input/output error", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_code)
    with pytest.raises(InstallError, match="Input/output"):
        install(["code"], indexes=[index])
    assert PackStore().names() == [], "what was moved in before went out again"
    monkeypatch.undo()


def test_wrong_bases(shelf: Path, index: PackIndex) -> None:
    with pytest.raises(PackIncompatibleError) as caught:
        install([str(shelf / "elsewhere-1.0.0.mbpack")], base=BASE)
    assert (caught.value.field, caught.value.required, caught.value.found) == (
        "base_id",
        "qwen3-0.6b",
        "smollm2-135m",
    )
    with pytest.raises(DependencyError, match="not for base smollm2-135m"):
        install(["elsewhere"], indexes=[index], base=BASE)
    assert names(install(["elsewhere"], indexes=[index])) == ["elsewhere 1.0.0"]


def test_a_base_version_that_does_not_suit(tmp_path: Path) -> None:
    path = small_archive(tmp_path, "old@1.0.0", base_compatibility=("<1",))
    with pytest.raises(PackIncompatibleError) as caught:
        install([str(path)], base=BASE)
    assert (caught.value.field, caught.value.required) == ("base_compatibility", "<1")


def test_packs_of_different_bases_do_not_need_each_other(tmp_path: Path) -> None:
    small_archive(tmp_path, "a@1.0.0", needs=["b"])
    small_archive(tmp_path, "b@1.0.0", base_id="qwen3-0.6b")
    with pytest.raises(DependencyError, match="name the base"):
        install(["a"], indexes=[open_index(tmp_path)])


def test_a_version_has_one_content(home: Path, shelf: Path, tmp_path: Path) -> None:
    path = str(shelf / "logic-1.0.0.mbpack")
    before = install([path])
    other = small_archive(tmp_path, "logic@1.0.0", seed=5)
    with pytest.raises(InstallError, match="version of its own") as caught:
        install([str(other)])
    assert caught.value.kind == "digest"
    assert install([path]) == before
    assert_clean(home)


# --- indexes and the web ---


def test_an_index_of_a_folder(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, "logic@1.0.0")
    small_gguf(tmp_path / "pack.gguf", "logic@1.0.0")  # what the archive was made of
    small_gguf(tmp_path / "mine.gguf", "mine@1.0.0")
    (tmp_path / "notes.txt").write_text("not a pack")
    assert len(open_index(tmp_path).entries) == 2
    entries = write_index(tmp_path).entries
    raw = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert [pack["file"] for pack in raw["packs"]] == ["logic-1.0.0.mbpack", "mine.gguf"]
    assert entries[0].sha256 == sha256(archive)
    for place in (tmp_path, tmp_path / "index.json"):
        assert open_index(place).entries == entries
    small_gguf(tmp_path / "other.gguf", "mine@1.0.0", seed=4, description="another")
    with pytest.raises(PackFormatError, match="version of its own"):
        write_index(tmp_path)


def spoilt_index(folder: Path, key: str, value: object) -> Path:
    small_archive(folder, "logic@1.0.0")
    write_index(folder)
    raw = json.loads((folder / "index.json").read_text())
    raw["packs"][0][key] = value
    (folder / "index.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../x.mbpack"),
        ("file", "/etc/x.mbpack"),
        ("file", "http://elsewhere/x.mbpack"),
        ("file", "x.exe"),
        ("sha256", "12"),
        ("version", "2.0.0"),
        ("surprise", 1),
    ],
)
def test_an_index_that_makes_no_sense(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(PackFormatError, match=r"index\.json"):
        open_index(spoilt_index(tmp_path, key, value))


def test_an_index_with_a_wrong_digest(home: Path, tmp_path: Path) -> None:
    index = open_index(spoilt_index(tmp_path, "sha256", "0" * 64))
    with pytest.raises(InstallError, match="expected 0000") as caught:
        install(["logic"], indexes=[index])
    assert caught.value.kind == "digest"
    assert PackStore().names() == []
    assert_clean(home)


def test_an_index_that_shows_another_manifest(tmp_path: Path) -> None:
    small_archive(tmp_path, "logic@1.0.0")
    write_index(tmp_path)
    text = (tmp_path / "index.json").read_text().replace('"priority": 0', '"priority": 9')
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(PackFormatError, match="the index shows"):
        install(["logic"], indexes=[open_index(tmp_path)])


def test_indexes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InstallError) as caught:
        open_index(tmp_path / "nowhere")
    assert caught.value.kind == "not_found"
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(PackFormatError):
        open_index(tmp_path)


def test_from_the_web(home: Path, tmp_path: Path) -> None:
    archive = small_archive(tmp_path / "web", "医疗问答包@1.0.0")
    small_archive(tmp_path / "web", "code@1.0.0", needs=["医疗问答包"])
    write_index(tmp_path / "web")
    with serving(tmp_path / "web") as web:
        index = open_index(web.address)
        web.n_cuts = 1
        installed = install(["code"], indexes=[index])
        assert names(installed) == ["医疗问答包 1.0.0", "code 1.0.0"]
        assert any(asked for _, _, asked in web.requests), "a cut download goes on"
        PackStore().remove_needed(PackRequirement(id="医疗问答包"))
        url = f"{web.address}/{archive.name}"
        with pytest.raises(InvalidRequestError, match="sha256="):
            install([f"{url}#md5=12"])
        with pytest.raises(InstallError, match="expected 0000") as caught:
            install([f"{url}#sha256={'0' * 64}"])
        assert caught.value.kind == "digest"
        assert_clean(home)
        (pack,) = install([f"{url}?token=a/b#sha256={sha256(archive)}"])
        assert pack.record.source == f"{url}?token=a/b"


def test_web_servers_that_fail(tmp_path: Path) -> None:
    small_archive(tmp_path, "logic@1.0.0")
    with serving(tmp_path) as web:
        for url in (f"{web.address}/none.mbpack", web.address + "/none.gguf"):
            with pytest.raises(InstallError) as caught:
                install([url])
            assert caught.value.kind == "not_found"
        with pytest.raises(InstallError) as caught:
            open_index(web.address)
        assert caught.value.kind == "not_found"
        web.tells_size = False
        with pytest.raises(InstallError, match="how large"):
            install([f"{web.address}/logic-1.0.0.mbpack"])
        web.status = 503
        with pytest.raises(InstallError, match="503") as caught:
            open_index(web.address)
        assert caught.value.kind == "network"
    with pytest.raises(InstallError) as caught:
        install(["http://127.0.0.1:9/x.mbpack"])  # the discard port: refused
    assert caught.value.kind == "network"


# --- processes ---

INSTALL = """
    import os, signal, sys
    from pathlib import Path
    from modularbase.packs.index import open_index
    from modularbase.packs.install import install
    n_left, rename = int(sys.argv[2]), Path.rename
    def die(self, target):
        global n_left
        if n_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        n_left -= 1
        return rename(self, target)
    Path.rename = die
    install(["code"], indexes=[open_index(sys.argv[1])])
"""


@pytest.mark.parametrize("n_renames", range(7))
def test_kill_9_at_every_rename(n_renames: int, home: Path, shelf: Path, index: PackIndex) -> None:
    script = [sys.executable, "-c", textwrap.dedent(INSTALL), str(shelf), str(n_renames)]
    done = subprocess.run(script, check=False)
    assert done.returncode == -signal.SIGKILL
    store = PackStore()
    for pack in store.packs():  # what there is, is whole, and has what it needs
        verdict = verify_installed(pack.manifest.id, pack.manifest.version, store)
        assert verdict.faults == ()
    with store.changing():
        pass
    # Three packs are prepared; the fourth rename is the decision.
    assert len(store.names()) == (3 if n_renames > 3 else 0)
    assert_clean(home)
    assert len(install(["code"], indexes=[index])) == 3
    assert_clean(home)


def test_two_installs_at_once(home: Path, index: PackIndex) -> None:
    steps: list[InstallProgress] = []
    outcomes: list[list[InstalledPack]] = []

    def run() -> None:
        outcomes.append(install(["code"], indexes=[index], progress=steps.append))

    threads = [threading.Thread(target=run) for _ in range(4)]
    with PackStore().changing():
        for thread in threads:
            thread.start()
        while sum(step.stage == "wait" for step in steps) < 4:
            pass
        assert PackStore().names() == []
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4 and all(outcome == outcomes[0] for outcome in outcomes)
    assert sum(step.stage == "unpack" and step.name.startswith("code") for step in steps) == 1
    assert_clean(home)


# --- what is installed ---


def test_find_takes_the_newest_release(index: PackIndex, tmp_path: Path) -> None:
    for version in ("1.0.0", "1.1.0"):
        install([f"reasoning@{version}"], indexes=[index])
    install([str(small_archive(tmp_path, "reasoning@9.0.0rc1"))])
    store = PackStore()
    assert store.find(PackRequirement(id="reasoning")).manifest.version == "1.1.0"
    assert store.find(PackRequirement(id="reasoning", version=">2")).manifest.version == "9.0.0rc1"
    with pytest.raises(PackNotFoundError) as caught:
        store.find(PackRequirement(id="reasoning", version="<1"))
    assert (caught.value.pack_id, caught.value.required) == ("reasoning", "<1")
    assert "reasoning 1.1.0" in caught.value.known


def test_remove(home: Path, index: PackIndex) -> None:
    install(["code", "reasoning@1.1.0"], indexes=[index])
    store = PackStore()
    with pytest.raises(DependencyError, match=r"reasoning 1\.1\.0 needs logic"):
        store.remove(PackRequirement(id="logic"))
    with pytest.raises(DependencyError, match=r"code 1\.0\.0 needs reasoning <2,>=1\.1"):
        store.remove(PackRequirement(id="reasoning"))
    install(["reasoning@2.0.0"], indexes=[index])
    newer = PackRequirement(id="reasoning", version="2.0.0")
    assert store.remove(newer) == ["reasoning 2.0.0"]
    assert store.remove_needed(PackRequirement(id="logic")) == ["logic 1.0.0"]
    assert verify_installed("reasoning", "1.1.0", store).faults == (
        "needs logic, which is not installed",
    )
    assert store.remove(PackRequirement(id="code")) == ["code 1.0.0"]
    assert not (home / "packs" / "code").exists()
    with pytest.raises(PackNotFoundError):
        store.remove(PackRequirement(id="code"))
    assert_clean(home)


@pytest.mark.parametrize("damage", ["content", "size", "record", "manifest", "no file", "folder"])
def test_damage_is_seen_and_repaired(damage: str, home: Path, index: PackIndex) -> None:
    (pack,) = install(["logic"], indexes=[index])
    store, folder = PackStore(), pack.folder
    whole = bytearray(pack.path.read_bytes())
    if damage == "content":
        whole[-5] ^= 1
        pack.path.write_bytes(whole)
    elif damage == "size":
        pack.path.write_bytes(whole[:-1])
    elif damage == "record":
        (folder / "record.json").write_text("[]")
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{}")
    elif damage == "no file":
        pack.path.unlink()
    else:
        folder = folder.rename(folder.with_name("3.0.0"))
    assert verify_installed("logic", folder.name, store).faults
    if damage in ("content", "folder"):  # seen by `verify` alone, or of another name
        assert store.remove(PackRequirement(id="logic")) == [f"logic {folder.name}"]
        assert store.names() == []
        return
    with pytest.raises(InstallError, match="install it again") as caught:
        store.read("logic", "1.0.0")
    assert caught.value.kind == "broken"
    assert store.packs() == [] and store.names() == [("logic", "1.0.0")]
    assert install(["logic"], indexes=[index])[0].record.sha256 == pack.record.sha256
    assert verify_installed("logic", "1.0.0", store).faults == ()
    assert_clean(home)


def test_folders_of_others_are_no_packs(home: Path, index: PackIndex) -> None:
    install(["logic"], indexes=[index])
    (home / "packs" / "logic" / "1.0.0.backup").mkdir()
    (home / "packs" / "logic" / "notes").mkdir()
    (home / "packs" / "file").write_text("")
    assert PackStore().names() == [("logic", "1.0.0")]


def test_tree(index: PackIndex) -> None:
    packs = install(["code"], indexes=[index])
    store = PackStore()
    lines = ["code 1.0.0", "└── reasoning 1.1.0 (needs <2,>=1.1)", "    └── logic 1.0.0"]
    assert tree_lines([packs[-1].manifest], store) == lines
    store.remove_needed(PackRequirement(id="logic"))
    assert tree_lines([packs[-1].manifest], store)[-1] == "    └── logic missing"


# --- lock files ---


def test_lock_round_trip(index: PackIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = install(["code", "医疗问答包"], indexes=[index])
    install(["reasoning@2.0.0"], indexes=[index])
    path = tmp_path / "modularbase-packs.lock"
    lock = lock_installed([PackRequirement(id="code")], BASE, PackStore())
    write_lock(path, lock)
    assert read_lock(path) == lock
    assert [(pack.id, pack.needed_by) for pack in lock.packs] == [
        ("logic", ("reasoning",)),
        ("reasoning", ("code",)),
        ("code", ()),
    ]
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "another"))
    again = install_locked(read_lock(path))
    assert [p.record.sha256 for p in again] == [
        p.record.sha256 for p in before if p.manifest.id != "医疗问答包"
    ]
    assert install_locked(lock) == again
    everything = lock_installed([], None, PackStore())
    assert [pack.id for pack in everything.packs] == ["logic", "reasoning", "code"]


def changed(lock: Lock, **changes: object) -> Lock:
    raw = json.loads(lock.model_dump_json())
    raw["packs"][0] |= changes
    return Lock.model_validate(raw)


def test_locks_that_do_not_hold(
    home: Path, shelf: Path, index: PackIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(["logic"], indexes=[index])
    lock = lock_installed([], None, PackStore())
    other = changed(lock, sha256="0" * 64)
    with pytest.raises(InstallError, match="the lock file says 0000") as caught:
        install_locked(other)
    assert caught.value.kind == "digest"
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "another"))
    with pytest.raises(InstallError, match="the lock file says 0000"):
        install_locked(other)
    with pytest.raises(PackFormatError, match=r"expected logic 3\.0\.0"):
        install_locked(changed(lock, version="3.0.0"))
    moved = changed(lock, source=str(tmp_path / "gone.mbpack"))
    with pytest.raises(InstallError) as caught:
        install_locked(moved)
    assert caught.value.kind == "not_found"
    assert names(install_locked(moved, indexes=[index])) == ["logic 1.0.0"]


@pytest.mark.parametrize("text", ["", "[]", '{"lock_version": 2}', '{"packs": [{"id": "x"}]}'])
def test_lock_files_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with pytest.raises(PackFormatError, match="a lock file"):
        read_lock(path)
    path.write_text(text)
    with pytest.raises(PackFormatError):
        read_lock(path)


def test_a_pack_locked_twice(index: PackIndex, tmp_path: Path) -> None:
    install(["logic"], indexes=[index])
    lock = lock_installed([], None, PackStore())
    write_lock(tmp_path / "a.lock", Lock(packs=lock.packs * 2))
    with pytest.raises(PackFormatError, match="logic twice"):
        read_lock(tmp_path / "a.lock")
