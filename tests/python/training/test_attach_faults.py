"""Attached packs when something goes wrong: the old generation serves on, the error says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from modularbase import Engine
from modularbase.errors import ChannelError
from tests.python.training import published
from tests.python.training.segment_bytes import shm_file
from tests.python.training.test_channel_faults import poke
from tests.tools.engine_packs import WAIT_S, eventually, tokens

HALF_WRITTEN = """
import sys, time
from tests.python.training import published
channel = published.writer(sys.argv[1])
published.publish(channel, 1)
published.fill(channel, 2)  # the generation that it never shows
print("made", flush=True)
while True: time.sleep(0.05)
"""

FOLLOW = """
import sys, time
from modularbase import Engine
engine = Engine.load(sys.argv[2], dtype="keep", n_threads=1)
engine.attach("code", channel=sys.argv[1]).wait(1)
print("made", flush=True)
while True: time.sleep(0.05)
"""


@contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has said that it is ready; killed at the end of the block."""
    command = [sys.executable, "-c", program, *arguments]
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


def test_a_writer_killed_in_the_middle_of_a_publish(pack_engine: Engine, name: str) -> None:
    with running(HALF_WRITTEN, name) as process:
        attachment = pack_engine.attach("code", channel=name)
        attachment.wait(1, WAIT_S)
        before = tokens(pack_engine, "code")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(ChannelError, match="owner") as caught:
            attachment.wait(2, WAIT_S)
    assert attachment.last_error is caught.value
    assert not attachment.is_live
    assert tokens(pack_engine, "code") == before
    with published.writer(name) as channel:  # takes the place of what was left behind
        assert str(process.pid) in channel.notice
        with pack_engine.attach("code", channel=name) as attachment:
            attachment.wait(published.publish(channel, 3), WAIT_S)
            assert tokens(pack_engine, "code") != before
    assert not shm_file(name).exists()


def test_a_writer_that_ends(pack_engine: Engine, name: str) -> None:
    with published.writer(name) as channel:
        attachment = pack_engine.attach("code", channel=name)
        published.publish(channel, 1)
    # What it published before it closed is served, and its end is no error.
    assert attachment.wait(1, WAIT_S) == 1
    eventually(lambda: not attachment.is_live)
    assert attachment.last_error is None
    assert tokens(pack_engine, "code") != tokens(pack_engine)
    with pytest.raises(ChannelError, match="generation: expected 2, found 1"):
        attachment.wait(2, WAIT_S)


def test_an_engine_killed_while_it_follows(pack_engine: Engine, name: str) -> None:
    with published.writer(name) as channel:
        published.publish(channel, 1)
        with running(FOLLOW, name, str(pack_engine.info["path"])) as process:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        with pack_engine.attach("code", channel=name) as attachment:
            assert attachment.wait(published.publish(channel, 2), WAIT_S) == 2
    assert not shm_file(name).exists()


def test_a_second_writer(pack_engine: Engine, name: str) -> None:
    with (
        published.writer(name) as channel,
        pack_engine.attach("code", channel=name) as attachment,
    ):
        attachment.wait(published.publish(channel, 1), WAIT_S)
        with pytest.raises(ChannelError, match="owner"):
            published.writer(name)
        assert attachment.wait(published.publish(channel, 2), WAIT_S) == 2
        assert attachment.last_error is None


@pytest.mark.parametrize(
    ("offset", "value", "n_bytes", "field"),
    [(0, 1, 8, "magic"), (8, 2, 4, "layout version"), (256, 0, 1, "tensor 0 : name")],
)
def test_another_layout(
    offset: int, value: int, n_bytes: int, field: str, engine: Engine, name: str
) -> None:
    with published.writer(name):
        poke(name, offset, value, n_bytes)
        with pytest.raises(ChannelError) as caught:
            engine.attach("code", channel=name)
    assert caught.value.field == field


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_segment_of_another_user(engine: Engine, name: str) -> None:
    with published.writer(name):
        os.chown(shm_file(name), 12345, 12345)
        with pytest.raises(ChannelError, match="owner: expected user 0, found user 12345"):
            engine.attach("code", channel=name)


@pytest.mark.parametrize("n_bytes", [0, 4096, 200_000])
def test_a_segment_that_got_shorter(n_bytes: int, pack_engine: Engine, name: str) -> None:
    with published.writer(name) as channel:
        attachment = pack_engine.attach("code", channel=name)
        attachment.wait(published.publish(channel, 1), WAIT_S)
        before = tokens(pack_engine, "code")
        os.truncate(shm_file(name), n_bytes)
        with pytest.raises(ChannelError) as caught:
            attachment.wait(2, WAIT_S)
        assert caught.value.field == "size"
        assert not attachment.is_live
        assert tokens(pack_engine, "code") == before
    assert not shm_file(name).exists()
