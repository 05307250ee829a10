"""The reference for packs, itself held against definitions written out for single elements."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TinyModelFactory
from tests.tools.pack_values import PackValues
from tests.tools.tiny_models import N_EMBD, N_VOCAB, reference_logits
from tests.tools.tiny_packs import write_tiny_pack
from tests.tools.torch_pack import (
    PackUse,
    SiteTrace,
    conflict,
    mix,
    run_model,
    run_site,
)

IDS = np.random.default_rng(3).integers(0, N_VOCAB, 24).tolist()


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> PackValues:
    path = tmp_path_factory.mktemp("packs") / "pack.gguf"
    return write_tiny_pack(path, n_embd=N_EMBD, sites=(1, 2), token_gates=True, scale=0.7)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> PackValues:
    path = tmp_path_factory.mktemp("packs") / "other.gguf"
    return write_tiny_pack(path, n_embd=N_EMBD, sites=(2,), seed=9, expert_type="q8_0")


def rows(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, N_EMBD, dtype=dtype, generator=torch.Generator().manual_seed(4))


def trace_of(*deltas: list[float], gates: list[float] | None = None) -> list[SiteTrace]:
    """Packs on one row; only what mixing reads is filled in."""
    unread = torch.empty(0)
    return [
        SiteTrace(
            z_raw=unread,
            z=unread,
            router=unread,
            chosen=unread,
            shares=unread,
            hidden=unread,
            down=unread,
            y=unread,
            token_gate=torch.tensor([gate]),
            delta=torch.tensor([delta]),
        )
        for delta, gate in zip(deltas, gates or [1.0] * len(deltas), strict=True)
    ]


def test_a_row_computed_expert_by_expert(pack: PackValues) -> None:
    x = rows(5)
    site = pack.sites[0]
    found = run_site(pack, site, x)
    v = x[2].numpy()
    z_raw = site.w_in.astype(float) @ v
    z = z_raw / math.sqrt(sum(z_raw**2) / 256 + 1e-5) * site.norm
    logits = site.router @ z
    r = np.exp(logits) / np.exp(logits).sum()
    first, second = sorted(range(8), key=lambda e: -r[e])[:2]
    y = z.copy()
    for e in (first, second):
        a = site.expert_gate[e].astype(float) @ z
        hidden = a / (1 + np.exp(-a)) * (site.expert_up[e].astype(float) @ z)
        y += r[e] / (r[first] + r[second]) * (site.expert_down[e].astype(float) @ hidden)
    assert site.token_gate is not None
    gate = 2 / (1 + math.exp(-(site.token_gate @ v + site.token_bias)))
    assert found.chosen[2].tolist() == [first, second]
    np.testing.assert_allclose(found.y[2].numpy(), y, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        found.delta[2].numpy(), 0.7 * gate * (site.w_out.astype(float) @ y), rtol=1e-6, atol=1e-9
    )
    assert found.choice_gap()[2] == pytest.approx(sorted(r)[-2] - sorted(r)[-3])


def test_experts_not_chosen_do_not_matter(pack: PackValues) -> None:
    x = rows(1)
    site = pack.sites[0]
    expected = run_site(pack, site, x)
    spoiled = site.expert_down.copy()
    rest = [e for e in range(8) if e not in expected.chosen[0].tolist()]
    assert len(rest) == 6
    spoiled[rest] = 1e3
    found = run_site(pack, replace(site, expert_down=spoiled), x)
    assert torch.equal(found.delta, expected.delta)


def test_site_in_f32_is_that_in_f64_to_rounding(pack: PackValues) -> None:
    single = run_site(pack, pack.sites[0], rows(40).float())
    double = run_site(pack, pack.sites[0], rows(40))
    # Sums of 256 F32 products of size 0.1 to 1.
    np.testing.assert_allclose(single.delta.numpy(), double.delta.numpy(), atol=1e-5)


def test_pack_with_no_output_is_the_base(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    model = tiny_model()
    silent = write_tiny_pack(tmp_path / "pack.gguf", n_embd=N_EMBD, sites=(1,), strength=0)
    found = run_model(model.reference, IDS, [PackUse(silent)])
    np.testing.assert_array_equal(found.logits.numpy(), reference_logits(model, IDS))


def test_pack_changes_the_residual_stream_by_its_total(
    tiny_model: TinyModelFactory, pack: PackValues
) -> None:
    model = tiny_model()
    with torch.no_grad():
        states = model.reference(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    found = run_model(model.reference, IDS, [PackUse(pack, weight=0.5)])
    first = found.layers[1]
    assert first.h is not None
    # Below the first site nothing changes, so there h' - h is the packs' total. Sums of size 1.
    np.testing.assert_allclose((first.h - states[2][0]).numpy(), first.total.numpy(), atol=2e-6)
    np.testing.assert_allclose(first.total.numpy(), 0.5 * first.packs[0].delta.numpy())
    moved = np.abs(found.logits.numpy() - reference_logits(model, IDS)).mean()
    assert 0.05 < moved < 2


def test_pack_acts_only_from_its_position(tiny_model: TinyModelFactory, pack: PackValues) -> None:
    model = tiny_model()
    found = run_model(model.reference, IDS, [PackUse(pack, from_position=10)]).logits.numpy()
    base = reference_logits(model, IDS)
    np.testing.assert_array_equal(found[:10], base[:10])
    assert np.abs(found[10:] - base[10:]).max(axis=1).min() > 1e-3


def test_packs_meet_only_where_both_have_sites(
    tiny_model: TinyModelFactory, pack: PackValues, other: PackValues
) -> None:
    found = run_model(tiny_model().reference, IDS, [PackUse(pack, 0.75), PackUse(other, 0.25)])
    assert [len(found.layers[layer].packs) for layer in (1, 2)] == [1, 2]
    a, b = (trace.delta for trace in found.layers[2].packs)
    torch.testing.assert_close(found.layers[2].total, 0.75 * a + 0.25 * b)
    assert 0 < found.choice_gap() < 1


def test_blend_by_hand() -> None:
    total = mix(trace_of([4.0, 0.0], [1.0, 8.0]), torch.tensor([[1.5, 1.0]]), "blend")
    assert total.tolist() == [[7.0, 8.0]]


def test_best_is_chosen_by_weight_and_gate_and_keeps_its_weight() -> None:
    traces = trace_of([1.0, 1.0], [-2.0, 5.0], gates=[0.5, 1.5])
    weights = torch.tensor([[0.75, 0.5]])  # 0.75 * 0.5 < 0.5 * 1.5
    assert mix(traces, weights, "best").tolist() == [[-1.0, 2.5]]
    assert mix(traces, torch.tensor([[2.0, 0.5]]), "best").tolist() == [[2.0, 2.0]]


def test_ties_by_hand() -> None:
    traces = trace_of([1.0, 2.0, 0.0, 1.0], [-4.0, 4.0, 0.0, -1.0], [2.0, -1.0, 3.0, 0.0])
    weights = torch.tensor([[0.5, 0.25, 0.25]])
    # Weighted sums: 0 (no sign), 1.75 (+), 0.75 (+), 0.25 (+).
    expected = [0.0, 0.5 * 2 + 0.25 * 4, 0.25 * 3, 0.5]
    torch.testing.assert_close(mix(traces, weights, "ties"), torch.tensor([expected]))
    torch.testing.assert_close(mix(traces, 2 * weights, "ties"), 2 * torch.tensor([expected]))


def test_conflict_by_hand() -> None:
    traces = trace_of([1.0, 0.0], [-3.0, 0.0], [1.0, 1.0])
    scores = conflict(traces, torch.ones(1, 3))
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, -1, half], [-1, 1, -half], [half, -half, 1]])
    torch.testing.assert_close(scores, expected)
    assert conflict(traces, torch.tensor([[1.0, 0.0, 1.0]]))[0, 1] == 0
