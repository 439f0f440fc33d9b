"""Scaling of maps and time courses to z-scores, per subject or over a cohort as GIFT does."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from scipy.ndimage import gaussian_filter1d

from autospec.errors import UserError
from autospec.ica.cleaning import regress, remove_trends

VALUES_A_BIN = 10


def scale_maps(maps: np.ndarray) -> np.ndarray:
    """Each map less its mean over voxels, divided by its standard deviation (n - 1).

    Parameters
    ----------
    maps : ndarray, shape (networks, voxels)

    Returns
    -------
    ndarray of the type of ``maps``, same shape
    """
    return shift_and_scale_maps(maps, maps.mean(axis=1, dtype=np.float64))


def scale_timecourses(timecourses: np.ndarray, confounds: np.ndarray | None = None) -> np.ndarray:
    """Each time course without slow trends, and without confounds, divided by its standard deviation (n - 1).

    Parameters
    ----------
    timecourses : ndarray, shape (volumes, networks)
    confounds : ndarray (volumes, confounds) or None
        Regressed out, usually motion.

    Returns
    -------
    ndarray of float64, same shape

    Raises
    ------
    UserError
        If a time course is constant, or there are too few volumes.
    """
    values = remove_trends(timecourses)
    if confounds is not None:
        values = regress(values, confounds)
    spread = values.std(axis=0, ddof=1)
    if not spread.all():
        raise UserError(f"the time course of network {int(np.argmin(spread)) + 1} is constant: it cannot be scaled.")
    return values / spread


def shift_and_scale_maps(maps: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Each map v less its shift, divided by sqrt(sum of squares / (n - 1)).

    Parameters
    ----------
    maps : ndarray, shape (networks, voxels)
    shifts : ndarray, shape (networks,)
        Means give z-scores; modes of the cohort's mean maps give GIFT's scaling.

    Returns
    -------
    ndarray of the type of ``maps``, same shape
    """
    shifted = maps.astype(np.float64) - shifts[:, None]
    spread = np.sqrt((shifted**2).sum(axis=1, keepdims=True) / (maps.shape[1] - 1))
    if not spread.all():
        raise UserError(f"the map of network {int(np.argmin(spread)) + 1} is constant: it cannot be scaled.")
    return (shifted / spread).astype(maps.dtype)


def mode(values: np.ndarray) -> float:
    """Most frequent value: the peak of a smoothed histogram with one bin for ten values.

    Parameters
    ----------
    values : ndarray, shape (n,)

    Returns
    -------
    float
        Centre of the fullest bin.  The histogram is smoothed by a Gaussian of Silverman's width (1986, *Density
        Estimation for Statistics and Data Analysis*): 0.9 min(standard deviation, interquartile range / 1.34) n^-1/5.
    """
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values) == 0:
        return float(values[0])
    counts, edges = np.histogram(values, bins=math.ceil(len(values) / VALUES_A_BIN))
    quarter, three_quarters = np.quantile(values, [0.25, 0.75])
    spread = min(values.std(ddof=1), (three_quarters - quarter) / 1.34) or values.std(ddof=1)
    width = 0.9 * spread * len(values) ** -0.2 / (edges[1] - edges[0])
    smooth = gaussian_filter1d(counts.astype(np.float64), width, mode="constant")
    fullest = int(smooth.argmax())
    return float((edges[fullest] + edges[fullest + 1]) / 2)


def cohort_modes(subjects: Iterable[np.ndarray]) -> np.ndarray:
    """Mode of each network's mean map over subjects, which GIFT subtracts from every subject's map.

    Parameters
    ----------
    subjects : iterable of ndarray, each of shape (networks, voxels)
        Unscaled maps on the same voxels; one is in memory at a time.

    Returns
    -------
    ndarray, shape (networks,)
    """
    total, count = None, 0
    for maps in subjects:
        if total is None:
            total = np.zeros(maps.shape)
        if maps.shape != total.shape:
            raise UserError(f"maps of {maps.shape} and {total.shape} do not fit: all subjects need the same voxels.")
        total += maps
        count += 1
    if total is None:
        raise UserError("GIFT's scaling needs at least one subject.")
    return np.array([mode(row) for row in total / count])
