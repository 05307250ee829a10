"""A new pack is the identity whatever it begins with, and whitened inputs are white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from modularbase.training.base_model import load_base
from modularbase.training.data import TokenBlocks
from modularbase.training.initialisation import initialise
from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule
from modularbase.training.twin import Twin
from tests.conftest import TinyModelFactory
from tests.python.training.toy import GEOMETRY


def test_whitened_inputs_and_random_experts_add_nothing_yet(tiny_model: TinyModelFactory) -> None:
    twin = Twin(load_base(tiny_model().path), PackModule(GEOMETRY, seed=3))
    draw = np.random.default_rng(0)
    blocks = TokenBlocks.of(draw.integers(0, 200, (48, 32)))
    nothing = blocks[:0]
    options = TrainOptions(
        project=Path(), base=Path(), w_in_start="whitened", w_down_spread=0.5, seed=3
    )
    initialise(twin, blocks, nothing, options)
    ids = torch.from_numpy(blocks.ids)
    seen: list[torch.Tensor] = []
    layer = twin.base.model.layers[GEOMETRY.sites[0]]
    hook = layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        hidden = twin.enter(ids)
        plain = twin.forward_from(hidden, with_pack=False).final
        assert torch.equal(twin.forward_from(hidden).final, plain)
    hook.remove()
    site = twin.pack.sites[0]
    z = seen[0].reshape(-1, GEOMETRY.n_embd) @ site.w_in.detach().T
    values = torch.linalg.eigvalsh(z.T @ z)[-GEOMETRY.n_embd :]
    assert values[0] > 0.98 * values[-1]  # as many directions as the base has, all alike
    spread = float(site.expert_down.detach().std()) * GEOMETRY.d_ff**0.5
    assert abs(spread - 0.5) < 0.01
