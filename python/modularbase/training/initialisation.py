"""What a new pack begins with, where that is not what `PackModule` draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modularbase.training.data import TokenBlocks
from modularbase.training.options import TrainOptions
from modularbase.training.twin import Twin

# Blocks looked at: about 16 000 tokens, many for a matrix of second moments of 576 inputs.
_DOMAIN_BLOCKS, _NEUTRAL_BLOCKS, _BATCH_BLOCKS = 48, 16, 8

_LEAST = 1e-9  # of the eigenvalues that are divided by

_W_DOWN = 3  # stream of random numbers, beside those of data.py


def initialise(
    twin: Twin, domain: TokenBlocks, neutral: TokenBlocks, options: TrainOptions
) -> None:
    """Sets W_in and W_down of a new pack as the options say.

    Args:
        twin: On the options' device.
        domain: What the pack will be trained on.
        neutral: What it will be held to the base on; may be empty.
        options: The run's.
    """
    if options.w_down_spread:
        _spread_w_down(twin, options.w_down_spread, options.seed)
    if options.w_in_start == "whitened":
        ids = np.concatenate([domain.ids[:_DOMAIN_BLOCKS], neutral.ids[:_NEUTRAL_BLOCKS]])
        _whiten_w_in(twin, _second_moments(twin, ids), options.seed)


def _spread_w_down(twin: Twin, spread: float, seed: int) -> None:
    draw = np.random.default_rng([seed, _W_DOWN])
    for site in twin.pack.sites:
        shape = tuple(site.expert_down.shape)  # [n_expert, d_inner, d_ff]
        drawn = draw.standard_normal(shape, np.float32) * np.float32(spread * shape[-1] ** -0.5)
        site.expert_down.data.copy_(torch.from_numpy(drawn))


def _whiten_w_in(twin: Twin, moments: list[torch.Tensor], seed: int) -> None:
    """Rows that see every main direction of the inputs alike, each a random mixture of all.

    Left alone, random rows mostly see the few directions in which a base's states are huge.

    Args:
        twin: Base and pack.
        moments: Second moments of each site's inputs [n_embd, n_embd].
        seed: Of the mixture.
    """
    draw = torch.Generator().manual_seed(seed)
    for site, moment in zip(twin.pack.sites, moments, strict=True):
        n = min(site.w_in.shape)
        values, vectors = torch.linalg.eigh(moment)  # ascending
        main = vectors[:, -n:] * values[-n:].clamp_min(_LEAST).rsqrt()  # [n_embd, n]
        mixing = torch.randn(site.w_in.shape[0], n, generator=draw, dtype=torch.float64)
        mixing = torch.linalg.qr(mixing)[0]  # [d_inner, n]
        rows = mixing @ main.T  # [d_inner, n_embd]
        site.w_in.data.copy_(rows / rows.norm(dim=1).mean())


def _second_moments(twin: Twin, ids: NDArray[np.int64]) -> list[torch.Tensor]:
    """Mean of x x^T over the inputs of each site, [n_embd, n_embd].

    Args:
        twin: Base and pack; the pack is off.
        ids: Token ids [n_blocks, n_tokens].
    """
    layers = [twin.base.model.layers[layer] for layer in twin.pack.geometry.sites]
    sums: list[torch.Tensor | float] = [0.0] * len(layers)

    def adding(index: int) -> Callable[[Any, tuple[torch.Tensor]], None]:
        def add(_: Any, inputs: tuple[torch.Tensor]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[index] += (rows.T @ rows).double().cpu()

        return add

    hooks = [layer.mlp.register_forward_pre_hook(adding(i)) for i, layer in enumerate(layers)]
    for first in range(0, len(ids), _BATCH_BLOCKS):
        batch = torch.from_numpy(ids[first : first + _BATCH_BLOCKS]).to(twin.head.device)
        with torch.no_grad():
            twin.forward_from(twin.enter(batch), with_pack=False)
    for hook in hooks:
        hook.remove()
    return [total / ids.size for total in sums]
