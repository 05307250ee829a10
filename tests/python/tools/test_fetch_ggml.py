"""The fetch script against an archive made here and a pip that hands it out."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools import fetch_ggml

SCRIPT = Path(fetch_ggml.__file__)
TOP = "made_up-1.0"
FILES = {
    f"{TOP}/PKG-INFO": b"Name: made-up",
    f"{TOP}/vendor/LICENSE": b"free",
    f"{TOP}/vendor/ggml/CMakeLists.txt": b"project(ggml)",
    f"{TOP}/vendor/ggml/src/ggml.c": b"int x;",
    f"{TOP}/vendor/other/large.bin": b"not wanted",
}
# Stands for pip: copies $FAKE_ARCHIVE to --dest, or fails with the words in $FAKE_ERROR.
FAKE_PIP = """
import os, pathlib, shutil, sys
arguments = sys.argv[1:]
folder = pathlib.Path(arguments[arguments.index("--dest") + 1])
if "FAKE_ERROR" in os.environ:
    sys.exit(os.environ["FAKE_ERROR"])
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(" ".join(arguments) + "\\n")
shutil.copy(os.environ["FAKE_ARCHIVE"], folder / "made_up-1.0.tar.gz")
"""


def write_archive(path: Path, files: dict[str, bytes], *links: tarfile.TarInfo) -> str:
    """Writes a source distribution and returns its sha256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mtime = 1_000_000_000
            tar.addfile(member, io.BytesIO(data))
        for link in links:
            tar.addfile(link)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Workplace:
    """A lock, an archive, a fake pip and the folders that the script writes to."""

    root: Path

    def __post_init__(self) -> None:
        self.archive = self.root / "index.tar.gz"
        self.lock = self.root / "ggml.lock"
        self.into = self.root / "third_party" / "ggml"
        self.cache = self.root / "cache"
        self.log = self.root / "pip.log"
        pip = self.root / "fake" / "pip"
        pip.mkdir(parents=True)
        (pip / "__init__.py").touch()
        (pip / "__main__.py").write_text(FAKE_PIP)
        self.pin(write_archive(self.archive, FILES))

    def pin(self, sha256: str) -> None:
        """Writes the lock."""
        self.lock.write_text(
            f"# a comment\nname = made-up\nversion = 1.0\nsha256 = {sha256}\n"
            "folder = vendor/ggml\nlicence = vendor/LICENSE\n"
        )

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the script with the fake pip."""
        command = [
            sys.executable,
            str(SCRIPT),
            "--lock",
            self.lock,
            "--into",
            self.into,
            *arguments,
        ]
        variables = {
            "PYTHONPATH": str(self.root / "fake"),
            "MODULARBASE_CACHE_DIR": str(self.cache),
            "FAKE_ARCHIVE": str(self.archive),
            "FAKE_LOG": str(self.log),
        }
        return subprocess.run(
            [str(part) for part in command],
            env={**os.environ, **variables, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def n_downloads(self) -> int:
        """Returns how often pip was asked for the archive."""
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def leftovers(self) -> list[Path]:
        """Returns what is neither a finished tree nor a finished download."""
        return [path for path in self.root.rglob(".fetch-*")]


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def assert_fails(done: subprocess.CompletedProcess[str], reason: str) -> None:
    """A failure is exit code 1, the reason and the other way to build, and no traceback."""
    assert done.returncode == 1
    assert re.search(reason, done.stderr), done.stderr
    assert "-DMODULARBASE_GGML_DIR=" in done.stderr
    assert "Traceback" not in done.stderr


def test_tree_holds_only_ggml_and_its_licence(workplace: Workplace) -> None:
    done = workplace.run()
    assert done.returncode == 0, done.stderr
    found = {str(p.relative_to(workplace.into)) for p in workplace.into.rglob("*") if p.is_file()}
    assert found == {"CMakeLists.txt", "LICENSE", "src/ggml.c", ".fetched"}
    assert (workplace.into / "LICENSE").read_bytes() == b"free"
    assert (workplace.into / "src/ggml.c").stat().st_mtime == 1_000_000_000
    assert workplace.leftovers() == []
    assert "--no-deps --no-binary :all:" in workplace.log.read_text()
    assert "--require-hashes" in workplace.log.read_text()


def test_second_run_needs_no_network(workplace: Workplace) -> None:
    workplace.run()
    again = workplace.run(FAKE_ERROR="no network")
    assert (again.returncode, again.stdout) == (0, "")
    assert workplace.n_downloads() == 1


def test_cached_archive_serves_a_second_clone(workplace: Workplace) -> None:
    workplace.run()
    other = workplace.root / "other"
    assert workplace.run("--into", other, FAKE_ERROR="no network").returncode == 0
    assert (other / "src" / "ggml.c").is_file()


def test_damaged_cache_is_downloaded_again(workplace: Workplace) -> None:
    workplace.run()
    (cached,) = (workplace.cache / "downloads").iterdir()
    cached.write_bytes(b"damaged")
    assert workplace.run("--into", workplace.root / "other").returncode == 0
    assert workplace.n_downloads() == 2
    assert cached.read_bytes() == workplace.archive.read_bytes()


def test_new_pin_replaces_the_tree(workplace: Workplace) -> None:
    workplace.run()
    (workplace.into / "stale.c").touch()
    files = {**FILES, f"{TOP}/vendor/ggml/src/ggml.c": b"int y;"}
    workplace.pin(write_archive(workplace.archive, files))
    assert workplace.run().returncode == 0
    assert (workplace.into / "src" / "ggml.c").read_bytes() == b"int y;"
    assert not (workplace.into / "stale.c").exists()


def test_unwritable_cache_is_no_obstacle(workplace: Workplace) -> None:
    workplace.cache.write_text("a file where the folder should be")
    done = workplace.run()
    assert done.returncode == 0, done.stderr
    assert "not cached" in done.stderr


def test_archive_mode_leaves_the_tree_alone(workplace: Workplace) -> None:
    target = workplace.root / "deep" / "archive.tar.gz"
    assert workplace.run("--archive", target).returncode == 0
    assert target.read_bytes() == workplace.archive.read_bytes()
    assert not workplace.into.exists()
    assert workplace.run("--archive", target, FAKE_ERROR="no network").returncode == 0


def test_wrong_hash(workplace: Workplace) -> None:
    workplace.pin("0" * 64)
    assert_fails(workplace.run(), r"sha256: expected 0{64}, found (?!0{64})[0-9a-f]{64}")
    assert not workplace.into.exists()
    assert workplace.leftovers() == []


def test_wrong_hash_that_pip_reports(workplace: Workplace) -> None:
    words = f"ERROR: THESE PACKAGES DO NOT MATCH\n  Expected sha256 x\n       Got        {'a' * 64}"
    assert_fails(workplace.run(FAKE_ERROR=words), r"made_up-1.0.tar.gz: sha256: .* found a{64}")


def test_no_network_keeps_the_old_tree(workplace: Workplace) -> None:
    workplace.run()
    workplace.pin("0" * 64)
    done = workplace.run(FAKE_ERROR="WARNING: retrying\nERROR: no route to host")
    assert_fails(done, r"could not download made-up==1.0 .*\n  ERROR: no route to host")
    assert "retrying" not in done.stderr
    assert (workplace.into / "src" / "ggml.c").is_file()
    assert workplace.leftovers() == []


def test_no_pip(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    lock = fetch_ggml.read_lock(workplace.lock)
    with pytest.raises(fetch_ggml.FetchError, match="has no pip"):
        fetch_ggml.pip_download(lock, workplace.root)


def symlink(name: str, target: str) -> tarfile.TarInfo:
    """Returns a member that is a symbolic link."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.SYMTYPE
    member.linkname = target
    return member


@pytest.mark.parametrize("name", ["vendor/ggml/../../../evil.c", "vendor/ggml/src/../../../evil"])
def test_path_that_leaves_the_folder(workplace: Workplace, name: str) -> None:
    files = {**FILES, f"{TOP}/{name}": b"evil"}
    workplace.pin(write_archive(workplace.archive, files))
    assert_fails(workplace.run(), "expected a file inside the archive's folder")
    assert not list(workplace.root.rglob("evil*"))


def test_link_in_the_archive(workplace: Workplace) -> None:
    link = symlink(f"{TOP}/vendor/ggml/src/out", "/etc")
    workplace.pin(write_archive(workplace.archive, FILES, link))
    assert_fails(workplace.run(), "ggml/src/out: expected a file")
    assert not workplace.into.exists()


def test_archive_without_ggml(workplace: Workplace) -> None:
    workplace.pin(write_archive(workplace.archive, {f"{TOP}/PKG-INFO": b""}))
    assert_fails(workplace.run(), "CMakeLists.txt is not in vendor/ggml")


def test_archive_that_is_none(workplace: Workplace) -> None:
    workplace.archive.write_bytes(b"<html>")
    workplace.pin(hashlib.sha256(b"<html>").hexdigest())
    assert_fails(workplace.run(), "error: .*gzip")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name = made-up\n", "expected the fields .* found name"),
        ("", "found none"),
        (
            "name = a\nversion = 1\nsha256 = beef\nfolder = f\nlicence = l\n",
            "sha256: expected 64 hex digits, found 'beef'",
        ),
    ],
)
def test_bad_lock(workplace: Workplace, text: str, reason: str) -> None:
    workplace.lock.write_text(text)
    assert_fails(workplace.run(), reason)


def test_missing_lock(workplace: Workplace) -> None:
    workplace.lock.unlink()
    assert_fails(workplace.run(), "ggml.lock: No such file")


def test_own_lock_and_licence_are_those_of_the_tree() -> None:
    root = SCRIPT.parent.parent
    lock = fetch_ggml.read_lock(root / "third_party" / "ggml.lock")
    assert lock.archive_name == f"llama_cpp_python-{lock.version}.tar.gz"
    fetched = root / "third_party" / "ggml" / "LICENSE"
    if not fetched.is_file():
        pytest.skip("the ggml sources are not fetched")
    assert (root / "third_party" / "licenses" / "ggml.txt").read_bytes() == fetched.read_bytes()
