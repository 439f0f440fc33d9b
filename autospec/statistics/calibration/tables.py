"""Rates of rejection with exact intervals, and what stands in the calibration's tables.  Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from autospec.errors import UserError
from autospec.statistics.calibration.design import (
    ALPHA,
    GROUPS,
    HIDDEN,
    LEARNING_RATE,
    MISSPECIFIED,
    PAPER,
    PERMUTATION,
    POWER_REFIT_STEPS,
    POWER_STEPS,
    REFIT,
    STEPS,
    CalibrationSettings,
)
from autospec.storage import written_whole

# Which values a p-value refers to.
ALL = "all"
FIRST_VALUE = "first of the encoder"
CLUSTERS = "clusters of steps"
# The same for the paper's tests, with what they take as samples.
OVER_STEPS = "first of the encoder, steps as samples"
ANY_OVER_STEPS = "any, steps as samples"
HOLM_OVER_STEPS = "any after Holm, steps as samples"
OVER_VALUES = "encoder, values as samples"
ANY_OVER_VALUES = "any layer, values as samples"

COLUMNS = {
    "data": "volumes: the simulated cohort's subcortical volumes; digits: real images of one digit, 7 x 7 pixels",
    "task": "what the network learned: to reconstruct its input, or to predict the labels under test",
    "groups": "sizes of the two groups",
    "effect": "Cohen's d of eight of the 39 volumes; 0: the labels say nothing that the confounder does not say",
    "confounding": "none; number: the label's odds and the data depend on a number (head motion, or ink); strata: on one of "
    "two strata (site, or half of the ink); square, threshold, cube, wave: on this function of head motion, which the "
    "conditional test's model of the label, linear in motion, does not describe",
    "test": "the paper's t-tests, permutation of labels at fixed weights, or refit: training again with permuted labels",
    "statistic": "what was compared: the spectrum of the contrast, the difference of the groups' spectra, the cosine, the "
    "difference of effective ranks, the contrast's norm, all of them together, or the groups' spectra (paper)",
    "step": "updates done before; all: over all steps",
    "values": "which values of the statistic: the first of the encoder, one test; all of both layers, with the correction "
    "for their number (and that of steps and statistics, where step or statistic is all); clusters of steps; and what "
    "the paper's t-tests take as samples",
    "expected": "alpha: the level should be held; above, unknown: it need not be, and why says so",
    "offered": "whether autospec gives this p as a test of groups",
    "why": "why the level need not be held, or why the test is not offered",
    "repetitions": "studies drawn",
    "refusals": "of these, those without a p, because an imbalance of the confounder remained",
    "rejections": "of the others, those with p of at most alpha",
    "rate": "rejections among those with a p",
    "low": "lower end of its exact 95 % interval (Clopper and Pearson)",
    "high": "upper end",
}


def exact_interval(
    rejections: np.ndarray | int, repetitions: np.ndarray | int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a binomial probability that covers it at least as often as it says (Clopper and Pearson 1934).

    Parameters
    ----------
    rejections, repetitions : array-like of int
        Successes, and trials; without a trial the interval is 0 to 1.
    level : float
        Coverage.
    """
    k, n = np.broadcast_arrays(np.asarray(rejections), np.asarray(repetitions))
    tail = (1 - level) / 2
    low = np.where(k > 0, stats.beta.ppf(tail, np.maximum(k, 1), n - k + 1), 0.0)
    high = np.where(k < n, stats.beta.ppf(1 - tail, k + 1, np.maximum(n - k, 1)), 1.0)
    return low, high


def tally(rows: Iterable[Mapping[str, Any]], p: Iterable[Sequence[float]]) -> pd.DataFrame:
    """Count rejections.

    Parameters
    ----------
    rows : iterable of mapping
        What stands in each row, by column.
    p : iterable of sequence of float
        P-values of all repetitions of each row; NaN where it was refused.

    Returns
    -------
    DataFrame
        With the columns `COLUMNS`.
    """
    table = pd.DataFrame(list(rows))
    values = [np.asarray(each, dtype=float) for each in p]
    table["repetitions"] = [len(each) for each in values]
    table["refusals"] = [int(np.isnan(each).sum()) for each in values]
    table["rejections"] = [int((each <= ALPHA + 1e-9).sum()) for each in values]
    given = table["repetitions"] - table["refusals"]
    table["rate"] = (table["rejections"] / given).where(given > 0)
    table["low"], table["high"] = exact_interval(table["rejections"].to_numpy(), given.to_numpy())
    return table[list(COLUMNS)]


def expectation(task: str, test: str, confounding: str) -> dict[str, str]:
    """What theory says of a test's level: the columns ``expected``, ``offered`` and ``why``."""
    if test == PAPER:
        return {
            "expected": "unknown",
            "offered": "no",
            "why": "steps of a training and values of a spectrum are no independent samples",
        }
    if test.startswith(PERMUTATION) and task == "classifier":
        return {"expected": "above", "offered": "no", "why": "the weights and adjoints have seen the labels"}
    if confounding != "none" and test in (PERMUTATION, REFIT):
        return {"expected": "above", "offered": "yes", "why": "the confounder is left out"}
    if confounding in MISSPECIFIED:
        return {"expected": "above", "offered": "yes", "why": "the model of the label is wrong"}
    return {"expected": "alpha", "offered": "yes", "why": ""}


def read_part(path: str | Path) -> pd.DataFrame:
    """Read the table of a part; raises UserError if it is none."""
    try:
        table = pd.read_csv(path, sep="\t", dtype={"step": str}, keep_default_na=False, na_values={"rate": [""]})
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable table of a calibration ({error}): make it again.") from None
    if list(table.columns) != list(COLUMNS):
        raise UserError(f"{path} has other columns than a table of a calibration: make it again.")
    return table


def gather(paths: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Join the parts' tables: the rates without a difference of groups, and those with one."""
    null, power = (
        [path for path in paths if Path(path).name.startswith("power-") == wanted] for wanted in (False, True)
    )
    return tuple(pd.concat([read_part(path) for path in some], ignore_index=True) for some in (null, power))  # type: ignore[return-value]


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table, tab-separated; it appears whole or not at all."""
    with written_whole(path) as temporary:
        table.to_csv(temporary, sep="\t", index=False, float_format="%.6g")


def described(settings: CalibrationSettings) -> dict[str, Any]:
    """What was done, in words and numbers, and what each column holds."""
    sizes = " or ".join(f"{a} and {b}" for a, b in GROUPS.values())
    method = (
        f"Each repetition drew the samples of two groups ({sizes}) and trained a network with one hidden layer of {HIDDEN} "
        f"units (ReLU), full batch, Adam with learning rate {LEARNING_RATE:g}, {max(STEPS)} updates "
        f"({max(POWER_STEPS)} for power). The paper's t-tests took all steps as recorded; permutation and refit looked at "
        f"the steps {', '.join(map(str, STEPS))} ({', '.join(map(str, POWER_STEPS))} for power, "
        f"{', '.join(map(str, POWER_REFIT_STEPS))} for its refits). There were {settings['repetitions']} repetitions, "
        f"{settings['refit_repetitions']} of refit and {settings['power_repetitions']} at each effect for the power of "
        f"permutation, with {settings['permutations']} permutations each and the seed {settings['seed']}. A null "
        f"hypothesis was rejected where p was at most {ALPHA:g}; intervals are exact (Clopper and Pearson 1934, 95 %)."
    )
    return {"method": method, "settings": dict(settings), "columns": COLUMNS}


def write_described(settings: CalibrationSettings, path: str | Path) -> None:
    """Write the description beside the tables."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(described(settings), indent=1) + "\n", encoding="utf-8")
