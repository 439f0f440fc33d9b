"""The paper's two t-tests, as pure functions on spectra.

They are kept under the name ``paper`` because the paper uses them.  They treat the steps of one training, or the
singular values of one spectrum, as independent samples, which they are not: with labels assigned at random the
first flags 12 to 38 % of singular values at p < 0.05 and the second none.  They describe a run; they are no tests
of groups.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from autospec.statistics.effects import hedges_g

WHAT_IT_IS_NOT = (
    "The paper's t-tests treat the steps of one training, or the singular values of one spectrum, as independent "
    "samples. They are not, so these p-values describe one run and are no evidence about groups."
)
LEVEL = 0.95


def compare_spectra(
    a: np.ndarray,
    b: np.ndarray,
    floor_a: np.ndarray,
    floor_b: np.ndarray,
    steps: np.ndarray,
    index: np.ndarray,
    scale: str = "raw",
) -> pd.DataFrame:
    """Both of the paper's tests for one layer, one statistic and two groups.

    Parameters
    ----------
    a, b : ndarray, shape (steps, singular values)
        Spectra of the two groups; NaN where a group has no such value.
    floor_a, floor_b : ndarray, shape (steps,)
        Their noise floors.
    steps : ndarray of int, shape (steps,)
        The recorded steps.
    index : ndarray of int, shape (singular values,)
        Numbers of the singular values.
    scale : {"raw", "log"}
        Test the values or their logarithms; at a step the logarithms of those singular values that lie above the noise
        floor in both groups at every step that has samples of both.

    Returns
    -------
    DataFrame
        One row for each step (``step``; the singular values are the samples) and one for each singular value
        (``index``; the steps are the samples), of Student's and of Welch's two-tailed test (``test``): ``estimate``, the
        difference of means, with its t interval; ``effect_size``, Hedges' g, with its interval; ``p``; and
        ``below_floor``, where rounding may have made the difference and p is NaN.  A step is above it if two values of
        both groups lie above the noise floor and any value varies over steps (one comparison is not to count once for
        each step); a singular value, if it lies above the noise floor in both groups at every step that has samples of both,
        and varies over these steps.
    """
    present = np.isfinite(a).any(0) & np.isfinite(b).any(0)
    a, b, index = a[:, present].astype(float), b[:, present].astype(float), index[present]
    above = (a > floor_a[:, None]) & (b > floor_b[:, None])
    # A batch may hold nobody of a group.
    there = np.isfinite(a).any(1) & np.isfinite(b).any(1)
    varies = np.zeros(a.shape[1], dtype=bool)
    for values, floor in ((a[there], floor_a[there]), (b[there], floor_b[there])):
        varies |= (values.max(0, initial=-np.inf) - values.min(0, initial=np.inf)) > floor.max(initial=0)
    always = above[there].all(0) & there.any()
    # Of values that are zero at some steps, as where a group has few samples, there is no logarithm.
    positive = always if scale == "log" else np.ones(a.shape[1], dtype=bool)
    if scale == "log":
        with np.errstate(divide="ignore"):
            a, b = np.log(a), np.log(b)
    of_step = (a[:, positive], b[:, positive])
    if positive.sum() < 2:
        of_step = (np.full((len(a), 2), np.nan),) * 2
    frames = []
    for axis, place, resolved, (x, y) in (
        (1, {"step": steps, "index": np.nan}, (above[:, positive].sum(1) >= 2) & varies.any(), of_step),
        (0, {"step": np.nan, "index": index}, always & varies, (a[there], b[there])),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # constant samples and logarithms of 0 are not resolved
            effect, effect_low, effect_high = hedges_g(x, y, axis, LEVEL)
            for name, equal in (("student", True), ("welch", False)):
                found = stats.ttest_ind(x, y, axis=axis, equal_var=equal)
                interval = found.confidence_interval(LEVEL)
                columns: dict[str, Any] = {
                    **place,
                    "test": f"paper_{name}",
                    "estimate": np.where(np.isfinite(estimate := x.mean(axis) - y.mean(axis)), estimate, np.nan),
                    "interval_low": interval.low,
                    "interval_high": interval.high,
                    "effect_size": effect,
                    "effect_low": effect_low,
                    "effect_high": effect_high,
                    "p": np.where(resolved, found.pvalue, np.nan),
                    "below_floor": ~resolved,
                }
                frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
