"""Cleaning time courses, and functional network connectivity (FNC): how alike the time courses of networks are.

The order is the one that NeuroMark's features are made with: slow trends out, motion out if asked for, spikes out,
low-pass, Pearson correlation, Fisher's z.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import butter, filtfilt, periodogram

from autospec.errors import UserError

LOW_PASS_HZ = 0.15
FILTER_ORDER = 5
FILTER_PADDING = 15  # volumes, mirrored in value and time at both ends
TRENDS = 6  # columns of `remove_trends`: four waves, a line and a constant
LEAST_VOLUMES = 8  # more than these
ROUNDING = 1e-12
SPIKE = 2.5  # standard deviations
# Bands of Allen et al. (2011, Frontiers in Systems Neuroscience 5, 2): time courses of networks are slow.
SLOW_HZ = (0.0, 0.1)
FAST_HZ = (0.15, 0.25)


def remove_trends(timecourses: np.ndarray) -> np.ndarray:
    """Remove slow trends by least squares ("detrend 3").

    Parameters
    ----------
    timecourses : ndarray, shape (volumes, networks)

    Returns
    -------
    ndarray of float64, shape (volumes, networks)
        Without a constant, a ramp, and sines and cosines of one and two cycles from the first volume to the last.
    """
    if len(timecourses) < LEAST_VOLUMES:
        raise UserError(
            f"slow trends cannot be removed from {len(timecourses)} volumes: at least {LEAST_VOLUMES} are needed."
        )
    time = np.linspace(0, 1, len(timecourses))
    waves = [wave(2 * np.pi * cycles * time) for cycles in (2, 1) for wave in (np.sin, np.cos)]
    trends = np.stack([*waves, time, np.ones_like(time)], axis=1)
    values = timecourses.astype(np.float64)
    return values - trends @ np.linalg.lstsq(trends, values, rcond=None)[0]


def regress(x: np.ndarray, confounds: np.ndarray) -> np.ndarray:
    """Remove confounds, less their slow trends, by least squares.

    Trends are removed from time courses in a step of their own (`remove_trends`), so confounds must lose theirs as well
    (Lindquist et al. 2019, *Human Brain Mapping* 40, 2358-2376): fitted with them, they would bring trends back that were
    removed before, or take up a drift and leave their fast part, negative, in what is detrended afterwards.

    Parameters
    ----------
    x : ndarray, shape (volumes, voxels or networks)
        Detrended before, afterwards or not at all; it keeps its mean and slow trends.
    confounds : ndarray, shape (volumes, confounds)
        As they were measured.  Those that are slow trends themselves, or constant, are left out, and so is what several say
        but for a trend.

    Returns
    -------
    ndarray, shape and type of ``x``

    Raises
    ------
    UserError
        If there are too few volumes, or as many confounds as leave nothing.
    """
    fluctuations = remove_trends(confounds)
    # What remains of a confound that is a trend itself is rounding, and no confound.
    rounding = ROUNDING * np.abs(confounds).max(axis=0, initial=0)
    kept = np.abs(fluctuations).max(axis=0, initial=0) > rounding
    fluctuations, rounding = fluctuations[:, kept], rounding[kept]
    count = fluctuations.shape[1]
    if not count:
        return x.copy()
    if count >= len(x) - TRENDS:
        raise UserError(
            f"{count} confounds and {TRENDS} slow trends leave nothing of {len(x)} volumes: choose fewer confounds."
        )
    spread = fluctuations.std(axis=0)
    basis, lengths, _ = np.linalg.svd(fluctuations / spread, full_matrices=False)
    # A direction in which confounds differ by the rounding of their trends' removal alone is none, and not free of the mean.
    basis = basis[:, lengths > np.sqrt(fluctuations.size) * (rounding / spread).max()]
    values = x.astype(np.float64, copy=False)
    return (values - basis @ (basis.T @ values)).astype(x.dtype)


def remove_spikes(timecourses: np.ndarray) -> np.ndarray:
    """Replace spikes by the moving average of three volumes.

    Parameters
    ----------
    timecourses : ndarray, shape (volumes, networks)

    Returns
    -------
    ndarray of float64, shape (volumes, networks)
        A value is a spike where it differs from the moving average (of two volumes at both ends) by more than 2.5
        standard deviations of these differences.
    """
    values = timecourses.astype(np.float64)
    counts = np.convolve(np.ones(len(values)), np.ones(3), mode="same")[:, None]
    padded = np.pad(values, ((1, 1), (0, 0)))
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / counts
    difference = values - smooth
    spikes = np.abs(difference) > SPIKE * difference.std(axis=0, ddof=1)
    return np.where(spikes, smooth, values)


def low_pass(timecourses: np.ndarray, step: float, cutoff: float) -> np.ndarray:
    """Remove fast changes with a Butterworth filter of order 5, run forwards and backwards.

    Parameters
    ----------
    timecourses : ndarray, shape (volumes, networks)
    step : float
        Seconds between volumes.
    cutoff : float
        In Hz.  Where volumes are too far apart to hold anything faster, nothing is done.

    Returns
    -------
    ndarray of float64, shape (volumes, networks)
    """
    if cutoff >= 0.5 / step:
        return timecourses.astype(np.float64)
    if len(timecourses) <= FILTER_PADDING:
        raise UserError(
            f"{len(timecourses)} volumes are too few for the low-pass filter: more than {FILTER_PADDING} are needed."
        )
    numerator, denominator = butter(FILTER_ORDER, cutoff, fs=1 / step)
    return filtfilt(
        numerator, denominator, timecourses.astype(np.float64), axis=0, padtype="odd", padlen=FILTER_PADDING
    )


def least_volumes(step: float, cutoff: float | None) -> int:
    """How many volumes, ``step`` seconds apart, `clean_timecourses` needs with a low-pass filter at a cutoff in Hz."""
    filtered = cutoff is not None and cutoff < 0.5 / step
    return max(LEAST_VOLUMES, FILTER_PADDING + 1) if filtered else LEAST_VOLUMES


def clean_timecourses(
    timecourses: np.ndarray, step: float, confounds: np.ndarray | None, despike: bool, cutoff: float | None
) -> np.ndarray:
    """Clean time courses for connectivity.

    Parameters
    ----------
    timecourses : ndarray, shape (volumes, networks)
    step : float
        Seconds between volumes.
    confounds : ndarray (volumes, confounds) or None
        Regressed out without their slow trends, usually motion.
    despike : bool
        Whether spikes are replaced.
    cutoff : float or None
        Of the low-pass filter, in Hz.

    Returns
    -------
    ndarray of float64, shape (volumes, networks)
    """
    values = remove_trends(timecourses)
    if confounds is not None:
        values = regress(values, confounds)
    if despike:
        values = remove_spikes(values)
    return values if cutoff is None else low_pass(values, step, cutoff)


def connectivity(timecourses: np.ndarray) -> np.ndarray:
    """Fisher's z of the Pearson correlation of every two time courses.

    Parameters
    ----------
    timecourses : ndarray, shape (volumes, networks)

    Returns
    -------
    ndarray of float64, shape (networks, networks)
        Symmetric, with 0 on the diagonal.

    Raises
    ------
    UserError
        If a time course is constant.
    """
    values = timecourses.astype(np.float64)
    constant = np.flatnonzero(np.ptp(values, axis=0) == 0)
    if len(constant):
        raise UserError(f"the time course of network {constant[0] + 1} is constant: it correlates with nothing.")
    correlation = np.corrcoef(values, rowvar=False).reshape(values.shape[1], -1)
    limit = 1 - np.finfo(np.float64).eps
    z = np.arctanh(np.clip(correlation, -limit, limit))
    np.fill_diagonal(z, 0)
    return (z + z.T) / 2


def power_spectra(timecourses: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Periodogram of each time course, under a Hann window.

    Parameters
    ----------
    timecourses : ndarray, shape (volumes, networks)
    step : float
        Seconds between volumes.

    Returns
    -------
    frequencies : ndarray, shape (frequencies,)
        In Hz, without 0.
    power : ndarray, shape (frequencies, networks)
    """
    frequencies, power = periodogram(timecourses.astype(np.float64), fs=1 / step, window="hann", axis=0)
    return frequencies[1:], power[1:]


def spectral_summary(timecourses: np.ndarray, step: float) -> dict[str, np.ndarray]:
    """Say whether time courses look like those of networks: slow, not noise.

    Parameters
    ----------
    timecourses : ndarray, shape (volumes, networks)
    step : float
        Seconds between volumes.

    Returns
    -------
    dict of ndarray, each of shape (networks,)
        ``low_to_high_power``: power below 0.1 Hz over that from 0.15 to 0.25 Hz, NaN where volumes are too far apart
        to tell; ``dynamic_range``: largest power less the smallest at any higher frequency, of a spectrum whose
        largest power is 1; ``peak_hz``: frequency of the largest power.
    """
    frequencies, power = power_spectra(timecourses, step)
    slow = power[(frequencies > SLOW_HZ[0]) & (frequencies <= SLOW_HZ[1])].sum(axis=0)
    fast = power[(frequencies >= FAST_HZ[0]) & (frequencies <= FAST_HZ[1])].sum(axis=0)
    ratio = np.divide(slow, fast, out=np.full(power.shape[1], np.nan), where=fast > 0)
    highest = power.argmax(axis=0)
    after = np.minimum.accumulate(power[::-1], axis=0)[::-1]
    largest = power.max(axis=0)
    lowest = np.take_along_axis(after, highest[None], axis=0)[0]
    span = np.divide(largest - lowest, largest, out=np.zeros(power.shape[1]), where=largest > 0)
    return {"low_to_high_power": ratio, "dynamic_range": span, "peak_hz": frequencies[highest]}
