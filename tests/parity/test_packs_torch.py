"""The engine with packs against plain PyTorch, on tiny random bases held in F32.

What is compared is what packs add: differences are counted in lengths of the change that the packs
make to a row, so that the tolerances say how exactly packs are computed.

Where two experts (or two packs, under a policy that chooses) are within rounding of each other,
either choice is right, and the rows behind see it. Prompts are drawn until there is no such row;
of generated tokens, those before the first such row are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from modularbase import Engine, EngineOptions, PackRequest
from modularbase import PackUse as RequestUse
from tests.conftest import TinyModelFactory
from tests.tools.pack_values import PackValues
from tests.tools.tiny_models import N_EMBD, N_LAYER, TinyModel
from tests.tools.tiny_packs import write_tiny_pack
from tests.tools.torch_pack import MixTrace, PackedForward, PackUse, Policy, run_model

N_PROMPT = 16
N_TOKENS = 12

# Gap between the last expert chosen and the next from which no rounding here turns them. Seen to
# turn at 0.0006, with BF16 adapters.
CLEAR = 0.004
# Of the change a pack makes. The KV cache is F16 here and F32 there, which alone makes 0.002; in
# F16 and BF16 products the inputs are rounded too (11 and 8 bits of mantissa); 8-bit products take
# inputs as 8-bit integers of a block's largest, Q4_K as ggml does it in blocks of 256.
TOLERANCE = {"f32": 5e-3, "f16": 5e-3, "bf16": 1.2e-2, "q8_0": 2.5e-2, "q4_0": 2.5e-2, "q4_k": 4e-2}
# Where packs nearly cancel, rounding elects the other sign. So much of their sizes must be left of
# an element, with F32 adapters; errors seen there are below 0.0005.
CLEAR_SIGN = 0.001

ADAPTERS = ("f16", "bf16", "f32")
EXPERTS = ("f16", "q8_0", "q4_0", "q4_k")

PackFactory = Callable[..., PackValues]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> PackFactory:
    """Writes random packs, each only once."""
    folder = tmp_path_factory.mktemp("packs")
    made: dict[str, PackValues] = {}

    def make(base_id: str, name: str = "first", **options: Any) -> PackValues:
        key = f"{base_id}-{name}-{options}"
        if key not in made:
            options = {"sites": (1, 2), "token_gates": True, **options}
            manifest = {"id": name, "base_id": base_id}
            path = folder / f"{len(made)}.gguf"
            made[key] = write_tiny_pack(path, n_embd=N_EMBD, manifest=manifest, **options)
        return made[key]

    return make


@dataclass(frozen=True)
class Case:
    """A base, the packs of a request, and an engine that has them."""

    model: TinyModel
    engine: Engine
    packs: tuple[PackValues, ...]
    weights: tuple[float, ...] = (1.0,)
    policy: Policy = "blend"

    def request(self, **fields: Any) -> PackRequest:
        names = [pack.manifest.id for pack in self.packs]
        uses = tuple(RequestUse(*pair) for pair in zip(names, self.weights, strict=True))
        return PackRequest(packs=uses, policy=self.policy, fallback="never", **fields)

    def expected(self, ids: Sequence[int], from_position: int = 0) -> PackedForward:
        uses = [
            PackUse(pack, weight, from_position)
            for pack, weight in zip(self.packs, self.weights, strict=True)
        ]
        return run_model(self.model.reference, ids, uses, self.policy)

    def clear_prompt(self) -> list[int]:
        """A prompt without a close choice."""
        for seed in range(400):
            ids: list[int] = np.random.default_rng(seed).integers(0, 256, N_PROMPT).tolist()
            if n_clear(self.expected(ids), self.policy) == N_PROMPT:
                return ids
        raise AssertionError("no prompt without a close choice")

    def tolerance(self) -> float:
        types = [kind for pack in self.packs for kind in (pack.adapter_type, pack.expert_type)]
        return max(TOLERANCE[kind] for kind in types)


def n_clear(forward: PackedForward, policy: Policy) -> int:
    """Rows before the first in which rounding may turn a choice."""
    unclear = torch.zeros(len(forward.logits), dtype=torch.bool)
    for mix in forward.layers.values():
        for i, trace in enumerate(mix.packs):
            unclear |= (trace.choice_gap() < CLEAR) & (mix.weights[:, i] > 0)
        unclear |= pack_gap(mix, policy) < (CLEAR_SIGN if policy == "ties" else CLEAR)
    return int(unclear.int().argmax()) if unclear.any() else len(unclear)


def pack_gap(mix: MixTrace, policy: Policy) -> torch.Tensor:
    """By how much the policy chose between packs [n_rows]."""
    gates = torch.stack([trace.token_gate for trace in mix.packs], dim=1)
    if gates.shape[1] > 1 and policy == "best":
        ranks = (gates * mix.weights).sort(dim=1).values
        return ranks[:, -1] - ranks[:, -2]
    if gates.shape[1] > 1 and policy == "priority":
        widest = gates.sort(dim=1).values
        return torch.minimum((gates - 1).abs().amin(dim=1), widest[:, -1] - widest[:, -2])
    if gates.shape[1] > 1 and policy == "ties":
        deltas = torch.stack([trace.delta for trace in mix.packs])
        parts = mix.weights.T[:, :, None] * deltas  # [n_packs, n_rows, n_embd]
        return (parts.sum(dim=0).abs() / parts.abs().sum(dim=0)).amin(dim=1)
    return torch.ones(len(gates))


def base_id(model: TinyModel) -> str:
    return model.path.stem


def open_engine(model: TinyModel, *packs: PackValues, sites: Any = "fused") -> Engine:
    options = EngineOptions(sites=sites, head="full")
    engine = Engine.load(model.path, dtype="f32", n_threads=1, options=options)
    for pack in packs:
        engine.packs.load(str(pack.path))
    return engine


def check_states(case: Case) -> None:
    """Compares the residual stream behind every site, and the final state and log-probabilities."""
    ids = case.clear_prompt()
    expected = case.expected(ids)
    plain = run_model(case.model.reference, ids, [PackUse(case.packs[0], 0.0)])
    states = states_of(case.model, ids)
    for layer, mix in expected.layers.items():
        assert mix.h is not None
        found = case.engine.hidden(ids, layer + 1, packs=case.request())
        assert_changed_alike(found, mix.h, states[layer + 1], case.tolerance())
    norm = case.model.reference.model.norm
    with torch.no_grad():
        last, last_plain = norm(expected.layers[N_LAYER - 1].h), norm(states[N_LAYER])
    found = case.engine.hidden(ids, N_LAYER + 1, packs=case.request())
    assert_changed_alike(found, last, last_plain, case.tolerance())
    change = logprobs(expected, ids) - logprobs(plain, ids)
    difference = case.engine.score(ids, packs=case.request()).logprobs - logprobs(expected, ids)
    assert np.linalg.norm(difference) < case.tolerance() * np.linalg.norm(change)


def states_of(model: TinyModel, ids: Sequence[int]) -> list[torch.Tensor]:
    """The plain base's residual stream entering each layer, and leaving the last."""
    caught: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: caught.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        for layer in model.reference.model.layers
    ]
    with torch.no_grad():
        embedded = model.reference.model.embed_tokens(torch.tensor(ids))
        model.reference(torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return [embedded, *caught]


def assert_changed_alike(
    found: np.ndarray, expected: torch.Tensor, plain: torch.Tensor, tolerance: float
) -> None:
    changes = (expected - plain).norm(dim=1).numpy()
    assert changes.min() > 0.05  # a pack that does nothing would prove nothing
    errors = np.linalg.norm(found - expected.numpy(), axis=1) / changes
    assert errors.max() < tolerance


def logprobs(forward: PackedForward, ids: Sequence[int]) -> np.ndarray:
    table = torch.log_softmax(forward.logits, -1).numpy()
    found: np.ndarray = table[np.arange(len(ids) - 1), list(ids[1:])]
    return found


@pytest.mark.parametrize("sites", ["fused", "reference"])
@pytest.mark.parametrize("gates", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("expert_type", EXPERTS)
@pytest.mark.parametrize("adapter_type", ADAPTERS)
def test_types(
    adapter_type: str,
    expert_type: str,
    gates: bool,
    sites: str,
    tiny_model: TinyModelFactory,
    pack: PackFactory,
) -> None:
    model = tiny_model("llama")
    types = {"adapter_type": adapter_type, "expert_type": expert_type, "token_gates": gates}
    values = pack(base_id(model), **types, scale=0.8)
    with open_engine(model, values, sites=sites) as engine:
        check_states(Case(model, engine, (values,), (1.3,)))


@pytest.mark.parametrize("sites", ["fused", "reference"])
@pytest.mark.parametrize("n_packs", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_families(
    family: str, n_packs: int, sites: str, tiny_model: TinyModelFactory, pack: PackFactory
) -> None:
    model = tiny_model(family)
    packs = (pack(base_id(model)), pack(base_id(model), "second", seed=1))[:n_packs]
    with open_engine(model, *packs, sites=sites) as engine:
        check_states(Case(model, engine, packs, (3.0, 1.0)[:n_packs]))


# Not lighter: what the F16 cache rounds does not shrink with the change that it is compared to.
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 1.5)], ids=["even", "uneven"])
@pytest.mark.parametrize("policy", ["blend", "best", "priority", "ties"])
def test_policies(
    policy: Policy, weights: tuple[float, float], tiny_model: TinyModelFactory, pack: PackFactory
) -> None:
    model = tiny_model("llama")
    options = {"expert_type": "f16", "adapter_type": "f32"}
    packs = (pack(base_id(model), **options), pack(base_id(model), "second", seed=1, **options))
    with open_engine(model, *packs) as engine:
        check_states(Case(model, engine, packs, weights, policy))


@pytest.mark.parametrize("sites", ["fused", "reference"])
def test_two_geometries(sites: str, tiny_model: TinyModelFactory, pack: PackFactory) -> None:
    model = tiny_model("llama")
    wide = pack(base_id(model), "wide", d_ff=512, n_expert=4, expert_type="q8_0", sites=(0, 2))
    deep = pack(base_id(model), "deep", expert_type="q4_0", adapter_type="bf16", seed=2)
    with open_engine(model, wide, deep, sites=sites) as engine:
        check_states(Case(model, engine, (wide, deep), (1.0, 2.0)))


@pytest.mark.parametrize("activation", ["prompt", "from_here"])
@pytest.mark.parametrize("sites", ["fused", "reference"])
def test_greedy_tokens(
    sites: str, activation: str, tiny_model: TinyModelFactory, pack: PackFactory
) -> None:
    model = tiny_model("llama")
    packs = (pack(base_id(model)), pack(base_id(model), "second", seed=1))
    with open_engine(model, *packs, sites=sites) as engine:
        case = Case(model, engine, packs, (1.0, 1.0))
        prompt = case.clear_prompt()
        request = case.request(activation=activation)
        options: dict[str, Any] = {"max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True}
        result = engine.generate(prompt, packs=request, logprobs=1, **options)
        plain = engine.generate(prompt, **options)
    assert result.token_ids != plain.token_ids
    ids = [*prompt, *result.token_ids]
    start = N_PROMPT - 1 if activation == "from_here" else 0
    forward = case.expected(ids, from_position=start)
    n = min(n_clear(forward, "blend"), len(ids) - 1) - start_of(prompt)
    assert n >= 3
    assert result.logprobs is not None
    rows = torch.log_softmax(forward.logits, -1)[start_of(prompt) :]
    # Lead under which rounding may turn the order of two tokens: see TOLERANCE, times a change of
    # log-probability of about 2.
    for row, token in list(zip(rows, result.logprobs, strict=False))[:n]:
        assert float(row.max()) - float(row[token.token_id]) < 0.05
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=0.05)


def start_of(prompt: Sequence[int]) -> int:
    """The row that gives the first token."""
    return len(prompt) - 1


def test_conflict_is_the_mean_cosine(tiny_model: TinyModelFactory, pack: PackFactory) -> None:
    from tests.tools.torch_pack import conflict

    model = tiny_model("llama")
    packs = (pack(base_id(model)), pack(base_id(model), "second", seed=1))
    with open_engine(model, *packs) as engine:
        case = Case(model, engine, packs, (1.0, 1.0))
        prompt = case.clear_prompt()
        found = engine.generate(prompt, packs=case.request(), max_tokens=1, temperature=0)
    layers = case.expected(prompt).layers
    assert set(found.pack_conflict) == set(layers)
    for layer, mix in layers.items():
        if layer == N_LAYER - 1:
            continue  # computed for the prompt's last row only
        expected = float(conflict(mix.packs, mix.weights)[0, 1])
        assert found.pack_conflict[layer] == pytest.approx(expected, abs=0.02)
