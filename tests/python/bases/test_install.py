"""Installing from the hub (a local stand-in), and what all sources share: store, lock, errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import COMMIT, HubState, running_hub

from modularbase.bases import catalogue, install
from modularbase.bases.catalogue import BaseEntry, HubSource
from modularbase.bases.store import BaseStore
from modularbase.errors import BaseLoadError, BaseNotFoundError, InstallError
from modularbase.storage import http_download
from modularbase.storage.progress import InstallProgress

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ENTRY = BaseEntry(
    name="tiny",
    family="llama",
    source=HubSource("maker/tiny-GGUF", "tiny-q8_0.gguf"),
    sha256=None,
    licence="apache-2.0",
    n_bytes=len(CONTENT),
    filename="tiny-q8_0.gguf",
    n_layer=2,
    aliases=("tiny-instruct",),
)


@pytest.fixture
def hub() -> Iterator[HubState]:
    with running_hub() as state:
        state.files["maker/tiny-GGUF/tiny-q8_0.gguf"] = CONTENT
        yield state


@pytest.fixture(autouse=True)
def home(tmp_path: Path, hub: HubState, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(catalogue, "CATALOGUE", (ENTRY,))
    monkeypatch.setattr(http_download, "RETRY_WAIT_S", 0.0)
    return tmp_path / "home"


def partial_bytes(home: Path) -> bytes:
    files = list((home / "bases" / ".partial" / "tiny").glob("*.part"))
    assert len(files) == 1
    return files[0].read_bytes()


def assert_nothing_installed(home: Path) -> None:
    assert not (home / "bases" / "tiny").exists()
    staging = home / "bases" / ".staging"
    assert not staging.exists() or not list(staging.iterdir())


def test_install_from_the_hub(home: Path, hub: HubState) -> None:
    steps: list[InstallProgress] = []
    installed = install.install("TINY-Instruct", steps.append)
    assert installed.path == home / "bases" / "tiny" / "tiny-q8_0.gguf"
    assert installed.path.read_bytes() == CONTENT
    assert (installed.sha256, installed.revision) == (SHA256, COMMIT)
    record = json.loads((home / "bases" / "tiny" / "base.json").read_text())
    assert record["sha256"] == SHA256 and record["licence"] == "apache-2.0"
    assert record["source"] == "hf:maker/tiny-GGUF/tiny-q8_0.gguf@main"
    stages = list(dict.fromkeys(step.stage for step in steps))
    assert stages == ["download", "verify", "done"]
    assert max(s.n_done for s in steps) == len(CONTENT) == steps[0].n_total
    n_requests = len(hub.ranges)
    assert install.install("tiny") == installed
    assert len(hub.ranges) == n_requests, "an installed base is not downloaded again"


def test_a_cut_connection_is_resumed(home: Path, hub: HubState) -> None:
    hub.cut_after, hub.n_cuts = 1_000_000, 2
    assert install.install("tiny").sha256 == SHA256
    assert hub.ranges == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_failed_download_is_resumed_by_the_next_install(home: Path, hub: HubState) -> None:
    hub.cut_after, hub.n_cuts = 700_000, 1
    with pytest.raises(InstallError) as caught:
        hub_that_dies(hub)
    assert caught.value.kind == "network" and "kept" in caught.value.reason
    assert_nothing_installed(home)
    assert partial_bytes(home) == CONTENT[:700_000]
    hub.status = None
    hub.ranges.clear()
    assert install.install("tiny").sha256 == SHA256
    assert hub.ranges == ["bytes=700000-"]


def hub_that_dies(hub: HubState) -> None:
    """One cut response, then refusals."""

    def die_after_the_first(step: InstallProgress) -> None:
        if step.n_done:
            hub.status = 503

    install.install("tiny", die_after_the_first)


def test_a_server_that_ignores_ranges(home: Path, hub: HubState) -> None:
    hub.ignores_ranges = True
    hub.cut_after, hub.n_cuts = 1_000_000, 1
    assert install.install("tiny").sha256 == SHA256


def test_a_server_that_always_cuts_is_given_up(home: Path, hub: HubState) -> None:
    hub.ignores_ranges = True
    hub.cut_after, hub.n_cuts = 1_000_000, -1
    with pytest.raises(InstallError, match="gave up after 5 attempts") as caught:
        install.install("tiny")
    assert caught.value.kind == "network" and len(hub.ranges) == 6
    assert_nothing_installed(home)


def test_a_wrong_digest_is_refused_and_forgotten(home: Path, hub: HubState) -> None:
    hub.sha256["maker/tiny-GGUF/tiny-q8_0.gguf"] = "0" * 64
    with pytest.raises(InstallError, match=SHA256) as caught:
        install.install("tiny")
    assert caught.value.kind == "digest"
    assert_nothing_installed(home)
    assert not list((home / "bases" / ".partial" / "tiny").iterdir())


def test_a_pinned_digest_beats_the_hub(
    home: Path, hub: HubState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "CATALOGUE", (replace(ENTRY, sha256="1" * 64),))
    with pytest.raises(InstallError, match="expected 1111") as caught:
        install.install("tiny")
    assert caught.value.kind == "digest" and not hub.ranges


def test_a_file_without_a_digest_is_refused(home: Path, hub: HubState) -> None:
    hub.sha256["maker/tiny-GGUF/tiny-q8_0.gguf"] = "abc"
    with pytest.raises(InstallError) as caught:
        install.install("tiny")
    assert caught.value.kind == "digest"


def test_a_changed_file_is_not_glued_to_an_old_part(home: Path, hub: HubState) -> None:
    hub.cut_after, hub.n_cuts = 700_000, 1
    with pytest.raises(InstallError):
        hub_that_dies(hub)
    newer = CONTENT[::-1]
    hub.files["maker/tiny-GGUF/tiny-q8_0.gguf"] = newer
    hub.status = None
    installed = install.install("tiny")
    assert installed.path is not None and installed.path.read_bytes() == newer


def test_a_file_that_is_not_there(home: Path, hub: HubState) -> None:
    hub.files.clear()
    with pytest.raises(InstallError) as caught:
        install.install("tiny")
    assert caught.value.kind == "not_found"
    assert_nothing_installed(home)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, "not_found"), (403, "network"), (500, "network")]
)
def test_a_refused_download(home: Path, hub: HubState, status: int, kind: str) -> None:
    hub.status = status
    with pytest.raises(InstallError, match=str(status)) as caught:
        install.install("tiny")
    assert caught.value.kind == kind
    assert_nothing_installed(home)


def test_no_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    with pytest.raises(InstallError) as caught:
        install.install("tiny")
    assert caught.value.kind == "network" and caught.value.name == "tiny"
    assert_nothing_installed(home)


def test_a_server_that_never_stops_sending(home: Path, hub: HubState) -> None:
    hub.extra = b"x" * 5_000_000
    with pytest.raises(InstallError, match="more than"):
        install.install("tiny")
    assert_nothing_installed(home)


def test_an_interrupt_leaves_only_the_resumable_part(home: Path, hub: HubState) -> None:
    def interrupt(step: InstallProgress) -> None:
        if step.n_done >= 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install.install("tiny", interrupt)
    assert_nothing_installed(home)
    assert CONTENT.startswith(partial_bytes(home))
    assert install.install("tiny").sha256 == SHA256
    assert hub.ranges[-1] is not None


def test_too_little_space_is_known_before_downloading(
    home: Path, hub: HubState, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("modularbase.storage.disk.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(InstallError, match="10 bytes free") as caught:
        install.install("tiny")
    assert caught.value.kind == "disk_full" and not hub.ranges


def test_a_disk_that_fills_up(home: Path) -> None:
    """A file size limit makes write() fail in the middle, as a full disk does."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limit[1]))
    try:
        with pytest.raises(InstallError) as caught:
            install.install("tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.kind == "disk_full"
    assert_nothing_installed(home)
    assert install.install("tiny").sha256 == SHA256


def test_no_space_for_the_record(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InstallError) as caught:
        install.install("tiny")
    assert caught.value.kind == "disk_full" and caught.value.path
    assert_nothing_installed(home)


def test_an_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(InstallError, match="MODULARBASE_HOME") as caught:
        install.install("tiny")
    assert caught.value.kind == "unwritable"
    assert install.info("tiny").path is None  # reading still works


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "locked"))
    with pytest.raises(InstallError) as caught:
        install.install("tiny")
    assert caught.value.kind == "unwritable"


def test_list_info_and_remove(home: Path) -> None:
    assert [(b.name, b.path) for b in install.list_bases()] == [("tiny", None)]
    with pytest.raises(InstallError) as caught:
        install.remove("tiny")
    assert caught.value.kind == "not_installed"
    installed = install.install("tiny")
    assert install.list_bases() == [installed] == [install.info("tiny-instruct")]
    install.remove("tiny")
    assert_nothing_installed(home)
    assert install.info("tiny").installed_at is None


def test_remove_also_forgets_partial_downloads(home: Path, hub: HubState) -> None:
    hub.cut_after, hub.n_cuts = 700_000, 1
    with pytest.raises(InstallError):
        hub_that_dies(hub)
    install.remove("tiny")
    assert not (home / "bases" / ".partial" / "tiny").exists()


@pytest.mark.parametrize("damage", ["truncate", "no file", "no record", "bad record", "odd record"])
def test_damage_is_reported_and_repaired(home: Path, damage: str) -> None:
    gguf = install.install("tiny").path
    assert gguf is not None
    record = gguf.with_name("base.json")
    if damage == "truncate":
        gguf.write_bytes(CONTENT[:10])
    elif damage == "no file":
        gguf.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("{" if damage == "bad record" else "[]")
    with pytest.raises(InstallError, match="install it again") as caught:
        install.resolve("tiny", install=True)
    assert caught.value.kind == "broken"
    assert install.list_bases()[0].damage is not None
    assert install.install("tiny").damage is None
    assert install.resolve("tiny").read_bytes() == CONTENT


def test_resolve(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InstallError, match="base install tiny") as caught:
        install.resolve("tiny")
    assert caught.value.kind == "not_installed"
    path = install.resolve("tiny", install=True)
    assert path.read_bytes() == CONTENT == install.resolve("Tiny").read_bytes()
    assert "tiny: download" in capsys.readouterr().err
    other = tmp_path / "mine.gguf"
    other.write_bytes(b"GGUF")
    assert install.resolve(other) == install.resolve(str(other)) == other


@pytest.mark.parametrize("name", ["", "tinier", "../tiny", "smollm2-135m\n"])
def test_unknown_names(name: str) -> None:
    for call in (install.install, install.info, install.remove):
        with pytest.raises(BaseNotFoundError) as caught:
            call(name)
        assert caught.value.known == ("tiny",)


def test_unknown_names_and_paths_to_resolve(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFoundError, match="known bases: tiny"):
        install.resolve("tinier", install=True)
    for path in ("no/such/file", "nothing.gguf", str(tmp_path)):
        with pytest.raises(BaseLoadError) as caught:
            install.resolve(path)
        assert caught.value.file == path


def test_the_lock_makes_a_second_install_wait(home: Path, hub: HubState) -> None:
    steps: list[InstallProgress] = []
    with BaseStore().lock("tiny", lambda _: None):
        thread = threading.Thread(target=install.install, args=("tiny", steps.append))
        thread.start()
        while not steps:
            time.sleep(0.01)
        assert {step.stage for step in steps} == {"wait"}
        assert_nothing_installed(home)
    thread.join()
    assert install.info("tiny").path is not None


def test_concurrent_installs_download_once(home: Path, hub: HubState) -> None:
    threads = [threading.Thread(target=install.install, args=("tiny",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert install.info("tiny").path is not None
    assert hub.ranges == [None]


def test_a_killed_install_blocks_nobody(home: Path, hub: HubState) -> None:
    script = textwrap.dedent("""
        import os, sys
        from modularbase.bases.store import BaseStore
        store = BaseStore()
        with store.lock("tiny", print), store.staging("tiny") as stage:
            (stage / "leftover").write_text("x")
            os._exit(9)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert (home / "bases" / ".staging" / "tiny" / "leftover").exists()
    assert install.install("tiny").sha256 == SHA256
    assert not (home / "bases" / ".staging" / "tiny").exists()


def test_the_data_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODULARBASE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    if sys.platform == "linux":
        assert Path("/data/modularbase/bases") == BaseStore().root
