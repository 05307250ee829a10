"""AdamW over the parts of a pack, and how its rate goes up and down."""

from __future__ import annotations

import math

import torch

from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule

_PARTS = {
    "in": "w_in",
    "norm": "norm",
    "router": "router",
    "expert_gate": "experts",
    "expert_up": "experts",
    "expert_down": "experts",
    "out": "w_out",
    "token_gate": "token_gate",
}


def make_optimiser(pack: PackModule, options: TrainOptions) -> torch.optim.AdamW:
    """An optimiser with a group for each part; `top_rate` is the group's rate at its highest.

    Norms and token gates are not decayed: their neutral values are 1 and, through W_out, arbitrary.
    """
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in pack.named_tensors():
        parts.setdefault(_PARTS[name.split(".")[2]], []).append(parameter)
    groups = []
    for part, parameters in parts.items():
        rate = options.learning_rate * getattr(options.rates, part)
        decay = 0.0 if part in ("norm", "token_gate") else options.weight_decay
        groups.append({"params": parameters, "lr": rate, "top_rate": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def rate_factor(step: int, n_steps: int, warmup_steps: int) -> float:
    """What the highest rate is multiplied with at a step, counted from 0."""
    n_warm = min(warmup_steps, n_steps // 5)
    if step < n_warm:
        return (step + 1) / (n_warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_warm) / (n_steps - n_warm)))


def set_rates(optimiser: torch.optim.AdamW, factor: float) -> None:
    """Sets all groups to a share of their highest rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["top_rate"] * factor
