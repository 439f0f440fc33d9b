"""Panels G and H: where two groups' spectra differ, and where the paper's t-tests call that significant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from autospec.figures.spectra import label_axes, recorded_statistics

COLOURS = "PuOr_r"
UNRESOLVED = "#dddddd"
MARK = "#000000"


def log_ratio(tree: xr.DataTree, layer: str, statistic: str, pair: list[str]) -> np.ndarray:
    """Log2 of the ratio of two groups' singular values.

    Returns
    -------
    ndarray, shape (index, step)
        NaN where a value is missing or not above the noise floor in both groups.
    """
    node = tree["layers"][layer]
    values, floors = (
        [node[name].sel(group=group).values for group in pair] for name in (statistic, f"{statistic}_noise_floor")
    )
    resolved = np.logical_and.reduce([value > floor[:, None] for value, floor in zip(values, floors, strict=True)])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(values[0].astype(float) / values[1])
    return np.where(resolved, ratio, np.nan).T


def significant(
    tests: pd.DataFrame, layer: str, statistic: str, pair: list[str], test: str, variance: str, alpha: float
) -> np.ndarray:
    """Steps, or singular values, at which two groups differ by the paper's test, in values above the noise floor."""
    rows = tests[
        (tests["layer"] == layer)
        & (tests["statistic"] == statistic)
        & (tests["test"] == test)
        & tests["group_a"].isin(pair)
        & tests["group_b"].isin(pair)
    ]
    return rows.loc[rows["resolved"] & (rows[f"p_{variance}"] < alpha), "at"].to_numpy()


def draw_differences(
    figure: SubFigure,
    tree: xr.DataTree,
    tests: pd.DataFrame,
    pair: list[str],
    variance: str,
    alpha: float,
) -> np.ndarray:
    """Draw one row of axes a layer, one column a statistic.

    Parameters
    ----------
    figure : SubFigure
        Where to draw.
    tree : xarray.DataTree
        Trajectories of a run.
    tests : DataFrame
        The paper's tests of that run.
    pair : list of str
        The two groups.
    variance : {"student", "welch"}
        Which t-test decides.
    alpha : float
        Level of significance.

    Returns
    -------
    ndarray of Axes, shape (layers, statistics)
    """
    layers, statistics = list(tree["layers"].children), recorded_statistics(tree)
    axes = figure.subplots(len(layers), len(statistics), squeeze=False, sharex=True)
    ratios = {(la, st): log_ratio(tree, la, st, pair) for la in layers for st in statistics}
    finite = np.concatenate([np.abs(ratio[np.isfinite(ratio)]) for ratio in ratios.values()])
    limit = max(0.1, float(np.percentile(finite, 98))) if finite.size else 1.0
    for row, layer in enumerate(layers):
        for column, statistic in enumerate(statistics):
            ax = axes[row, column]
            _draw_ratio(ax, tree, layer, ratios[layer, statistic], limit)
            _mark(ax, tree, tests, layer, statistic, pair, variance, alpha)
            label_axes(axes, row, column, layer, statistic)
    bar = figure.colorbar(
        ScalarMappable(Normalize(-limit, limit), COLOURS), ax=axes, fraction=0.025, pad=0.035, aspect=30
    )
    bar.set_label(f"log2 ratio, {pair[0]} over {pair[1]}", fontsize=6)
    bar.outline.set_linewidth(0.4)
    return axes


def _draw_ratio(axes: Axes, tree: xr.DataTree, layer: str, ratio: np.ndarray, limit: float) -> None:
    steps, index = tree["step"].values, tree["layers"][layer]["index"].values
    axes.set_facecolor(UNRESOLVED)
    axes.pcolormesh(
        edges(steps),
        edges(index),
        np.ma.masked_invalid(ratio),
        cmap=COLOURS,
        vmin=-limit,
        vmax=limit,
        rasterized=True,
    )
    axes.set_ylim(edges(index)[-1], edges(index)[0])
    axes.set_xlim(edges(steps)[0], edges(steps)[-1])
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _mark(
    axes: Axes,
    tree: xr.DataTree,
    tests: pd.DataFrame,
    layer: str,
    statistic: str,
    pair: list[str],
    variance: str,
    alpha: float,
) -> None:
    """Dots to the right of significant singular values, ticks above significant steps."""
    where: dict[str, Any] = {"clip_on": False, "color": MARK, "linewidths": 0}
    values = significant(tests, layer, statistic, pair, "singular_value", variance, alpha)
    axes.scatter(
        np.full(len(values), 1.025),
        values,
        s=2.2,
        transform=axes.get_yaxis_transform(),
        label="singular values",
        **where,
    )
    steps = significant(tests, layer, statistic, pair, "step", variance, alpha)
    axes.scatter(
        steps,
        np.full(len(steps), 1.03),
        s=2.2,
        marker="s",
        transform=axes.get_xaxis_transform(),
        label="steps",
        **where,
    )


def edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around sorted centres."""
    centres = np.asarray(centres, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[:-1] + centres[1:]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])
