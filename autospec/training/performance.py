"""What a network has learned: how well it does on samples that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Above this p a classifier does no better than the best constant answer.
CHANCE_LEVEL = 0.05


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """Probability of at least so many successes: the exact one-sided binomial test.

    scipy.stats has it too, but importing that takes longer than many a training.

    Parameters
    ----------
    successes, trials : int
        How often it succeeded, of how many times.
    probability : float
        Chance of each success.
    """
    if successes <= 0 or probability >= 1:
        return 1.0
    if probability <= 0:
        return 0.0
    terms = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(probability)
        + (trials - k) * math.log1p(-probability)
        for k in range(successes, trials + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def explained(error: float, reference: float) -> float:
    """Share of the variance that a reconstruction explains.

    Parameters
    ----------
    error : float
        Its mean squared error.
    reference : float
        Mean squared error of the training samples' mean, as the answer to everything.
    """
    return 1 - error / reference if reference > 0 else math.nan


def no_performance() -> dict[str, Any]:
    """What is recorded where nothing is held out."""
    return {"held_out": 0, "at_chance": None}


def classifier_performance(right: np.ndarray, target: Sequence[str], subjects: Sequence[str]) -> dict[str, Any]:
    """Compare a classifier with the best constant answer.

    The test counts subjects, since samples of one subject are not independent: a subject is right where more than half
    of its samples are.

    Parameters
    ----------
    right : ndarray of bool, shape (samples,)
        Whether each held-out sample was classified rightly.
    target, subjects : sequence of str
        Target and subject of each of them.

    Returns
    -------
    dict
        ``held_out`` samples and ``subjects``, ``accuracy`` over samples, ``chance`` (the share of the most frequent
        target), ``p`` of as many right by chance (one-sided, binomial), and whether that is ``at_chance``.
    """
    names, first, member = np.unique(np.array(subjects, dtype=str), return_index=True, return_inverse=True)
    correct = np.bincount(member, weights=right) / np.bincount(member) > 0.5
    _, counts = np.unique(np.array(target, dtype=str)[first], return_counts=True)
    chance = float(counts.max() / len(names))
    p = binomial_tail(int(correct.sum()), len(names), chance)
    return {
        "held_out": len(right),
        "subjects": len(names),
        "accuracy": float(np.mean(right)),
        "chance": chance,
        "p": p,
        "at_chance": p > CHANCE_LEVEL,
    }


def autoencoder_performance(error: float, reference: float, subjects: Sequence[str]) -> dict[str, Any]:
    """Compare a reconstruction with the training samples' mean.

    Parameters
    ----------
    error, reference : float
        Mean squared errors on held-out samples: of the network, and of the mean.
    subjects : sequence of str
        Subject of each held-out sample.

    Returns
    -------
    dict
        ``held_out`` samples and ``subjects``, the share of the variance that is ``explained`` (None if not finite), that of
        ``chance``, which is 0, and ``at_chance`` where no more is explained than by the mean; no ``p``.
    """
    share = explained(error, reference)
    finite = math.isfinite(share)
    return {
        "held_out": len(subjects),
        "subjects": len(set(subjects)),
        "explained": share if finite else None,
        "chance": 0.0,
        "p": None,
        "at_chance": not (finite and share > 0),
    }
