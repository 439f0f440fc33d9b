"""Intervals for a population: the same statistics of subjects that are drawn again with replacement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import stats

from autospec.introspection.sample_shares import CHUNK, SampleShares
from autospec.introspection.spectra import singular_values, smaller_gram
from autospec.statistics.permutations import Comparison

LEVEL = 0.95
REPETITIONS = 200
WHAT_IT_IS = (
    "95 % intervals of statistics by their standard deviations over subjects who are drawn again with replacement within each "
    "group (cosines on Fisher's z scale), with the networks as they were trained: how much another sample of subjects might "
    "change them. There is none where the share of subjects who are drawn together is zero, as that of few may be."
)
# A cosine nearer to one than this is rounding.
LARGEST_COSINE = 1 - 1e-9


def drawn_subjects(in_first: np.ndarray, repetitions: int, seed: int) -> np.ndarray:
    """How often each subject is drawn, with replacement within each group; row 0 has each once.

    Parameters
    ----------
    in_first : ndarray of bool, shape (subjects,)
        Who is in the first group.
    repetitions : int
        How often to draw.
    seed : int
        Seed of the drawing.

    Returns
    -------
    ndarray of int, shape (repetitions + 1, subjects)
    """
    times = np.ones((repetitions + 1, len(in_first)), dtype=np.int64)
    for b in range(1, repetitions + 1):
        generator = np.random.default_rng([seed, b])
        for members in (np.flatnonzero(in_first), np.flatnonzero(~in_first)):
            times[b, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)))
    return times


def resampled(shares: SampleShares, comparison: Comparison, times: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of one layer of subjects that are drawn again.

    Parameters
    ----------
    shares : SampleShares
        One share for each sample.
    comparison : Comparison
        The two groups.
    times : ndarray of int, shape (draws, subjects)
        How often each subject is drawn.

    Returns
    -------
    dict of str to ndarray, shape (draws,)
        ``log2_ratio`` of the groups' largest singular values per sample, and ``cosine`` between their shares.
    """
    by_subject = shares.of_units(comparison.unit).reduced()
    first, second = times * comparison.in_first, times * ~comparison.in_first
    sizes = [weights @ comparison.sizes for weights in (first, second)]
    largest = np.empty((2, len(times)))
    cosine = np.empty(len(times))
    together = max(1, CHUNK // by_subject.numbers_formed)
    for start in range(0, len(times), together):
        part = slice(start, start + together)
        a, b = (
            by_subject.weighted_sums(torch.from_numpy(weights[part].astype(np.float64)).to(by_subject.device))
            for weights in (first, second)
        )
        for row, sums in enumerate((a, b)):
            largest[row, part] = singular_values([smaller_gram(sums)])[0][:, 0].cpu().numpy()
        inner = (a * b).sum((1, 2)) / (torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b))
        cosine[part] = inner.cpu().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):  # a share of zero
        log2_ratio = np.log2((largest[0] / sizes[0]) / (largest[1] / sizes[1]))
    return {"log2_ratio": log2_ratio, "cosine": cosine}


def interval(values: np.ndarray, cosine: bool) -> dict[str, float | None]:
    """Statistic of the subjects as they are, row 0, with an interval from the spread of the draws.

    Quantiles of the draws would not do: a draw adds noise to a mean of shares once more, so cosines of draws are nearer to zero,
    and in simulations such intervals held the mean over new samples of subjects in 15 to 78 % of studies instead of 95; these
    hold it in 90 to 95 % (40 subjects or more).  A cosine is transformed as a correlation is (Fisher 1921), which keeps it
    between -1 and 1.
    """
    scaled = np.arctanh(np.clip(values, -LARGEST_COSINE, LARGEST_COSINE)) if cosine else values
    with np.errstate(invalid="ignore"):  # a draw with a share of zero
        half = stats.norm.ppf((1 + LEVEL) / 2) * scaled[1:].std(ddof=1)
    low, high = scaled[0] - half, scaled[0] + half
    ends = (np.tanh(low), np.tanh(high)) if cosine else (low, high)
    numbers = {"estimate": values[0], "low": ends[0], "high": ends[1]}
    return {name: float(number) if np.isfinite(number) else None for name, number in numbers.items()}


def population_intervals(
    shares: Sequence[Mapping[str, SampleShares]], comparison: Comparison, seed: int, repetitions: int = REPETITIONS
) -> list[dict[str, object]]:
    """Intervals of each layer's statistics, averaged over trainings that are given the same subjects.

    Parameters
    ----------
    shares : sequence of mapping of str to SampleShares
        Each training's shares, by layer.
    comparison : Comparison
        The two groups.
    seed : int
        Seed of the drawing.
    repetitions : int
        How often to draw.
    """
    times = drawn_subjects(comparison.in_first, repetitions, seed)
    found: list[dict[str, object]] = []
    for layer in shares[0]:
        each = [resampled(of_training[layer], comparison, times) for of_training in shares]
        means = {name: np.mean([values[name] for values in each], axis=0) for name in each[0]}
        found.append({"layer": layer, **{name: interval(values, name == "cosine") for name, values in means.items()}})
    return found
