"""Matched subsamples and balance of covariates, as pure functions."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

# Largest difference of a matched pair in each covariate, and largest difference of means that counts as balanced, both in
# standard deviations.
CALIPER = 0.5
BALANCED = 0.25


def standardised_difference(values: np.ndarray, in_first: np.ndarray) -> np.ndarray:
    """Difference of two groups' means in pooled standard deviations, for each covariate.

    Parameters
    ----------
    values : ndarray, shape (subjects, covariates)
        Numbers.
    in_first : ndarray of bool, shape (subjects,)
        Who is in the first group.

    Returns
    -------
    ndarray, shape (covariates,)
        0 where nobody differs.
    """
    a, b = values[in_first], values[~in_first]
    pooled = np.sqrt((a.var(0) + b.var(0)) / 2)
    difference = a.mean(0) - b.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / pooled)


def matched_pairs(
    values: np.ndarray, exact: np.ndarray, in_first: np.ndarray, caliper: float = CALIPER
) -> list[tuple[int, int]]:
    """Pairs of one subject of each group that are alike, as many as there can be, as near as they can be.

    Parameters
    ----------
    values : ndarray, shape (subjects, covariates)
        Numbers, such as age and mean framewise displacement.
    exact : ndarray, shape (subjects,)
        What a pair must share, such as sex.
    in_first : ndarray of bool, shape (subjects,)
        Who is in the first group.
    caliper : float
        Largest difference of a pair in each covariate, in standard deviations over all subjects.

    Returns
    -------
    list of (int, int)
        Numbers of the subjects, the first group's first; nobody is in two pairs.  Whoever has no partner is left out.

    Notes
    -----
    Nearest neighbours within a caliper, by optimal assignment (Rosenbaum 1989, "Optimal matching for observational
    studies", J. Am. Stat. Assoc. 84).
    """
    spread = values.std(0)
    scaled = (values - values.mean(0)) / np.where(spread > 0, spread, 1.0)
    first, second = np.flatnonzero(in_first), np.flatnonzero(~in_first)
    apart = np.abs(scaled[first][:, None] - scaled[second][None])
    allowed = (apart <= caliper).all(2) & (exact[first][:, None] == exact[second][None])
    # A pair that is not allowed costs more than all that are.
    forbidden = 1 + apart.sum(2).max(initial=0) * min(len(first), len(second))
    rows, columns = linear_sum_assignment(np.where(allowed, apart.sum(2), forbidden))
    return [(int(first[i]), int(second[j])) for i, j in zip(rows, columns, strict=True) if allowed[i, j]]
