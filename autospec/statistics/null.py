"""From a statistic under the observed and many other labellings to p-values, as pure functions.

The first axis is that of the labellings, and row 0 is the observed one, which counts itself, so that p is never 0
(Phipson and Smyth 2010, "Permutation p-values should never be zero", Stat. Appl. Genet. Mol. Biol. 9).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

# Statistics are kept in single precision: what differs by less than this, relative to the largest, is a tie.
TIE = 4 * float(np.finfo(np.float32).eps)


def standardised(values: np.ndarray, alternative: str) -> tuple[np.ndarray, np.ndarray]:
    """Centre and scale over all labellings, so that larger speaks more for a difference.

    Parameters
    ----------
    values : ndarray, shape (labellings, ...)
        A statistic.
    alternative : {"greater", "less", "two-sided"}
        Which values speak for a difference; ``two-sided``: those far from the mean over labellings.

    Returns
    -------
    z : ndarray, shape (labellings, ...), float64
        0 where the statistic is the same under every labelling.
    tie : ndarray, shape (...)
        Differences of z up to this are ties.
    """
    wide = values.astype(np.float64)
    centred = wide - wide.mean(0)
    spread = centred.std(0)
    rounding = TIE * np.abs(wide).max(0)
    varies = spread > rounding
    scale = np.where(varies, spread, 1.0)
    z = np.where(varies, centred / scale, 0.0)
    if alternative == "two-sided":
        z = np.abs(z)
    elif alternative == "less":
        z = -z
    return z, np.where(varies, rounding / scale, 0.0)


def p_values(z: np.ndarray, tie: np.ndarray | float = 0.0) -> np.ndarray:
    """Part of the labellings that are at least as extreme as the observed one, which is counted: shape (...).

    Of drawn labellings this is (1 + number at least as extreme) / (1 + permutations); of all of them the exact p.
    """
    return (z >= z[0] - tie).mean(0)


def maxima(z: np.ndarray) -> np.ndarray:
    """Largest value of a family under each labelling, shape (labellings,)."""
    return z.reshape(len(z), -1).max(1, initial=-math.inf)


def familywise_p(observed: np.ndarray, largest: np.ndarray, tie: np.ndarray | float = 0.0) -> np.ndarray:
    """P-values corrected for a family by the distribution of its maximum.

    Parameters
    ----------
    observed : ndarray, shape (...)
        Standardised statistics of the observed labelling.
    largest : ndarray, shape (labellings,)
        `maxima` of the family.
    tie : ndarray or float
        Differences up to this are ties.

    Notes
    -----
    Nichols and Holmes 2002, "Nonparametric permutation tests for functional neuroimaging", Hum. Brain Mapp. 15.
    """
    ordered = np.sort(largest)
    return (len(ordered) - np.searchsorted(ordered, observed - tie, side="left")) / len(ordered)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values that control the false discovery rate (Benjamini and Hochberg 1995)."""
    return stats.false_discovery_control(p, axis=None).reshape(p.shape) if p.size else p


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values that control the family-wise error whatever the dependence (Holm 1979)."""
    flat = p.ravel()
    order = np.argsort(flat)
    steps = flat[order] * np.arange(len(flat), 0, -1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.reshape(p.shape)


def too_few_labellings(labellings: int, tests: int, alpha: float, comparisons: int = 1) -> str:
    """Say so, where the smallest p that the labellings allow is too large for a correction to reject one test alone.

    Parameters
    ----------
    labellings : int
        The observed one among them.
    tests : int
        Tests of one comparison, over which the false discovery rate is controlled.
    alpha : float
        Level of significance.
    comparisons : int
        By how many Holm's p are multiplied.

    Returns
    -------
    str
        Empty where Holm's correction, and so the other, can reject one test alone.
    """
    in_family = tests * comparisons
    if in_family <= alpha * labellings:
        return ""
    together = math.ceil(tests / (alpha * labellings))
    within = f" over the {tests} of this comparison" if comparisons > 1 else ""
    if together > tests:
        hochberg = "none either"
    else:
        hochberg = f"only where at least {together} reach it" if together > 1 else "one alone"
    needed = math.ceil(in_family / alpha) - 1
    return (
        f"with {labellings} labellings no p is below {1 / labellings:.2g}: over {in_family} tests at {alpha:g}, Holm's "
        f"correction can reject none, Benjamini-Hochberg's{within} {hochberg}; {needed} permutations allow it"
    )


class Effects(NamedTuple):
    """Distances of observed statistics from their means over the other labellings, in these labellings' standard deviations.

    Attributes
    ----------
    estimate, low, high : ndarray, shape (...)
        The interval holds the effects that a test of equal tails would not reject, if an effect shifts the statistic and
        leaves its distribution over labellings as it is: its ends are order statistics, and infinite where there are too
        few labellings for such a test.  NaN where the statistic does not vary.
    spread : ndarray, shape (...)
        The standard deviations.
    """

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    spread: np.ndarray

    def around(self, observed: np.ndarray, end: np.ndarray) -> np.ndarray:
        """An end of the interval in the statistic's own units, around the observed one."""
        return observed + (end - self.estimate) * self.spread


def standardised_effect(values: np.ndarray, level: float = 0.95) -> Effects:
    """Effects of observed statistics.

    The observed labelling takes no part in mean and standard deviation: with it no effect could exceed the root of the number
    of the others.

    Parameters
    ----------
    values : ndarray, shape (labellings, ...)
        A statistic.
    level : float
        Coverage of the interval.
    """
    wide = values.astype(np.float64)
    others = wide[1:]
    spread = others.std(0)
    varies = spread > TIE * np.abs(wide).max(0)
    spread = np.where(varies, spread, np.nan)
    estimate = (wide[0] - others.mean(0)) / spread
    # A value beyond the k-th largest of the others has a p of at most k / (1 + others), itself counted.
    k = math.floor((1 - level) / 2 * len(wide) * (1 + 1e-12))
    if not k:
        return Effects(estimate, np.where(varies, -np.inf, np.nan), np.where(varies, np.inf, np.nan), spread)
    ordered = np.sort(others, axis=0)
    return Effects(estimate, (wide[0] - ordered[-k]) / spread, (wide[0] - ordered[k - 1]) / spread, spread)


def cluster_threshold(z: np.ndarray, quantile: float = 0.95) -> np.ndarray:
    """Quantile over labellings above which a value belongs to a cluster, shape (...)."""
    return np.quantile(z, quantile, axis=0)


def clusters(z: np.ndarray, threshold: np.ndarray) -> list[tuple[int, int, float]]:
    """Runs of neighbouring steps above the threshold under one labelling.

    Parameters
    ----------
    z : ndarray, shape (steps,)
        Standardised statistic.
    threshold : ndarray, shape (steps,)
        Of each step.

    Returns
    -------
    list of (int, int, float)
        First and last position of each run, and its mass: the sum of the statistic.
    """
    above = np.concatenate([[False], z > threshold, [False]]).astype(np.int8)
    starts, stops = np.flatnonzero(np.diff(above) == 1), np.flatnonzero(np.diff(above) == -1)
    return [(int(i), int(j) - 1, float(z[i:j].sum())) for i, j in zip(starts, stops, strict=True)]


def largest_cluster(z: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Largest mass of a cluster over steps under each labelling.

    Parameters
    ----------
    z : ndarray, shape (labellings, steps, ...)
        Standardised statistics; neighbours in time are neighbours on the second axis.
    threshold : ndarray, shape (steps, ...)
        Of each.

    Returns
    -------
    ndarray, shape (labellings,)
        0 where nothing is above.

    Notes
    -----
    Maris and Oostenveld 2007, "Nonparametric statistical testing of EEG- and MEG-data", J. Neurosci. Methods 164.
    """
    running = np.zeros((len(z), *z.shape[2:]))
    largest = np.zeros(len(z))
    for step in range(z.shape[1]):
        running = np.where(z[:, step] > threshold[step], running + z[:, step], 0.0)
        largest = np.maximum(largest, running.reshape(len(z), -1).max(1, initial=0.0))
    return largest
