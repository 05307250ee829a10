"""The benchmark of compressed contexts: its parts against others' and by their properties."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from benchmarks.context.__main__ import main
from benchmarks.context.cache_methods import Exact, SnapKV, Window
from benchmarks.context.detail_heads import TOGETHER
from benchmarks.context.dialogues import N_ASIDES, make_dialogue
from benchmarks.context.engine_systems import redundant_spans
from benchmarks.context.metrics import differences, estimate, fidelity, mean_nll
from benchmarks.context.needles import DEPTHS, KINDS, make_haystack
from benchmarks.context.rounding import q4_0, q8_0, rotate
from benchmarks.context.rules import BeginsWith, EndsWith, Fact, LowerCase, NeverSays, Rule
from benchmarks.context.torch_model import LayerCache, Prefilled, TorchModel
from benchmarks.context.torch_systems import DroppedText, MethodSystem
from tests.conftest import TinyModelFactory
from tests.tools.gguf_edit import copy_gguf

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
HEAD_DIM = 32  # of the tiny model, a whole block of Q4_0
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 300, 40)]


@pytest.fixture(scope="module")
def base(tiny_model: TinyModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("context") / "tiny-chat.gguf"
    changes = {"tokenizer.chat_template": CHAT_TEMPLATE, "qwen3.context_length": 2048}
    return copy_gguf(tiny_model("qwen3").path, path, changes=changes)


@pytest.fixture(scope="module")
def model(base: Path) -> TorchModel:
    return TorchModel(base, n_threads=1)


@pytest.mark.parametrize(("ours", "kind"), [(q8_0, "Q8_0"), (q4_0, "Q4_0")])
def test_rounding_is_ggmls(ours: object, kind: str) -> None:
    draw = np.random.default_rng(3)
    rows = (draw.standard_normal((50, 64)) * draw.lognormal(0, 3, (50, 1))).astype(np.float32)
    rows[7, :32] = 0
    rows[8, 32:] = np.tile([0.5, -0.5], 16) * 127  # halves between levels
    kind_of = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(rows, kind_of), kind_of)
    assert callable(ours)
    np.testing.assert_array_equal(ours(torch.from_numpy(rows)).numpy(), expected)


def test_rounding_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match="expected a multiple of 32 values, found 48"):
        q8_0(torch.zeros(2, 48))


@pytest.mark.parametrize("size", [32, 64, 96, 128, 256])
def test_rotation_is_orthogonal_and_its_own_inverse(size: int) -> None:
    rows = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    rotated = rotate(rows)
    assert torch.allclose(rotated.norm(dim=1), rows.norm(dim=1), rtol=1e-5)
    assert torch.allclose(rotate(rotated), rows, atol=1e-5)
    assert rotate(torch.eye(size)[:1]).abs().max() < 0.2, "one large value is spread"


def test_the_model_is_transformers(model: TorchModel, tiny_model: TinyModelFactory) -> None:
    reference = tiny_model("qwen3").reference
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits[0]
    context = model.prefill(IDS[:24])
    assert torch.allclose(model.logits(context.layers, IDS[24:], 24), expected[24:], atol=1e-5)
    longer = model.prefill(IDS[:30])  # continues what was read
    assert torch.allclose(model.logits(longer.layers, IDS[30:], 30), expected[30:], atol=1e-5)
    shorter = model.prefill(IDS[:10])  # begins it
    assert torch.allclose(model.logits(shorter.layers, IDS[10:], 10), expected[10:], atol=1e-5)
    assert [q.shape[1] for q in shorter.queries] == [10] * len(shorter.layers)


def test_generation_is_greedy(model: TorchModel) -> None:
    layers = model.prefill(IDS[:20]).layers
    found = model.generate(layers, IDS[20:23], 20, 6)
    read = [*IDS[20:23], *found]
    best = model.logits(layers, read, 20).argmax(dim=1).tolist()
    assert found == best[2 : 2 + len(found)]
    assert len(found) == 6 or best[2 + len(found)] in model.ends


def test_two_equal_slots_are_one_with_a_bias(model: TorchModel) -> None:
    layers = model.prefill(IDS[:20]).layers
    double, biased = list[LayerCache](), list[LayerCache]()
    for layer in layers:
        twice = [torch.cat([rows, rows[:, 3:4]], dim=1) for rows in (layer.keys, layer.values)]
        double.append(LayerCache(*twice))
        bias = torch.zeros(layer.keys.shape[:2])
        bias[:, 3] = math.log(2)
        biased.append(LayerCache(layer.keys, layer.values, bias))
    expected = model.logits(double, IDS[20:], 20)
    assert torch.allclose(model.logits(biased, IDS[20:], 20), expected, atol=1e-5)
    assert not torch.allclose(model.logits(layers, IDS[20:], 20), expected, atol=1e-3)
    assert model.generate(biased, IDS[20:], 20, 5) == model.generate(double, IDS[20:], 20, 5)


def test_methods_that_keep_everything_keep_it(model: TorchModel) -> None:
    exact = MethodSystem(model, Exact()).hold(IDS[:30])
    for method in (Window(1), SnapKV(1)):
        held = MethodSystem(model, method).hold(IDS[:30])
        assert held.n_bytes == exact.n_bytes
        np.testing.assert_allclose(held.logits(IDS[30:]), exact.logits(IDS[30:]), atol=1e-5)


def test_a_window_keeps_both_ends(model: TorchModel) -> None:
    context = model.prefill(IDS)
    layers, n_bytes = Window(2).apply(context)
    kept = [*range(4), *range(24, 40)]
    assert torch.equal(layers[0].keys, context.layers[0].keys[:, kept].half().float())
    assert n_bytes == Exact().apply(context)[1] / 2
    dropped = DroppedText(model, 2).hold(IDS)
    assert (dropped.n_bytes, dropped.n_positions) == (n_bytes, 20)
    again = MethodSystem(model, Exact()).hold([IDS[index] for index in kept])
    np.testing.assert_array_equal(dropped.logits([1, 2]), again.logits([1, 2]))


def test_snapkv_keeps_what_the_last_queries_look_at() -> None:
    n_tokens, loved = 64, (20, 41)  # one for each key head
    keys = torch.zeros(2, n_tokens, HEAD_DIM)
    for head, token in enumerate(loved):
        keys[head, token] = 3.0
    values = torch.arange(2 * n_tokens * HEAD_DIM, dtype=torch.float32).view(keys.shape)
    queries = torch.ones(4, n_tokens, HEAD_DIM)
    context = Prefilled(tuple(range(n_tokens)), (LayerCache(keys, values),), (queries,))
    (layer,), _ = SnapKV(4, n_queries=8, neighbourhood=3).apply(context)
    assert layer.keys.shape == (2, 16, HEAD_DIM)
    for head, token in enumerate(loved):
        kept = [int(row) for row in (layer.values[head, :, 0] - head * n_tokens * 32) / 32]
        assert {token - 1, token, token + 1} <= set(kept)
        assert kept[-8:] == list(range(56, 64)), "tokens of the queries"


def test_differences() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    held = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 3
    found = differences(logits, held, [2, 1])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    np.testing.assert_allclose(found.kl, [expected, 0], atol=1e-6)
    np.testing.assert_array_equal(found.agreement, [0, 1])
    np.testing.assert_allclose(found.excess_nll, [math.log(0.5)], atol=1e-6)
    assert mean_nll(held, [2, 1]) == pytest.approx(math.log(2), abs=1e-6)
    total = fidelity([found, found])
    assert total.perplexity_change.value == pytest.approx(-0.5, abs=1e-6)
    assert total.kl.low == total.kl.high == pytest.approx(expected / 2, abs=1e-6)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(11)
    intervals = [estimate(draw.normal(1.0, 1.0, 30).tolist()) for _ in range(200)]
    covered = sum(found.low <= 1.0 <= found.high for found in intervals)
    # 190 are expected; the percentile bootstrap of 30 samples is a little too narrow.
    assert 176 <= covered <= 198
    assert estimate([2.0]).low == estimate([2.0]).high == 2.0


@pytest.mark.parametrize(
    ("rule", "obeying", "breaking"),
    [
        (EndsWith("OVER"), ["Yes. OVER", "over.", "a OVER!\n"], ["", "OVER it is", "moreover"]),
        (BeginsWith("Well"), ["Well, yes.", "well then"], ["", "Wells", "Oh well"]),
        (LowerCase(), ["yes.", "a 12"], ["", "Yes", "a B"]),
        (NeverSays("good", "fine"), ["fine", "goods"], ["", "Good!", "so-good"]),
    ],
)
def test_rules(rule: Rule, obeying: Sequence[str], breaking: Sequence[str]) -> None:
    assert all(map(rule.is_obeyed, obeying))
    assert not any(map(rule.is_obeyed, breaking))
    assert all(rule.is_obeyed(rule.obeying(text)) for text in breaking if text)


def test_facts() -> None:
    fact = Fact("It is 1234.", "What is it?", "1234")
    assert fact.is_known("it's 1234, yes") and fact.is_known(fact.reply.upper())
    assert not fact.is_known("12345") and not fact.is_known("")


@pytest.mark.parametrize("seed", range(20))
def test_dialogues(seed: int) -> None:
    prose = [f"Sentence {chr(97 + n)} of the prose goes on." for n in range(26)]
    dialogue = make_dialogue(seed, prose)
    assert dialogue == make_dialogue(seed, prose) and dialogue != make_dialogue(seed + 1, prose)
    assert 1 <= len(dialogue.rules) <= 3 and len(dialogue.turns) == 29
    assert all(rule.instruction in dialogue.turns[0].user for rule in dialogue.rules)
    replies = [turn.reply for turn in (*dialogue.turns, *dialogue.following)]
    assert all(rule.is_obeyed(reply) for rule in dialogue.rules for reply in replies)
    kinds = Counter(probe.kind for probe in dialogue.probes)
    assert kinds == {None: 4, "parameter": 1, "code": 6, "aside": N_ASIDES}
    said = [turn.user for turn in dialogue.turns]
    for probe in dialogue.probes:
        if probe.fact:
            told = replies if probe.kind == "aside" else said
            assert sum(probe.fact.statement.lower() in text.lower() for text in told) == 1


def test_runs_of_redundant_tokens() -> None:
    codes = bytes([0, 1, *[2] * 5, 0, *[2] * 4, 2])
    assert redundant_spans(codes, 4) == [(2, 4), (6, 1), (8, 4), (12, 1)]
    assert redundant_spans(bytes(3), 4) == redundant_spans(b"", 4) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_haystacks(kind: str, depth: float) -> None:
    stack = make_haystack(kind, depth=depth, n_sentences=50, seed=1)
    asked = [s.text.startswith(stack.question) for s in stack.segments]
    assert asked.count(True) == 1 and stack.answer in stack.segments[asked.index(True)].text
    others = sum(s.tier == "important" for s in stack.segments) - 1
    assert depth * 50 <= asked.index(True) <= depth * 50 + others
    hidden = stack.in_tier("redundant")
    assert [s.text for s in hidden.segments] == [s.text for s in stack.segments]
    assert {s.tier for s in hidden.segments} == {"redundant"}


def test_a_small_run(base: Path, tmp_path: Path) -> None:
    options = ["--small", "--threads=1", f"--base={base}", f"--output={tmp_path}"]
    assert main(options) == 0
    found = json.loads((tmp_path / "context.json").read_text())
    parts = ["fidelity", "engine", "detail_heads", "needles", "tier_needles", "dialogues", "chats"]
    assert list(found) == [*parts, "baselines", "compaction"]
    ours = {row["system"]: row for row in found["engine"]["values"]}
    assert 0 < ours["ours, Q8_0"]["fidelity"]["kl"]["value"] < 1e-3
    assert ours["ours, Q8_0"]["compression"] == pytest.approx(16 / 8.5)
    assert ours["ours, important"]["fidelity"]["kl"]["value"] == 0  # all of it is in the window
    n_heads = [len(row["heads"]) for row in found["detail_heads"]["values"]]
    n_alone = n_heads.count(1)
    assert n_heads == [0, *[1] * n_alone, *(min(n, n_alone) for n in TOGETHER)]
    rows = {row["system"]: row for row in found["fidelity"]["values"]}
    assert rows["Q8_0"]["compression"] == pytest.approx(16 / 8.5)
    assert rows["SnapKV, 4x"]["compression"] == pytest.approx(4)
    kl = {name: row["fidelity"]["kl"]["value"] for name, row in rows.items()}
    assert 0 < kl["Q8_0"] < kl["Q4_0"] < kl["window + sinks, 4x"]
    both = (*found["dialogues"]["values"], *found["baselines"]["values"])
    held = {row["system"]: row for row in both}
    assert {*rows, "F16", "ours, F16", "ours, budget of a quarter"} <= set(held)
    assert held["ours, F16"]["kl"] == 0 == held["F16"]["kl"]
    assert held["ours, F16"]["n_bytes"] > held["ours, budget of a quarter"]["n_bytes"]
    assert len(held["ours, F16"]["answers"]) == 2 and len(held["Q8_0"]["answers"]) == 1
    # What the base says itself, whoever computes it.
    assert held["ours, F16"]["answers"][0]["text"] == held["F16"]["answers"][0]["text"] != ""
    tiers = {
        row["tier"] for row in found["needles"]["values"] if row["system"] == "ours, told tiers"
    }
    assert tiers == {"key", "important", "redundant"}
    found_by_ours = [
        [row["answer_nll"] for row in found[part]["values"] if row["system"].startswith("ours")]
        for part in ("needles", "tier_needles")
    ]
    assert found_by_ours[0] == found_by_ours[1]
    assert len(found["tier_needles"]["values"]) == len(found_by_ours[1])
    for turn in found["compaction"]["values"]:
        assert 0 <= turn["compaction_us"] <= turn["behind_us"] < turn["turn_us"]
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        f"context_{part}.png" for part in ("baselines", "chats", "dialogues", "engine", "fidelity")
    ]
    assert main([*options, "--part=needles", "--samples=2"]) == 0
    again = json.loads((tmp_path / "context.json").read_text())
    assert again["fidelity"] == found["fidelity"]
    assert len(again["needles"]["values"]) == 2 * len(found["needles"]["values"])
    assert "KL to F16" in (tmp_path / "context.md").read_text()
