"""Packs blended in the twin, against plain PyTorch and the engine; and their weights learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modularbase import Engine, EngineOptions, PackRequest
from modularbase import PackUse as RequestUse
from modularbase.errors import InvalidRequestError
from modularbase.packs.router_file import RoutedPack
from modularbase.training.base_model import load_base
from modularbase.training.export import export_pack
from modularbase.training.fit import fit
from modularbase.training.fusion import FusionOptions, FusionStep, train_fusion
from modularbase.training.labelled_text import LabelledPack
from modularbase.training.mixed_twin import MixedTwin, load_pack
from tests.conftest import TinyModelFactory
from tests.python.training.toy import make_project, text, toy_options
from tests.tools.pack_values import PackValues
from tests.tools.tiny_models import N_EMBD, N_LAYER, N_VOCAB, TinyModel
from tests.tools.tiny_packs import write_tiny_pack
from tests.tools.torch_pack import PackUse, run_model

WORDS = {
    "knee": ("fever", "of", "the", "left", "knee", "acute"),
    "code": ("def", "return", "import", "(x)", "lambda:", "[0]"),
}
SHARES = (0.3, 0.7)
# Gap between experts that rounding does not turn, and what it leaves of a pack's change: see
# tests/parity/test_packs_torch.py.
CLEAR, TOLERANCE = 0.004, 5e-3


def packs_of(folder: Path, model: TinyModel) -> list[PackValues]:
    """Two packs that share one of their sites."""
    return [
        write_tiny_pack(
            folder / f"{name}.gguf",
            n_embd=N_EMBD,
            sites=sites,
            adapter_type="f32",
            expert_type="f16",
            token_gates=gates,
            seed=seed,
            manifest={"id": name, "base_id": model.path.stem},
        )
        for seed, (name, sites, gates) in enumerate((("a", (1, 2), True), ("b", (2,), False)))
    ]


def clear_prompt(model: TinyModel, uses: list[PackUse]) -> list[int]:
    """A prompt in which no two experts are within rounding of each other."""
    for seed in range(400):
        ids: list[int] = np.random.default_rng(seed).integers(0, 256, 16).tolist()
        if run_model(model.reference, ids, uses).choice_gap() > CLEAR:
            return ids
    raise AssertionError("no prompt without a close choice")


def test_the_blend_is_the_plain_formulation_s_and_the_engine_s(
    tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    model = tiny_model()
    values = packs_of(tmp_path, model)
    uses = [PackUse(pack, share) for pack, share in zip(values, SHARES, strict=True)]
    ids = clear_prompt(model, uses)
    twin = MixedTwin(load_base(model.path), [load_pack(pack.path) for pack in values])
    rows = torch.tensor([ids, ids])
    final = twin.forward(rows, torch.tensor([SHARES, (1.0, 0.0)]))
    expected = run_model(model.reference, ids, uses).logits
    np.testing.assert_allclose(final[0] @ twin.head.T, expected, atol=1e-4)  # F32, other order
    alone = run_model(model.reference, ids, [PackUse(values[0])]).logits
    np.testing.assert_allclose(final[1] @ twin.head.T, alone, atol=1e-4)
    plain = twin.forward(rows[:1], None)[0]
    options = EngineOptions(head="full")
    with Engine.load(model.path, dtype="f32", n_threads=1, options=options) as engine:
        for pack in values:
            engine.packs.load(str(pack.path))
        named = tuple(map(RequestUse, ("a", "b"), SHARES))
        found = engine.hidden(ids, N_LAYER + 1, packs=PackRequest(packs=named, fallback="never"))
    changes = (final[0] - plain).norm(dim=1).numpy()
    assert changes.min() > 0.05
    errors = np.linalg.norm(found - final[0].numpy(), axis=1) / changes
    assert errors.max() < TOLERANCE


def test_gradients_reach_the_weights_and_nothing_else(
    tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    values = packs_of(tmp_path, tiny_model())
    packs = [load_pack(pack.path) for pack in values]
    twin = MixedTwin(load_base(tiny_model().path).double(), [pack.double() for pack in packs])
    ids = torch.randint(0, N_VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([SHARES, SHARES[::-1]], dtype=torch.float64, requires_grad=True)
    # The norms of transformers are F32 at any rate: differences need a step they can see.
    assert torch.autograd.gradcheck(
        lambda w: twin.losses(ids, w, 4), (weights,), eps=1e-3, atol=1e-3
    )
    assert not any(parameter.requires_grad for pack in packs for parameter in pack.parameters())


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModelFactory) -> Any:
    """Two packs, each trained on words of its own."""
    folder, model = tmp_path_factory.mktemp("fusion"), tiny_model()
    packs = []
    for i, (name, words) in enumerate(WORDS.items()):
        manifest = make_project(folder / name, model).model_copy(update={"id": name})
        (folder / name / "domain.txt").write_text(text(words, 2000, seed=i))
        told = toy_options(folder / name, model, steps=30, eval_every=30, neutral=(), n_threads=1)
        path = folder / f"{name}.gguf"
        export_pack(path, fit(told).pack, manifest)
        pack = RoutedPack(name, manifest.version)
        packs.append(LabelledPack(pack, (folder / name / "domain.txt",), path))
    return FusionOptions(
        base=model.path,
        packs=tuple(packs),
        block_tokens=32,
        n_blocks=40,
        steps=30,
        batch_blocks=8,
        heldout_blocks=6,
        learning_rate=0.3,
        n_threads=1,
    )


def test_text_is_given_to_its_pack(options: FusionOptions) -> None:
    seen: list[FusionStep] = []
    report = train_fusion(options, seen.append)
    assert [step.step for step in seen] == list(range(1, 31))
    assert seen[-1].loss < seen[0].loss and report.n_tokens == 30 * 8 * 32
    for label, name in enumerate(WORDS):
        found = report.perplexity[name]
        assert report.shares[label, label] > 0.8
        assert found["own"] < found["equal"] < found["base"]
        # Of what equal shares lose against the pack alone, most is won back.
        won = (found["equal"] - found["fused"]) / (found["equal"] - found["own"])
        assert won > 0.7, found


def test_equal_runs_give_equal_weights(options: FusionOptions) -> None:
    first, again = (
        train_fusion(replace(options, steps=2, n_blocks=4, heldout_blocks=2)) for _ in range(2)
    )
    assert np.array_equal(first.head.weight, again.head.weight)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("block_tokens", {"block_tokens": 2}),
        ("steps", {"steps": 0}),
        ("learning_rate", {"learning_rate": 0.0}),
        ("weight_decay", {"weight_decay": -1.0}),
        ("layer", {"layer": 99}),
    ],
)
def test_options_that_make_no_sense(
    field: str, changes: dict[str, Any], options: FusionOptions
) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        train_fusion(replace(options, **changes))


def test_packs_that_cannot_be_blended(options: FusionOptions) -> None:
    with pytest.raises(InvalidRequestError, match="two or more"):
        replace(options, packs=options.packs[:1])
    without = replace(options.packs[0], file=None)
    with pytest.raises(InvalidRequestError, match="pack file"):
        replace(options, packs=(without, options.packs[1]))
