"""Muon against the singular value decomposition and PyTorch's own; its state."""

from __future__ import annotations

import copy

import pytest
import torch

from modularbase.training.muon import JointOptimiser, Muon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 16, 16)])
def test_singular_values_become_about_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrices)
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    across = u.mT @ found @ v.mT  # diagonal: the same directions
    diagonal = across.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(across, torch.diag_embed(diagonal), atol=1e-4)
    large = values > 0.1 * values.amax(dim=-1, keepdim=True)
    assert ((diagonal > 0.6) & (diagonal < 1.3))[large].all()


def test_steps_equal_those_of_pytorch() -> None:
    mine = torch.nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(1)))
    theirs = torch.nn.Parameter(mine.detach().clone())
    ours = Muon([{"params": [mine], "lr": 0.02, "weight_decay": 0.1}])
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    draw = torch.Generator().manual_seed(2)
    for _ in range(3):
        gradient = torch.randn(8, 12, generator=draw)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        peer.step()
    # PyTorch's iterates in BF16.
    assert torch.allclose(mine, theirs, atol=0.02 * 0.2 * 12**0.5 * 0.05)


def test_a_state_goes_on_where_it_stopped() -> None:
    def made() -> tuple[list[torch.nn.Parameter], JointOptimiser]:
        parameters = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(3))]
        groups = [{"params": [p], "lr": 0.1, "weight_decay": 0.0} for p in parameters]
        parts = {"muon": Muon(groups[:1]), "adamw": torch.optim.AdamW(groups[1:])}
        return parameters, JointOptimiser(parts)

    def step(parameters: list[torch.nn.Parameter], optimiser: JointOptimiser, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        optimiser.zero_grad()
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimiser.step()

    whole, optimiser = made()
    step(whole, optimiser, 1)
    state = copy.deepcopy(optimiser.state_dict())
    weights = [p.detach().clone() for p in whole]
    step(whole, optimiser, 2)
    again, other = made()
    for parameter, weight in zip(again, weights, strict=True):
        parameter.data.copy_(weight)
    other.load_state_dict(state)
    step(again, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.1]
