"""The paper's two t-tests, as pure functions on spectra.

They are kept under the name ``paper`` because the paper uses them.  They treat the steps of one training, or the
singular values of one spectrum, as independent samples, which they are not: with labels assigned at random the
first flags 12 to 38 % of singular values at p < 0.05 and the second none.  They describe a run; they are no tests
of groups.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from scipy import stats

WHAT_IT_IS_NOT = (
    "The paper's t-tests treat the steps of one training, or the singular values of one spectrum, as independent "
    "samples. They are not, so these p-values describe one run and are no evidence about groups."
)


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
        Test the values or their logarithms.

    Returns
    -------
    DataFrame
        One row for each step (``test`` is ``step``: the singular values are the samples) and for each singular
        value (``singular_value``: the steps are the samples), with two-tailed Student's and Welch's t and p, and
        ``resolved``: whether rounding cannot have made the difference.  A step is resolved if two values of both
        groups lie above the noise floor and any value varies over steps (one comparison is not to count once for each
        step); a singular value, if it lies above the noise floor in both groups at every step and varies over steps.
    """
    present = np.isfinite(a).any(0) & np.isfinite(b).any(0)
    a, b, index = a[:, present].astype(float), b[:, present].astype(float), index[present]
    above = (a > floor_a[:, None]) & (b > floor_b[:, None])
    varies = (np.ptp(a, axis=0) > floor_a.max(initial=0)) | (np.ptp(b, axis=0) > floor_b.max(initial=0))
    if scale == "log":
        with np.errstate(divide="ignore"):
            a, b = np.log(a), np.log(b)
    frames = []
    for test, axis, at, resolved in (
        ("step", 1, steps, (above.sum(1) >= 2) & varies.any()),
        ("singular_value", 0, index, above.all(0) & varies),
    ):
        columns: dict[str, object] = {"test": test, "at": at, "samples": a.shape[axis]}
        for name, equal in (("student", True), ("welch", False)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # constant samples: p is NaN or 0, and not resolved
                t, p = stats.ttest_ind(a, b, axis=axis, equal_var=equal)
            columns[f"t_{name}"], columns[f"p_{name}"] = t, p
        columns["resolved"] = resolved
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
