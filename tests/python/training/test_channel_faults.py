"""Channels when something goes wrong: named errors, and no segment that stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from modularbase.errors import ChannelError
from modularbase.training.channel import TensorSpec, WeightChannelReader, WeightChannelWriter
from tests.python.training.segment_bytes import shm_file

SPECS = [TensorSpec("a", "f32", (2, 512))]

MAKE_ONE = """
import sys, time
import numpy as np
from modularbase.training.channel import TensorSpec, WeightChannelWriter
writer = WeightChannelWriter(sys.argv[1], [TensorSpec("a", "f32", (2, 512))])
writer.array("a")[:] = 7
writer.publish()
writer.array("a")[0] = 8
print("made", flush=True)
"""
# In short pieces: a signal just before a sleep does not end it.
SLEEP = "while True: time.sleep(0.05)\n"


@contextmanager
def running(program: str, name: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has made a segment of that name; killed at the end where it still runs."""
    command = [sys.executable, "-c", program, name]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            if process.stdout.readline() != "made\n":
                pytest.fail(process.stderr.read())
            yield process
        finally:
            process.kill()


def poke(name: str, offset: int, value: int, n_bytes: int) -> None:
    with shm_file(name).open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(n_bytes, "little"))


def test_a_second_writer(name: str) -> None:
    with WeightChannelWriter(name, SPECS) as writer:
        with pytest.raises(ChannelError) as caught:
            WeightChannelWriter(name, SPECS)
        error = caught.value
        assert error.segment == writer.path == f"/modularbase-{os.geteuid()}-{name}"
        assert (error.field, error.found) == ("owner", f"process {os.getpid()}")
        assert writer.publish() == 1


def test_a_second_writer_in_another_process(name: str) -> None:
    with running(MAKE_ONE + SLEEP, name) as process:
        with pytest.raises(ChannelError, match=f"found process {process.pid}"):
            WeightChannelWriter(name, SPECS)
        assert WeightChannelReader(name).generation == 1


def test_a_channel_that_is_not_there(name: str) -> None:
    with pytest.raises(ChannelError, match="file: expected a segment that can be opened"):
        WeightChannelReader(name)


@pytest.mark.parametrize(
    ("offset", "value", "n_bytes", "field"),
    [
        (0, 1, 8, "magic"),
        (8, 2, 4, "layout version"),
        (12, 0x04030201, 4, "byte order"),
        (16, 100, 8, "size"),
        (40, 7, 4, "state"),
        (168, 1 << 40, 8, "payload offset"),
        (256, 0, 1, "tensor 0 : name"),
    ],
)
def test_another_layout(offset: int, value: int, n_bytes: int, field: str, name: str) -> None:
    with WeightChannelWriter(name, SPECS):
        poke(name, offset, value, n_bytes)
        with pytest.raises(ChannelError) as caught:
            WeightChannelReader(name)
        assert caught.value.field == field


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_segment_of_another_user(name: str) -> None:
    with WeightChannelWriter(name, SPECS):
        os.chown(shm_file(name), 12345, 12345)
        with pytest.raises(ChannelError) as caught:
            WeightChannelReader(name)
        assert (caught.value.field, caught.value.found) == ("owner", "user 12345")
        with pytest.raises(ChannelError, match="owner: expected user 0, found user 12345"):
            WeightChannelWriter(name, SPECS)


def test_a_segment_that_others_may_touch(name: str) -> None:
    with WeightChannelWriter(name, SPECS):
        shm_file(name).chmod(0o660)
        with pytest.raises(ChannelError, match="mode"):
            WeightChannelReader(name)


@pytest.mark.parametrize("n_bytes", [0, 100, 4096, 5000])
def test_a_segment_that_got_shorter(n_bytes: int, name: str) -> None:
    with WeightChannelWriter(name, SPECS) as writer:
        reader = WeightChannelReader(name)
        writer.publish()
        os.truncate(shm_file(name), n_bytes)
        with pytest.raises(ChannelError) as caught:
            reader.read()
        assert caught.value.field == "size"
        with pytest.raises(ChannelError, match="size"):
            _ = reader.generation
        with pytest.raises(ChannelError, match="size"):
            reader.wait(1, timeout=1)
        with pytest.raises(ChannelError, match="size"):
            writer.array("a")
        with pytest.raises(ChannelError, match="size"):
            writer.publish()
    assert not shm_file(name).exists()


def test_no_room(name: str) -> None:
    n_bytes = shutil.disk_usage("/dev/shm").total  # others may come and go meanwhile
    with pytest.raises(ChannelError) as caught:
        WeightChannelWriter(name, [TensorSpec("a", "f32", (n_bytes // 4096 + 1, 1024))])
    assert caught.value.field == "size"
    assert int(caught.value.found) <= n_bytes
    assert not shm_file(name).exists()


def test_no_room_on_a_full_volume(name: str) -> None:
    program = MAKE_ONE.replace("(2, 512)", "(1, 1 << 18)")
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$1" "$2"'
    command = ["unshare", "--mount", "sh", "-c", mount, sys.executable, program, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if "modularbase" not in done.stderr:
        pytest.skip(f"cannot mount a volume here: {done.stderr.strip()}")
    assert "ChannelError" in done.stderr and "free bytes of shared memory" in done.stderr


def test_a_killed_writer(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with running(MAKE_ONE + SLEEP, name) as process:
        reader = WeightChannelReader(name)
        assert reader.is_live
    assert shm_file(name).exists()
    assert not reader.is_live
    assert reader.wait(1) == 1  # at once: nobody will publish a second one
    weights = reader.read()
    assert weights is not None and (weights.arrays["a"] == 7).all()
    with WeightChannelWriter(name, SPECS) as writer:
        assert writer.notice == (
            f"removed the shared-memory segment {writer.path}, "
            f"which process {process.pid} left behind when it ended"
        )
        assert writer.notice in capfd.readouterr().err
    assert not shm_file(name).exists()


@pytest.mark.parametrize("end", ["", "raise RuntimeError('x')", "sys.exit(3)", "del writer"])
def test_nothing_stays_after_an_end(end: str, name: str) -> None:
    with running(MAKE_ONE + end, name) as process:
        process.wait(timeout=30)
    assert not shm_file(name).exists()


@pytest.mark.parametrize("last", [SLEEP, "reader.wait(1)"])
def test_nothing_stays_after_ctrl_c(last: str, name: str) -> None:
    reader = "from modularbase.training.channel import WeightChannelReader as R\n"
    with running(reader + MAKE_ONE + "reader = R(sys.argv[1])\n" + last, name) as process:
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not shm_file(name).exists()


def test_a_child_does_not_remove_its_parents_segment(name: str) -> None:
    program = "import os\n" + MAKE_ONE.replace(
        'print("made"', 'child = os.fork()\nif child == 0: sys.exit()\nos.wait()\nprint("made"'
    )
    with running(program + SLEEP, name) as process:
        assert shm_file(name).exists()
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    assert not shm_file(name).exists()


READ_ON = """
import sys
from modularbase.training.channel import WeightChannelReader
reader = WeightChannelReader(sys.argv[1])
print("made", flush=True)
while True:
    reader.read()
"""


def test_a_killed_reader(name: str) -> None:
    with WeightChannelWriter(name, SPECS) as writer:
        writer.publish()
        with running(READ_ON, name):
            writer.publish()
        assert writer.publish() == 3
        weights = WeightChannelReader(name).read()
        assert weights is not None and weights.generation == 3


def test_segments_are_private(name: str) -> None:
    before = os.umask(0)
    try:
        with WeightChannelWriter(name, SPECS):
            assert shm_file(name).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
