"""Panels of differences: where two groups' spectra part, and what a test says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from autospec.describe import effect_words
from autospec.figures.layout import HEAD_MM, bar_axes, name_axes, place_axes
from autospec.figures.selection import at_chance, rank_limits, recorded_statistics
from autospec.statistics.table import smallest_p

RIGHT_MM = 15.0
COLOURS = "PuOr_r"
# The same without colour, for runs at chance: the second group's value larger in white, the first's in dark grey.
GREYS = LinearSegmentedColormap.from_list("at chance", ["#f2f2f2", "#8c8c8c", "#262626"])
UNRESOLVED: dict[str, Any] = {"facecolor": "#dddddd", "edgecolor": "#aaaaaa", "hatch": "....."}
UNATTAINABLE: dict[str, Any] = {"facecolor": "#ffffff", "edgecolor": "#aaaaaa", "hatch": "/////"}
MARK = "#000000"
UNMARKED = "#aaaaaa"


@dataclass(frozen=True)
class Marks:
    """What a test calls significant in one layer and column.

    ``values``: numbers of singular values over all steps; ``steps``: steps over all singular values or of the whole
    layer; ``cells``: steps and numbers of singular values, two columns; ``tested``: the steps at which a test was made,
    where not all steps are.
    """

    values: np.ndarray
    steps: np.ndarray
    cells: np.ndarray
    tested: np.ndarray


def log_ratio(tree: xr.DataTree, layer: str, statistic: str, pair: list[str]) -> np.ndarray:
    """Log2 of the ratio of two groups' singular values.

    Returns
    -------
    ndarray, shape (index, step)
        NaN where a value is missing, not above the noise floor in both groups, or beyond the rank that either group's
        rows allow.
    """
    node = tree["layers"][layer]
    values, floors = (
        [node[name].sel(group=group).values for group in pair] for name in (statistic, f"{statistic}_noise_floor")
    )
    resolved = np.logical_and.reduce([value > floor[:, None] for value, floor in zip(values, floors, strict=True)])
    resolved &= node["index"].values <= rank_limits(tree, layer, statistic, pair).min()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(values[0].astype(float) / values[1])
    return np.where(resolved, ratio, np.nan).T


def of_pair(tests: pd.DataFrame, pair: list[str], test: str, variance: str) -> pd.DataFrame:
    """Rows of a table that compare two groups, whichever stands first, by the test that a panel names."""
    name = f"paper_{variance}" if test == "paper" else test
    return tests[(tests["test"] == name) & tests["group_a"].isin(pair) & tests["group_b"].isin(pair)]


def marks(rows: pd.DataFrame, layer: str, statistic: str, test: str) -> Marks:
    """Pick what is significant in one layer and column out of a pair's rows."""
    here = rows[rows["layer"] == layer]
    no_step, no_value = np.empty(0, dtype=int), np.empty((0, 2), dtype=int)
    if test == "paper":
        found = here[(here["statistic"] == statistic) & here["significant"]]
        return Marks(
            values=found.loc[found["step"].isna(), "index"].to_numpy(int),
            steps=found.loc[found["index"].isna(), "step"].to_numpy(int),
            cells=no_value,
            tested=no_step,
        )
    if statistic != "gradient":
        return Marks(no_step, no_step, no_value, no_step)
    whole = here[here["index"].isna()]
    contrast = here[(here["statistic"] == "contrast") & here["significant"] & here["index"].notna()]
    return Marks(
        values=no_step,
        steps=np.unique(whole.loc[whole["significant"], "step"].to_numpy(int)),
        cells=contrast[["step", "index"]].to_numpy(int),
        tested=np.unique(here["step"].dropna().to_numpy(int)),
    )


def draw_differences(
    figure: Any,
    tree: xr.DataTree,
    tests: pd.DataFrame,
    pair: list[str],
    test: str,
    variance: str,
    layers: list[str],
    head_mm: float = HEAD_MM,
) -> np.ndarray:
    """Draw one row of axes a layer, one column a statistic.

    Parameters
    ----------
    figure : Figure or SubFigure
        Where to draw.
    tree : xarray.DataTree
        Trajectories of a run.
    tests : DataFrame
        The tests of that run.
    pair : list of str
        The two groups.
    test : {"paper", "permutation", "refit"}
        Whose significance is marked.
    variance : {"student", "welch"}
        Which of the paper's t-tests.
    layers : list of str
        Which layers to draw.
    head_mm : float
        Height above the axes.

    Returns
    -------
    ndarray of Axes, shape (layers, statistics)
    """
    statistics = recorded_statistics(tree)
    axes = place_axes(figure, len(layers), len(statistics), RIGHT_MM, head_mm)
    ratios = {
        (layer, statistic): log_ratio(tree, layer, statistic, pair) for layer in layers for statistic in statistics
    }
    limit = colour_limit(ratios.values())
    colours = GREYS if at_chance(tree) else COLOURS
    rows = of_pair(tests, pair, test, variance)
    for row, layer in enumerate(layers):
        for column, statistic in enumerate(statistics):
            ax = axes[row, column]
            steps, index = tree["step"].values, tree["layers"][layer]["index"].values
            draw_cells(ax, steps, index, ratios[layer, statistic], limit, colours)
            _hatch(ax, index, rank_limits(tree, layer, statistic, pair).min())
            _mark(ax, marks(rows, layer, statistic, test))
    name_axes(axes, layers, statistics, "index")
    draw_ratio_bar(figure, axes[0, -1], axes[-1, -1], limit, colours, pair)
    return axes


def colour_limit(ratios: Any) -> float:
    """End of a symmetrical scale of colours: all but the largest 2 % of ratios lie within."""
    finite = np.concatenate([np.abs(ratio[np.isfinite(ratio)]) for ratio in ratios])
    return max(0.1, float(np.percentile(finite, 98))) if finite.size else 1.0


def draw_cells(
    axes: Axes, steps: np.ndarray, numbers: np.ndarray, ratio: np.ndarray, limit: float, colours: str | Colormap
) -> None:
    """Colour one cell for each number and step; what is not resolved stays dotted grey."""
    axes.patch.set(**UNRESOLVED)
    mesh = np.ma.masked_invalid(ratio)
    axes.pcolormesh(edges(steps), edges(numbers), mesh, cmap=colours, vmin=-limit, vmax=limit, rasterized=True)
    axes.set_ylim(edges(numbers)[-1], edges(numbers)[0])
    axes.set_xlim(edges(steps)[0], edges(steps)[-1])
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))


def draw_ratio_bar(
    figure: Any, top: Axes, bottom: Axes, limit: float, colours: str | Colormap, pair: list[str]
) -> None:
    """Draw the scale of the ratio at the right of a panel."""
    cax = bar_axes(figure, top, bottom, 11.5)
    bar = figure.colorbar(ScalarMappable(Normalize(-limit, limit), colours), cax=cax)
    bar.set_label("log₂ ratio, first over second", fontsize=5.5, labelpad=1)
    bar.set_ticks([tick for tick in MaxNLocator(4).tick_values(-limit, limit) if abs(tick) <= limit])
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(length=1.5)


def _hatch(axes: Axes, index: np.ndarray, limit: float) -> None:
    """Hatch the rows of singular values that a group's samples are too few to make different from zero."""
    if limit < index[-1]:
        axes.add_patch(
            Rectangle(
                (0, limit + 0.5),
                1,
                index[-1] - limit,
                transform=axes.get_yaxis_transform(),
                linewidth=0,
                label="beyond the attainable rank",
                **UNATTAINABLE,
            )
        )


def _mark(axes: Axes, found: Marks) -> None:
    """Dots at the right of singular values and in cells, squares above steps."""
    inches = axes.figure.dpi_scale_trans
    beside = axes.get_yaxis_transform() + ScaledTranslation(2.5 / 72, 0, inches)
    above = axes.get_xaxis_transform() + ScaledTranslation(0, 2.5 / 72, inches)
    outside: dict[str, Any] = {"clip_on": False, "linewidths": 0}
    edge = np.ones(len(found.values))
    axes.scatter(edge, found.values, s=2.5, color=MARK, transform=beside, label="singular values", **outside)
    unmarked = np.setdiff1d(found.tested, found.steps)
    for steps, colour, label in ((found.steps, MARK, "steps"), (unmarked, UNMARKED, "tested steps")):
        edge = np.ones(len(steps))
        axes.scatter(steps, edge, s=3, marker="s", color=colour, transform=above, label=label, **outside)
    axes.scatter(
        found.cells[:, 0],
        found.cells[:, 1],
        s=5,
        color=MARK,
        edgecolors="white",
        linewidths=0.4,
        clip_on=False,
        label="cells",
        zorder=3,
    )


def edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around sorted centres."""
    centres = np.asarray(centres, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[:-1] + centres[1:]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def difference_words(rows: pd.DataFrame, test: str) -> str:
    """One line that says which test marks a panel, and of a valid test the smallest p with its effect."""
    if rows.empty:
        return f"test: {test}, not made for these groups"
    if test == "paper":
        return "test: paper"
    found = smallest_p(rows[rows["statistic"] == "contrast"])
    if found is None:
        return f"test: {test}, no p"
    return f"test: {test}, smallest p {found['p_adjusted']:.2g}, effect {effect_words(found)}"


def difference_key(tests: set[str], alpha: float, variance: str, scale: str) -> str:
    """What the marks of panels of differences mean."""
    name = {"student": "Student's", "welch": "Welch's"}[variance]
    of_what = {"raw": "", "log": " of the values' logarithms, else"}[scale]
    parts = [
        "Differences: dotted grey, below the noise floor; hatched, beyond the rank that either group's samples allow."
    ]
    if "paper" in tests:
        parts.append(
            f"Test paper: dots at the right, singular values with p < {alpha:g} over steps; squares above, steps with "
            f"p < {alpha:g} over singular values; uncorrected. {name} t-test{of_what} as in the paper, which takes dependent "
            "samples for independent: no test of groups."
        )
    valid = [test for test in ("permutation", "refit") if test in tests]
    if valid:
        how = {
            "permutation": "labels permuted with the weights as they are",
            "refit": "labels permuted before training, the whole training repeated",
        }
        parts.append(
            f"{'; '.join(f'Test {test}: {how[test]}' for test in valid)}. Dots, singular values of the contrast (difference "
            f"of the groups' mean gradients) with family-wise p of at most {alpha:g}; squares above, the steps tested, black where "
            f"the whole layer's cosine, effective rank or distance is significant. Smallest p: that of the contrast; its "
            "effect is the distance from the mean over the other labellings in their standard deviations, with a 95 % interval."
        )
    return " ".join(parts)
