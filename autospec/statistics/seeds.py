"""How much trainings from different initial weights differ, and how much a cohort of other subjects might.

Seeds are no subjects: what varies over them is the initialisation of networks on this one cohort, whatever the number of
seeds, so nothing here is a test of groups.  Intervals for the population resample subjects.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from autospec.statistics.table import comparison_name

WHAT_IT_IS = (
    "Variability over initialisations of this cohort: how much the base-2 logarithm of the ratio of the two groups' largest "
    "singular values per sample differs between trainings from different seeds. It is no test of groups, since seeds are no "
    "subjects."
)
LEVEL = 0.95
REPETITIONS = 2000


def mixed_model(values: np.ndarray) -> dict[str, Any]:
    """Fit a mean with a random intercept for each seed.

    Parameters
    ----------
    values : ndarray, shape (seeds, steps)
        A quantity of each training at some steps; NaN where it is not defined.

    Returns
    -------
    dict
        ``estimate``, ``low`` and ``high`` of the mean (95 % interval by restricted maximum likelihood),
        ``deviation_between_seeds``, ``deviation_within``, ``converged``, and ``warnings`` in the fit's own words.  The
        numbers are None where there are fewer than two seeds with values, or nothing varies.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    seed, _ = np.nonzero(np.isfinite(values))
    y = values[np.isfinite(values)]
    names = ("estimate", "low", "high", "deviation_between_seeds", "deviation_within")
    empty: dict[str, Any] = {**dict.fromkeys(names), "converged": False}
    if len(set(seed)) < 2 or len(y) < len(set(seed)) + 2 or np.ptp(y) == 0:
        return {**empty, "warnings": ["there is too little that varies for a mixed model"]}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            fit = MixedLM(y, np.ones((len(y), 1)), groups=seed).fit(reml=True)
            low, high = np.asarray(fit.conf_int(1 - LEVEL))[0]
            numbers = (fit.params[0], low, high, np.sqrt(np.asarray(fit.cov_re)[0, 0]), np.sqrt(fit.scale))
        except (np.linalg.LinAlgError, ValueError) as error:
            return {**empty, "warnings": [str(error)]}
    words = list(dict.fromkeys(str(each.message) for each in said))
    found = {name: float(number) if np.isfinite(number) else None for name, number in zip(names, numbers, strict=True)}
    return {**found, "converged": bool(fit.converged), "warnings": words}


def bootstrap_mean(values: np.ndarray, seed: int = 0, repetitions: int = REPETITIONS) -> tuple[float, float, float]:
    """Mean of a quantity over trainings, with the percentile interval of means over trainings drawn with replacement.

    Parameters
    ----------
    values : ndarray, shape (seeds,)
        One number for each training; NaN is left out.
    seed : int
        Seed of the drawing.
    repetitions : int
        How often to draw.

    Returns
    -------
    mean, low, high : float
        NaN where no training has a number.

    Notes
    -----
    Efron 1979, "Bootstrap methods: another look at the jackknife", Ann. Stat. 7.
    """
    present = values[np.isfinite(values)]
    if not len(present):
        return (np.nan,) * 3
    drawn = np.random.default_rng(seed).integers(0, len(present), size=(repetitions, len(present)))
    low, high = np.quantile(present[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(present.mean()), float(low), float(high)


def log_ratio(tree: xr.DataTree, layer: str, pair: tuple[str, str]) -> np.ndarray:
    """Base-2 logarithm of the ratio of two groups' largest singular values per sample, shape (steps,).

    NaN where either lies below its noise floor.
    """
    node = tree[f"layers/{layer}"]
    largest = node["gradient"].sel(group=list(pair)).isel(index=0).values.astype(np.float64)
    above = largest > node["gradient_noise_floor"].sel(group=list(pair)).values
    mean = np.where(above, largest, np.nan) / tree["group_size"].sel(group=list(pair)).values
    return np.log2(mean[:, 0] / mean[:, 1])


def describe_seeds(trees: Mapping[str, xr.DataTree], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Variability over the seeds of a run, of each layer and pair of groups, as a JSON file can hold it.

    Parameters
    ----------
    trees : mapping of str to DataTree
        Trajectories of each training, by name.
    pairs : sequence of (str, str)
        The comparisons.
    """
    first = next(iter(trees.values()))
    common = sorted(set.intersection(*(set(tree["step"].values.tolist()) for tree in trees.values())))
    found = []
    for layer, node in first["layers"].children.items():
        if "gradient" not in node or not common:
            continue
        for pair in pairs:
            values = np.array(
                [log_ratio(tree, layer, pair)[np.isin(tree["step"].values, common)] for tree in trees.values()]
            )
            mean, low, high = (None if np.isnan(each) else each for each in bootstrap_mean(values[:, -1]))
            found.append(
                {
                    "layer": layer,
                    "comparison": comparison_name(*pair),
                    "last_step": {"step": common[-1], "mean": mean, "bootstrap_low": low, "bootstrap_high": high},
                    "mixed_model": mixed_model(values),
                }
            )
    return {
        "what_it_is": WHAT_IT_IS,
        "method": (
            f"{len(trees)} trainings from different seeds; a linear mixed model with a random intercept for each training over "
            f"{len(common)} recorded steps, by restricted maximum likelihood; at the last step the mean with a 95 % percentile "
            f"interval over {REPETITIONS} draws of trainings with replacement."
        ),
        "trainings": list(trees),
        "layers": found,
    }
