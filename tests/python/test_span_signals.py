"""What the engine tells of spans to grade them by, against numpy on the reference's numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from modularbase import Engine, EngineOptions
from modularbase.context.spans import Span
from modularbase.context.surprise import Surprises
from modularbase.conversation_host import Turn
from modularbase.types import SamplingParams
from tests.conftest import TinyModelFactory
from tests.tools.tiny_models import TinyModel
from tests.tools.tiny_requests import ids

N_PROMPT = 300
N_AHEAD = 512
N_WINDOW = 128
SPANS = [(10, 30), (40, 50), (100, 60)]
LAYERS = [0, 1, 2]

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def talk(model: TinyModel) -> Iterator[tuple[Engine, int]]:
    """An engine, and a conversation in it."""
    options = EngineOptions(kv="tiered", pack_budget_bytes=0)
    with Engine.load(model.path, dtype="keep", n_threads=1, options=options) as engine:
        conversation = engine._core.open_conversation()
        params = SamplingParams(max_tokens=1, temperature=0)
        engine._submit_turn(Turn(ids(N_PROMPT), b"", (), conversation, params, None)).result(60)
        yield engine, conversation


def heads_of(model: TinyModel, layer: int) -> tuple[Array, Array, Array, Array]:
    """Of one layer: queries before and after RoPE, rotated keys, values; [head, token, dim]."""
    reference: Any = model.reference
    with torch.no_grad():
        out = reference(torch.tensor([ids(N_PROMPT)]), output_hidden_states=True)
        block = reference.model.layers[layer]
        x = block.input_layernorm(out.hidden_states[layer])
        attention = block.self_attn
        shape = (1, N_PROMPT, -1, model.head_dim)
        q = attention.q_norm(attention.q_proj(x).view(shape)).transpose(1, 2)
        k = attention.k_norm(attention.k_proj(x).view(shape)).transpose(1, 2)
        v = attention.v_proj(x).view(shape).transpose(1, 2)
        cos, sin = reference.model.rotary_emb(x, torch.arange(N_PROMPT)[None])
        rotated_q, rotated_k = apply_rotary_pos_emb(q, k, cos, sin)
    q, rotated_q, rotated_k, v = (a[0].double().numpy() for a in (q, rotated_q, rotated_k, v))
    return q, rotated_q, rotated_k, v


def mean_rotation(model: TinyModel) -> Array:
    """The mean of the matrices that rotate a query at the positions to come."""
    half = model.head_dim // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    angles = np.arange(N_PROMPT, N_PROMPT + N_AHEAD)[:, None] * frequencies
    cos, sin = np.diag(np.cos(angles).mean(0)), np.diag(np.sin(angles).mean(0))
    return np.block([[cos, -sin], [sin, cos]])


@pytest.mark.parametrize("layer", LAYERS)
def test_expected_attention(talk: tuple[Engine, int], model: TinyModel, layer: int) -> None:
    """Queries and keys of the engine are F16, 11 bits: a score of some 10 is off by 1e-2."""
    engine, conversation = talk
    q, _, k, v = heads_of(model, layer)
    first = max(N_PROMPT - N_WINDOW, max(start + n for start, n in SPANS))
    places = [p for start, n in SPANS for p in range(start, start + n)]
    keys, lengths = k[:, places], np.linalg.norm(v[:, places], axis=-1)
    rotation = mean_rotation(model)
    group = len(q) // len(k)
    shares = np.zeros_like(lengths)
    for head, queries in enumerate(q[:, first:]):
        of = keys[head // group]
        mean = rotation @ queries.mean(0)
        covariance = rotation @ np.cov(queries.T, bias=True) @ rotation.T
        quadratic = np.einsum("kd,de,ke->k", of, covariance, of)
        exponent = of @ mean / math.sqrt(model.head_dim) + quadratic / (2 * model.head_dim)
        weights = np.exp(exponent - exponent.max())
        shares[head // group] += weights / weights.sum() / group
    of_token = dict(zip(places, (shares * lengths).mean(0), strict=True))
    wanted = [np.mean([of_token[p] for p in range(start, start + n)]) for start, n in SPANS]
    found = engine._core.expected_attention(conversation, SPANS, layer)
    np.testing.assert_allclose(found, wanted, rtol=2e-2)


@pytest.mark.parametrize("layer", LAYERS)
def test_attention_received(talk: tuple[Engine, int], model: TinyModel, layer: int) -> None:
    engine, conversation = talk
    _, q, k, _ = heads_of(model, layer)
    first = max(N_PROMPT - N_WINDOW, max(start + n for start, n in SPANS))
    group = len(q) // len(k)
    scores = np.einsum("hqd,hkd->hqk", q, np.repeat(k, group, 0)) / math.sqrt(model.head_dim)
    scores[:, ~np.tri(N_PROMPT, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_token = weights[:, first:].mean((0, 1))
    wanted = [of_token[start : start + n].mean() for start, n in SPANS]
    found = engine._core.attention_received(conversation, SPANS, layer)
    np.testing.assert_allclose(found, wanted, rtol=2e-2)


def test_expected_attention_where_it_is_not_known(talk: tuple[Engine, int]) -> None:
    engine, conversation = talk
    other = engine._core.open_conversation()
    assert np.isnan(engine._core.expected_attention(other, SPANS, 0)).all()
    no_query_behind = [(0, 10), (N_PROMPT - 5, 5)]
    assert np.isnan(engine._core.expected_attention(conversation, no_query_behind, 0)).all()


def span(start: int, n_tokens: int) -> Span:
    return Span(start, n_tokens, 0, "assistant", "prose", "", None)


def test_surprise_is_the_mean_of_what_is_known() -> None:
    surprises = Surprises()
    surprises.add(10, [-1.0, -2.0, -6.0])
    found = surprises.of_spans([span(0, 10), span(9, 3), span(10, 2), span(10, 3), span(13, 2)])
    np.testing.assert_array_equal(found, [np.nan, np.nan, 1.5, 3.0, np.nan])
    surprises.forget([(2, 4), (11, 1)])
    np.testing.assert_array_equal(surprises.of_spans([span(6, 2), span(6, 3)]), [3.5, np.nan])
    surprises.truncate(7)
    np.testing.assert_array_equal(surprises.of_spans([span(6, 1), span(7, 1)]), [1.0, np.nan])
