"""The trainer of `demo live`, in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modularbase.bases.tokenizer import Tokenizer
from modularbase.gguf_file import read_metadata
from modularbase.training.base_model import load_base
from modularbase.training.lesson import error_table
from modularbase.training.live_protocol import LiveOptions, LiveReport
from modularbase.training.live_trainer import LiveTrainer, RememberedStates, lesson_blocks
from modularbase.training.pack_module import PackModule
from modularbase.training.publish import PackChannel
from modularbase.training.states import TorchStates
from modularbase.training.twin import Twin
from tests.conftest import TinyModelFactory
from tests.python.training.segment_bytes import shm_file
from tests.python.training.toy import GEOMETRY


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the trainer's process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class EnoughError(Exception):
    """Ends a run."""


def losses(options: LiveOptions, n: int) -> list[float | None]:
    """Of a run's first steps."""
    found: list[float | None] = []

    def watch(report: LiveReport) -> None:
        if report.step > 0:
            found.append(report.loss)
        if report.step == n:
            raise EnoughError

    trainer = LiveTrainer(options)
    with PackChannel(options.channel, trainer.pack) as channel, pytest.raises(EnoughError):
        trainer.run(channel, watch)
    return found


def test_the_trial_steps_leave_no_trace(tiny_model: TinyModelFactory, name: str) -> None:
    given: dict[str, Any] = {"base": tiny_model().path, "channel": name}
    slow = LiveOptions(**given, end_s=time.monotonic())  # there is time for the fewest steps only
    measured = losses(slow, 3)
    told = losses(LiveOptions(**given, end_s=math.inf, n_steps=40), 3)
    assert measured == told
    assert not shm_file(name).exists()


def test_publishes_lie_at_even_distances(tiny_model: TinyModelFactory, name: str) -> None:
    options = LiveOptions(base=tiny_model().path, channel=name, end_s=0.0, n_steps=7, n_publishes=3)
    reports: list[LiveReport] = []
    trainer = LiveTrainer(options)
    with PackChannel(name, trainer.pack) as channel:
        trainer.run(channel, reports.append)
        assert channel.generation == 3
    assert [report.generation for report in reports] == [0, 0, 0, 1, 1, 2, 2, 3]
    assert reports[-1].is_last and not reports[-2].is_last
    for report in reports:
        assert LiveReport.from_json(report.to_json()) == report
    assert LiveOptions.from_json(options.to_json()) == options


def test_the_lower_half_is_run_once(tiny_model: TinyModelFactory) -> None:
    twin = Twin(load_base(tiny_model().path), PackModule(GEOMETRY))
    plain, states = TorchStates(twin, nullcontext), RememberedStates(twin, nullcontext)
    blocks = np.arange(24).reshape(4, 6)
    exact: dict[str, Any] = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(states.entering(blocks[:3]), plain.entering(blocks[:3]), **exact)
    torch.testing.assert_close(states.entering(blocks[::-1]), plain.entering(blocks[::-1].copy()))
    twin.base.model.layers[0].forward = None  # whoever runs it now fails
    states.entering(blocks)
    with pytest.raises(TypeError):
        states.entering(blocks + 1)


def test_only_endings_are_learnt(tiny_model: TinyModelFactory) -> None:
    metadata = read_metadata(Path(tiny_model().path))
    tokenizer = Tokenizer.from_metadata(metadata)
    facts = error_table()
    blocks = lesson_blocks(tokenizer, facts)
    assert len(blocks) == len(facts) > 100
    for fact, ids, learnt in zip(facts, blocks.ids, blocks.learnt, strict=True):
        assert tokenizer.decode(ids[learnt].tolist()) == fact.ending
        text = tokenizer.decode(ids[: learnt.nonzero()[0][-1] + 1].tolist())
        assert text == fact.question + fact.ending
        assert fact.is_answered_by(fact.ending) and not fact.is_answered_by(fact.ending + "Or not.")
