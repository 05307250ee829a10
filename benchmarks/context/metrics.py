"""How far the predictions behind a held context are from those behind the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modularbase.types import FloatArray

Values = NDArray[np.float64]

_N_RESAMPLES = 2000
_SEED = 17


@dataclass(frozen=True)
class TokenDifferences:
    """Of one document, token by token.

    Attributes:
        kl: Kullback-Leibler divergence of the held predictions from the exact ones, in nats.
        agreement: 1 where both have the same most likely token, else 0.
        excess_nll: How much less likely the text became, in nats; one fewer, since nothing follows
            the last token.
    """

    kl: Values
    agreement: Values
    excess_nll: Values


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fidelity:
    """Of one system over documents.

    Attributes:
        kl: Mean over tokens, in nats.
        kl_p99: Its 99th percentile over the tokens of all documents.
        perplexity_change: Relative, 0.01 is one percent more.
        top1: Share of the tokens with the same most likely token.
    """

    kl: Estimate
    kl_p99: float
    perplexity_change: Estimate
    top1: Estimate


def mean_nll(logits: FloatArray, ids: Sequence[int]) -> float:
    """Of what follows the first token, in nats a token.

    Args:
        logits: [n_tokens, n_vocab].
        ids: The tokens read, [n_tokens].
    """
    rows, following = np.arange(len(ids) - 1), np.asarray(ids[1:])
    return -float(_log_softmax(logits[:-1])[rows, following].mean())


def differences(exact: FloatArray, held: FloatArray, ids: Sequence[int]) -> TokenDifferences:
    """Compares predictions on one text.

    Args:
        exact: Logits [n_tokens, n_vocab] behind the exact context.
        held: The same behind the held one.
        ids: The tokens read, [n_tokens].
    """
    reference, found = _log_softmax(exact), _log_softmax(held)
    rows, following = np.arange(len(ids) - 1), np.asarray(ids[1:])
    return TokenDifferences(
        kl=(np.exp(reference) * (reference - found)).sum(axis=1),
        agreement=(exact.argmax(axis=1) == held.argmax(axis=1)).astype(np.float64),
        excess_nll=reference[rows, following] - found[rows, following],
    )


def fidelity(documents: Sequence[TokenDifferences]) -> Fidelity:
    """Sums documents up; each counts as much, and intervals come from drawing them again."""
    kl = [float(document.kl.mean()) for document in documents]
    excess = [float(document.excess_nll.mean()) for document in documents]
    agreement = [float(document.agreement.mean()) for document in documents]
    tokens = np.concatenate([document.kl for document in documents])
    return Fidelity(
        kl=estimate(kl),
        kl_p99=float(np.quantile(tokens, 0.99)),
        perplexity_change=estimate(excess, lambda mean: math.exp(mean) - 1),
        top1=estimate(agreement),
    )


def estimate(
    samples: Sequence[float], of_mean: Callable[[float], float] = lambda mean: mean
) -> Estimate:
    """The mean of samples with the percentile bootstrap's interval.

    Args:
        samples: Independent ones, such as documents or dialogues; at least one.
        of_mean: Increasing function that turns the mean, and the ends, into what is told.
    """
    values = np.asarray(samples, dtype=np.float64)
    draws = np.random.default_rng(_SEED).integers(len(values), size=(_N_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(*(of_mean(float(value)) for value in (values.mean(), low, high)))


def _log_softmax(logits: FloatArray) -> Values:
    shifted: Values = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
