"""Muon: momentum whose matrices are made nearly orthogonal, so that all directions learn alike.

After K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the
step sizes of arXiv:2502.16982, which make its rates comparable with those of AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_MOMENTUM = 0.95
_N_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: singular values end in 0.7 .. 1.2

# The usual size of a step of AdamW, of which the rate is a multiple (arXiv:2502.16982).
_STEP_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """For parameters that are matrices, or stacks of them [..., n_out, n_in]."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        """Makes it.

        Args:
            groups: Each with `params`, `lr` and `weight_decay`.
        """
        super().__init__(groups, {})

    def step(self) -> None:
        """Does one step with the gradients that are there."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, group["lr"], group["weight_decay"])

    def _step(self, parameter: torch.nn.Parameter, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
        ahead = parameter.grad.lerp(state["momentum"], _MOMENTUM)  # Nesterov
        size = _STEP_RMS * math.sqrt(max(parameter.shape[-2:]))
        parameter.mul_(1 - rate * decay)
        parameter.add_(orthogonalised(ahead), alpha=-rate * size)


class JointOptimiser:
    """Optimisers of different parameters, as one."""

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]) -> None:
        """Joins them.

        Args:
            parts: Each with its name in the state.
        """
        self._parts = dict(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all."""
        return [group for part in self._parts.values() for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        for part in self._parts.values():
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """Does one step of each."""
        for part in self._parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to what `state_dict` gave."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the U V^T of each matrix's singular value decomposition, by Newton-Schulz iteration.

    Args:
        matrices: [..., n_out, n_in]; computed in BF16 on a GPU, in F32 elsewhere.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_N_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)
