"""Whether a classifier is as sure as it is right, and the temperature that makes it so."""

from __future__ import annotations

import torch
from torch.nn import functional

_N_BINS = 15
_MAX_ITERATIONS = 100
# A classifier that is right about every text it is calibrated with would have none.
_LEAST, _MOST = 0.05, 20.0


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature with the lowest cross-entropy (arXiv:1706.04599), within 1/20 and 20.

    Args:
        logits: Of texts that were not trained on [n, n_labels].
        labels: Of each [n].
    """
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    wide = logits.double()
    optimiser = torch.optim.LBFGS([log_t], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        found = functional.cross_entropy(wide / log_t.exp(), labels)
        found.backward()
        return found

    optimiser.step(loss)
    return float(log_t.detach().exp().clamp(_LEAST, _MOST))


def calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Expected calibration error: how far sureness and accuracy are apart, over 15 equal bins.

    Args:
        logits: [n, n_labels].
        labels: Of each [n].
    """
    sure, chosen = logits.softmax(dim=1).max(dim=1)
    right = (chosen == labels).to(sure.dtype)
    bins = (sure * _N_BINS).long().clamp(max=_N_BINS - 1)
    apart = torch.zeros(_N_BINS).index_add(0, bins, sure - right)
    return float(apart.abs().sum() / len(labels))
