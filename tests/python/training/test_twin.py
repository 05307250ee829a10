"""The twin against transformers, against itself cut in two, and against the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modularbase import Engine, EngineOptions
from modularbase.errors import BaseLoadError
from modularbase.packs.pack_file import read_pack
from modularbase.packs.weights import PackGeometry
from modularbase.training.base_model import load_base
from modularbase.training.export import export_pack
from modularbase.training.pack_module import PackModule
from modularbase.training.twin import Twin
from tests.conftest import TinyModelFactory
from tests.tools.gguf_edit import copy_gguf
from tests.tools.pack_values import PackValues
from tests.tools.tiny_models import N_EMBD, N_LAYER, N_VOCAB, TinyModel, reference_logits
from tests.tools.tiny_packs import write_tiny_pack
from tests.tools.torch_pack import PackUse, run_model

FAMILIES = ("llama", "llama3", "qwen2", "qwen3")
IDS = np.random.default_rng(1).integers(0, N_VOCAB, 120).tolist()
SITES = (1, 2)
# F32 sums in another order through three layers.
EXACT = 2e-5
# Of the change a pack makes: see tests/parity/test_packs_torch.py. The engine's KV cache is F16.
TOLERANCE = 5e-3
CLEAR = 0.004


def make_twin(model: TinyModel, path: Path | None = None) -> Twin:
    """A twin with a new pack, or with that of a file."""
    n_expert = 8
    shape = PackGeometry(n_embd=N_EMBD, d_inner=256, d_ff=256, n_expert=n_expert, sites=SITES)
    pack = PackModule(shape)
    if path:
        pack.load_arrays(read_pack(path).tensors)
    return Twin(load_base(model.path), pack)


def final(twin: Twin, ids: Sequence[int], **options: Any) -> torch.Tensor:
    """States behind the output norm [n_tokens, n_embd]."""
    return twin.forward_from(twin.enter(torch.tensor([list(ids)])), **options).final[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_that_of_the_file(
    family: str, tied: bool, tiny_model: TinyModelFactory
) -> None:
    model = tiny_model(family, tied=tied)
    twin = make_twin(model)
    found = twin.logits(final(twin, IDS, with_pack=False))
    np.testing.assert_allclose(found, reference_logits(model, IDS), atol=EXACT)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_quantised_bases(dtype: str, tiny_model: TinyModelFactory) -> None:
    model = tiny_model("llama", dtype=dtype)
    twin = make_twin(model)
    found = twin.logits(final(twin, IDS, with_pack=False))
    np.testing.assert_allclose(found, reference_logits(model, IDS), atol=EXACT)


def test_linear_rope_scaling_is_the_engine_s(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = copy_gguf(tiny_model().path, tmp_path / "linear.gguf", changes=changes)
    twin = Twin(load_base(path), make_twin(tiny_model()).pack)
    with torch.no_grad():
        found = final(twin, IDS).numpy()
    with Engine.load(path, dtype="f32") as engine:
        expected = engine.hidden(IDS, N_LAYER + 1)
    # The KV cache is F16 there; without the scaling the states are 0.5 apart.
    np.testing.assert_allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"llama.attention.head_count": 4}, "dimension_count"),
        ({"llama.feed_forward_length": 128}, "tensors"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(
    changes: dict[str, Any], told: str, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    drop = ("llama.attention.key_length", "llama.attention.value_length")
    path = copy_gguf(tiny_model().path, tmp_path / "a.gguf", changes=changes, drop=drop)
    with pytest.raises(BaseLoadError, match=told):
        load_base(path)


def test_a_new_pack_is_the_identity(tiny_model: TinyModelFactory) -> None:
    twin = make_twin(tiny_model())
    with torch.no_grad():
        assert torch.equal(final(twin, IDS), final(twin, IDS, with_pack=False))


def test_the_lower_half_keeps_nothing_and_gets_no_gradient(tiny_model: TinyModelFactory) -> None:
    twin = make_twin(tiny_model())
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        entering = twin.enter(torch.tensor([IDS]))
        assert not kept and not entering.requires_grad
        output = twin.forward_from(entering)
        assert kept
        n_with = len(kept)
        twin.forward_from(entering, with_pack=False)
        assert len(kept) == n_with
    output.final.sum().backward()
    assert all(parameter.grad is None for parameter in twin.base.parameters())
    assert twin.pack.sites[0].w_out.grad.abs().max() > 0


def test_the_twin_is_the_plain_formulation(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    values = tiny_pack(tmp_path / "a.gguf", model)
    twin = make_twin(model, values.path)
    expected = run_model(model.reference, IDS, [PackUse(values)])
    with torch.no_grad():
        found = twin.logits(final(twin, IDS))
    np.testing.assert_allclose(found, expected.logits, atol=EXACT * 5)  # larger numbers, too


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_engine_computes_an_exported_pack_as_the_twin(
    family: str, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(family)
    values = tiny_pack(tmp_path / "a.gguf", model)
    twin = make_twin(model, values.path)
    ids = clear_prompt(model, values)
    exported = tmp_path / "exported.gguf"
    export_pack(exported, twin.pack, values.manifest, adapters="f32", experts="f16")
    expected, plain = (twin_states(twin, ids, on) for on in (True, False))
    options = EngineOptions(head="full")
    with Engine.load(model.path, dtype="f32", n_threads=1, options=options) as engine:
        engine.packs.load(str(exported))
        name = values.manifest.id
        # Entering the layer behind each site, and behind the output norm.
        for layer, row in zip((*(s + 1 for s in SITES), N_LAYER + 1), range(3), strict=True):
            found = engine.hidden(ids, layer, packs=[name])
            changes = (expected[row] - plain[row]).norm(dim=1).numpy()
            assert changes.min() > 0.05  # a pack that does nothing would prove nothing
            errors = np.linalg.norm(found - expected[row].numpy(), axis=1) / changes
            assert errors.max() < TOLERANCE


def tiny_pack(path: Path, model: TinyModel) -> PackValues:
    return write_tiny_pack(
        path,
        n_embd=N_EMBD,
        sites=SITES,
        adapter_type="f32",
        expert_type="f16",
        token_gates=True,
        manifest={"base_id": model.path.stem},
    )


def clear_prompt(model: TinyModel, values: PackValues) -> list[int]:
    """A prompt in which no two experts are within rounding of each other."""
    for seed in range(400):
        ids: list[int] = np.random.default_rng(seed).integers(0, 256, 16).tolist()
        if run_model(model.reference, ids, [PackUse(values)]).choice_gap() > CLEAR:
            return ids
    raise AssertionError("no prompt without a close choice")


def twin_states(twin: Twin, ids: list[int], with_pack: bool) -> list[torch.Tensor]:
    """The residual stream behind every site, and behind the output norm."""
    caught: list[torch.Tensor] = []
    hooks = [
        twin.base.model.layers[site].register_forward_hook(
            lambda _, __, out: caught.append(out[0].clone())
        )
        for site in SITES
    ]
    with torch.no_grad():
        last = final(twin, ids, with_pack=with_pack)
    for hook in hooks:
        hook.remove()
    return [*caught, last]
