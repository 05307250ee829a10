"""An optimiser over the parts of a pack, and how its rate goes up and down."""

from __future__ import annotations

import math
from typing import Any

import torch

from modularbase.errors import InvalidRequestError
from modularbase.training.muon import JointOptimiser, Muon
from modularbase.training.options import PartRates, TrainOptions
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
_MATRICES = ("w_in", "experts", "w_out")  # what Muon is for; a router is a classifier


def freeze_parts(pack: PackModule, rates: PartRates) -> None:
    """Parts whose rate is 0 get no gradient; all others do."""
    for name, parameter in pack.named_tensors():
        parameter.requires_grad_(getattr(rates, part_of(name)) > 0)


def part_of(name: str) -> str:
    """The field of `PartRates` that a tensor of the pack file belongs to."""
    return _PARTS[name.split(".")[2]]


def make_optimiser(pack: PackModule, options: TrainOptions) -> JointOptimiser:
    """An optimiser with a group for each part; `top_rate` is the group's rate at its highest.

    Frozen parts have no group, so they are not decayed and have no state.
    Norms and token gates are not decayed: their neutral values are 1 and, through W_out, arbitrary.

    Raises:
        InvalidRequestError: All parts of the pack are frozen.
    """
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in pack.named_tensors():
        if parameter.requires_grad:
            parts.setdefault(part_of(name), []).append(parameter)
    groups: dict[str, dict[str, Any]] = {}
    for part, parameters in parts.items():
        rate = options.learning_rate * getattr(options.rates, part)
        decay = 0.0 if part in ("norm", "token_gate") else options.weight_decay
        groups[part] = {"params": parameters, "lr": rate, "top_rate": rate, "weight_decay": decay}
    if not groups:
        raise InvalidRequestError("rates", "a part that this pack has", "only others")
    is_muon = options.optimiser == "muon"
    matrices = [group for part, group in groups.items() if is_muon and part in _MATRICES]
    others = [group for part, group in groups.items() if not (is_muon and part in _MATRICES)]
    found: dict[str, torch.optim.Optimizer] = {}
    if matrices:
        found["muon"] = Muon(matrices)
    if others:
        found["adamw"] = torch.optim.AdamW(others, betas=(0.9, 0.95))
    return JointOptimiser(found)


def rate_factor(step: int, n_steps: int, warmup_steps: int) -> float:
    """What the highest rate is multiplied with at a step, counted from 0."""
    n_warm = min(warmup_steps, n_steps // 5)
    if step < n_warm:
        return (step + 1) / (n_warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_warm) / (n_steps - n_warm)))


def set_rates(optimiser: JointOptimiser, factor: float) -> None:
    """Sets all groups to a share of their highest rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["top_rate"] * factor
