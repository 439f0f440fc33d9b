"""Sizes of effects with intervals."""

from __future__ import annotations

import numpy as np
from scipy import special, stats


def hedges_g(
    a: np.ndarray, b: np.ndarray, axis: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hedges' g: the difference of two means in pooled standard deviations, without the bias of small samples.

    Parameters
    ----------
    a, b : ndarray
        Samples along the axis; the other axes are alike.
    axis : int
        Where the samples lie.
    level : float
        Coverage of the interval, for independent samples from normal distributions.

    Returns
    -------
    g, low, high : ndarray
        The estimate and the ends of its large-sample interval; NaN where neither sample varies.

    Notes
    -----
    Hedges 1981, "Distribution theory for Glass's estimator of effect size and related estimators", J. Educ. Stat. 6;
    the interval is that of Hedges and Olkin 1985, "Statistical methods for meta-analysis", chapter 5.
    """
    n, m = a.shape[axis], b.shape[axis]
    degrees = n + m - 2
    squares = sum(np.square(x - x.mean(axis, keepdims=True)).sum(axis) for x in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        pooled = np.sqrt(squares / degrees)
        g = np.where(pooled > 0, small_sample_factor(degrees) * (a.mean(axis) - b.mean(axis)) / pooled, np.nan)
    half = stats.norm.ppf((1 + level) / 2) * np.sqrt((n + m) / (n * m) + np.square(g) / (2 * (n + m)))
    return g, g - half, g + half


def small_sample_factor(degrees: float) -> float:
    """Ratio of the true effect to the mean of its estimate, with that many degrees of freedom (Hedges 1981)."""
    return float(np.exp(special.gammaln(degrees / 2) - special.gammaln((degrees - 1) / 2) - np.log(degrees / 2) / 2))
