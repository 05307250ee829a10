"""Training a router on a tiny base: that it finds the packs, is calibrated, and repeats itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from modularbase import Engine
from modularbase.errors import InvalidRequestError
from modularbase.packs.manifest import Training
from modularbase.packs.router_file import RoutedPack
from modularbase.routing.router import Router
from modularbase.training.calibration import calibration_error, fit_temperature
from modularbase.training.labelled_text import LabelledPack
from modularbase.training.router import RouterOptions, RouterReport, fit_head, train_router
from modularbase.training.router_project import (
    TrainedHead,
    check_matches,
    open_router_project,
    save_head,
)
from tests.conftest import TinyModelFactory
from tests.python.training.toy import text

WORDS = {
    "knee": ("fever", "of", "the", "left", "knee", "acute"),
    "code": ("def", "return", "import", "(x)", "lambda:", "[0]"),
    "none": ("RIVER", "MOON", "QUARTZ", "BOLD", "JUMPY", "WAX"),
}


@pytest.fixture
def options(tmp_path: Path, tiny_model: TinyModelFactory) -> RouterOptions:
    """Two packs whose words differ, and a third kind of text."""
    for i, (name, words) in enumerate(WORDS.items()):
        (tmp_path / f"{name}.txt").write_text(text(words, 1500, seed=i))
    packs = tuple(
        LabelledPack(RoutedPack(name, "1.0.0"), (tmp_path / f"{name}.txt",))
        for name in ("knee", "code")
    )
    return RouterOptions(
        base=tiny_model().path,
        packs=packs,
        neutral=(tmp_path / "none.txt",),
        n_snippets=80,
        snippet_tokens=(8, 32),
        n_threads=1,
    )


def trained(report: RouterReport, options: RouterOptions) -> TrainedHead:
    packs = tuple(labelled.pack for labelled in options.packs)
    figures = {"accuracy": report.accuracy}
    return TrainedHead("router", report.head, report.layer, options.pooling, packs, figures)


def test_it_learns_which_pack_a_text_is_for(options: RouterOptions, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = train_router(options, lambda n, n_all: seen.append((n, n_all)))
    assert seen == [(n + 1, 240) for n in range(240)]
    assert report.labels == ("knee", "code", "none") and report.layer == 1
    # Even of a random base: words are bytes of their own.
    assert report.accuracy > 0.9
    assert report.confusion.sum(axis=1).tolist() == [12, 12, 12] and report.n_train == 3 * 56
    assert report.confusion.trace() / 36 == pytest.approx(report.accuracy)
    project = tmp_path / "router"
    open_router_project(project, options.base)
    path = save_head(project, trained(report, options), Training())
    router = Router.load(path)
    with Engine.load(options.base, n_threads=1) as engine:
        for name, words in WORDS.items():
            prompt = text(words, 12, seed=77)
            hidden = engine.hidden(prompt, router.layer, pooling=router.pooling)[0]
            shares = router.score(hidden)
            shares["none"] = 1 - sum(shares.values())
            assert max(shares, key=shares.__getitem__) == name


def test_equal_runs_give_equal_routers(options: RouterOptions) -> None:
    first, again = (train_router(options) for _ in range(2))
    other = train_router(replace(options, seed=1))
    assert np.array_equal(first.head.weight, again.head.weight)
    assert first.head.temperature == again.head.temperature
    assert not np.array_equal(first.head.weight, other.head.weight)


def test_text_without_a_difference_cannot_be_told_apart(
    options: RouterOptions, tmp_path: Path
) -> None:
    (tmp_path / "code.txt").write_text(text(WORDS["knee"], 1500, seed=9))
    report = train_router(options)
    assert report.accuracy < 0.9 and report.confusion[2, 2] == 12
    # It was sure of what it had learned by heart; the temperature takes that away.
    assert report.head.temperature > 1.5
    assert report.calibration_error < report.uncalibrated_error


def test_a_head_is_logistic_regression() -> None:
    # Its loss is convex: at the minimum, the gradient of the plain formulation is 0.
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    x = torch.randn(100, 8, generator=draw) * 3 + 1 + labels[:, None]
    head = fit_head(x, labels, 3, 1e-2)
    spread = x.std(dim=0)
    weight = (torch.from_numpy(head.weight) * spread).requires_grad_()
    bias = torch.from_numpy(head.bias).requires_grad_()
    each = functional.cross_entropy(x / spread @ weight.T + bias, labels, reduction="none")
    loss = torch.stack([each[labels == label].mean() for label in range(3)]).mean()
    (loss + 1e-2 * weight.square().sum()).backward()
    # Against 0.3 at weights of zero; LBFGS stops at 1e-5 or so.
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_again(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 4, generator=draw) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=draw).flatten()
    found = fit_temperature(logits * temperature, labels)
    assert found == pytest.approx(temperature, rel=0.05)  # 20 000 draws
    assert calibration_error(logits, labels) < 0.02
    if temperature != 1:
        assert calibration_error(logits * temperature, labels) > 0.05


def test_calibration_error_by_hand() -> None:
    # Sure by 0.8 four times and right three times; sure by 0.55 twice, right once.
    sure = torch.tensor([0.8, 0.8, 0.8, 0.8, 0.55, 0.55])
    logits = torch.stack([sure.log(), (1 - sure).log()], dim=1)
    labels = torch.tensor([0, 0, 0, 1, 0, 1])
    expected = (4 * abs(0.8 - 0.75) + 2 * abs(0.55 - 0.5)) / 6
    assert calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)
    always_right = fit_temperature(torch.eye(2) * 5, torch.tensor([0, 1]))
    assert 0.05 <= always_right <= 1  # the lowest loss is at 0


def test_heads_of_other_states_do_not_mix(options: RouterOptions, tmp_path: Path) -> None:
    report = train_router(options)
    project = tmp_path / "router"
    open_router_project(project, options.base)
    head = trained(report, options)
    save_head(project, head, Training())
    save_head(project, head, Training())  # its own kind may be trained anew
    with pytest.raises(InvalidRequestError, match="layer"):
        check_matches(project, "fusion", (head.packs, 2, "mean"))
    with pytest.raises(InvalidRequestError, match="packs"):
        check_matches(project, "fusion", (head.packs[:1], 1, "mean"))
    check_matches(project, "fusion", (head.packs, 1, "mean"))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("pack", {"packs": ()}),
        ("snippet_tokens", {"snippet_tokens": (9, 8)}),
        ("n_snippets", {"n_snippets": 3}),
        ("weight_decay", {"weight_decay": float("nan")}),
        ("layer", {"layer": 99}),
        ("text for neutral", {"neutral": ()}),
    ],
)
def test_options_that_make_no_sense(
    field: str, changes: dict[str, Any], options: RouterOptions
) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        train_router(replace(options, **changes))
    twice = (options.packs[0], options.packs[0])
    with pytest.raises(InvalidRequestError, match="each once"):
        replace(options, packs=twice)
