"""An engine's tap, read by another process's means."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from modularbase import Engine
from modularbase.errors import CancelledError, ChannelError, InvalidRequestError
from modularbase.training.channel import ActivationRing
from tests.python.training.segment_bytes import shm_file

_NUMBERS = count()


@pytest.fixture
def name() -> Iterator[str]:
    """A name that no other test has."""
    name = f"pytest-tap-{os.getpid()}-{next(_NUMBERS)}"
    yield name
    shm_file(name).unlink(missing_ok=True)


def test_rows_are_the_hidden_states(own_engine: Engine, name: str) -> None:
    with own_engine.tap(name, layer=2, row_type="f32") as tap:
        expected = own_engine.hidden([5, 6, 7, 8], 2)
        ring = ActivationRing(name)
        with ring.batch(10) as records:
            assert records["token"].tolist() == [5, 6, 7, 8]
            assert records["position"].tolist() == [0, 1, 2, 3]
            assert np.array_equal(records["row"], expected)
        assert (tap.n_pushed, tap.n_dropped, tap.is_open, tap.last_error) == (4, 0, True, None)
        assert (tap.channel, tap.layer, tap.notice) == (name, 2, "")
    assert not tap.is_open and not ring.is_live and not shm_file(name).exists()
    own_engine.hidden([5, 6], 2)
    assert tap.n_pushed == 4


def test_the_first_site_and_f16_are_what_it_takes_by_itself(own_engine: Engine, name: str) -> None:
    with own_engine.tap(name) as tap:
        assert tap.layer == own_engine.info["first_site"]
        expected = own_engine.hidden([5, 6, 7], tap.layer)
        with ActivationRing(name).batch(10) as records:
            assert np.array_equal(records["row"], expected.astype(np.float16))


def test_a_consumer_that_is_killed_holds_nobody_up(own_engine: Engine, name: str) -> None:
    with own_engine.tap(name, n_records=8) as tap:
        own_engine.hidden(list(range(5, 13)), tap.layer)
        process = multiprocessing.get_context("fork").Process(target=_consume_and_die, args=(name,))
        process.start()
        process.join()
        assert process.exitcode == -9
        result = own_engine.generate([5, 6, 7], max_tokens=6, ignore_eos=True, temperature=0)
        assert len(result.token_ids) == 6
        assert (tap.n_pushed, tap.n_dropped) == (8 + 1, 3 + 5 - 1)
        with ActivationRing(name).batch(100) as records:  # the next goes on behind it
            assert records["token"][0] == 6


def _consume_and_die(name: str) -> None:
    with ActivationRing(name).batch(1):
        pass
    os.kill(os.getpid(), 9)


def test_a_shrunken_ring_closes_the_tap_and_nothing_else(own_engine: Engine, name: str) -> None:
    with own_engine.tap(name) as tap:
        os.truncate(shm_file(name), 0)
        assert (
            own_engine.generate([5, 6], max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
        )
        assert not tap.is_open
        assert tap.last_error is not None and "size" in tap.last_error
        with own_engine.tap(name) as again:
            own_engine.hidden([5], again.layer)
            assert again.n_pushed == 1


def test_taps_that_cannot_be(own_engine: Engine, name: str, chat_model: Path) -> None:
    for field, arguments in (
        ("layer", {"layer": 3}),
        ("layer", {"layer": -1}),
        ("layer", {"layer": True}),
        ("n_records", {"n_records": 0}),
        ("row_type", {"row_type": "bf16"}),
    ):
        with pytest.raises(InvalidRequestError, match=field):
            own_engine.tap(name, **arguments)
    with pytest.raises(InvalidRequestError, match="name"):
        own_engine.tap("a/b")
    tap = own_engine.tap(name)
    with pytest.raises(ChannelError, match="owner"):
        own_engine.tap(name)
    with pytest.raises(InvalidRequestError, match="one at a time"):
        own_engine.tap(f"{name}-2")
    own_engine.close()
    assert not tap.is_open and tap.last_error is None and not shm_file(name).exists()
    with pytest.raises(CancelledError):
        own_engine.tap(name)
    tap.close()
