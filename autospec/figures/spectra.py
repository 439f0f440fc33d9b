"""Panels of spectra: singular values of every layer over training, by group."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, TransformedBbox

from autospec.describe import group_words
from autospec.figures.differences import edges
from autospec.figures.layout import HEAD_MM, name_axes, place_axes
from autospec.figures.selection import at_chance, rank_limits, recorded_statistics, shown_groups
from autospec.figures.style import GREYS, GROUP_COLOURS, colours, dashes, power_of_ten, sigma
from autospec.statistics.sizes import training_samples

RIGHT_MM = 5.0
LEGEND_COLUMN_MM, LEGEND_ROW_MM = 50.0, 3.4
FLOOR_COLOUR = "#dddddd"
LIMIT: dict[str, Any] = {"color": "#000000", "linestyle": (0, (1, 1.2)), "linewidth": 1.3}
LIMIT_WORDS = (
    "limit of resolution: a group's singular values differ from those of all other samples' share by at most σ₁ of the "
    "whole batch's gradient"
)
GREY_WORDS = "A network at chance on held-out data is drawn in grey."
# Lines beyond the rank that a group's rows allow.
PALE = 0.25


def draw_spectra(
    figure: Any, tree: xr.DataTree, singular_values: list[int], layers: list[str], head_mm: float = HEAD_MM
) -> np.ndarray:
    """Draw one row of axes a layer, one column a statistic.

    Parameters
    ----------
    figure : Figure or SubFigure
        Where to draw.
    tree : xarray.DataTree
        Trajectories of a run.
    singular_values : list of int
        Which singular values to draw, from 1.
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
    for row, layer in enumerate(layers):
        for column, statistic in enumerate(statistics):
            draw_trajectories(axes[row, column], tree, layer, statistic, singular_values)
    name_axes(axes, layers, statistics, "singular value")
    return axes


def draw_trajectories(axes: Axes, tree: xr.DataTree, layer: str, statistic: str, singular_values: list[int]) -> None:
    """Draw some singular values of one layer against the step, a line for each group."""
    node = tree["layers"][layer]
    steps, index = tree["step"].values, node["index"].values
    drawn = [k for k in singular_values if k in index]
    groups, grey = shown_groups(tree), at_chance(tree)
    values = node[statistic].sel(group=groups, index=drawn).transpose("group", "index", "step").values
    floor = np.nanmax(node[f"{statistic}_noise_floor"].sel(group=groups).values, axis=1, initial=0.0)
    limits = rank_limits(tree, layer, statistic, groups)
    palette, patterns = colours(groups, grey), dashes(groups, grey)
    for position, group in enumerate(groups):
        for number, k in enumerate(drawn):
            if statistic == "gradient" and position == 0 and k == 1:
                continue  # drawn as the limit of resolution
            _draw_line(
                axes,
                steps,
                values[position, number],
                color=palette[group],
                linewidth=max(0.35, 1.1 - 0.2 * singular_values.index(k)),  # the same in layers that have fewer of them
                linestyle=patterns[group],
                alpha=PALE if k > limits[position] else None,
                zorder=1 if position == 0 else 2,
                label=group if number == 0 else "_nolegend_",
            )
    shown = values
    if statistic == "gradient" and 1 in index:
        limit = node[statistic].sel(group=groups[0], index=1).values
        _draw_line(axes, steps, limit, zorder=1, label="limit of resolution", **LIMIT)
        shown = np.concatenate([values.reshape(-1, len(steps)), limit[None]])
    axes.set_yscale("log")
    # A single step has as much room as the cells of a comparison have.
    left, right = (steps[0], steps[-1]) if len(steps) > 1 else edges(steps)
    around, floors = np.array([left, *steps, right]), np.array([floor[0], *floor, floor[-1]])
    axes.fill_between(around, np.full_like(floors, 1e-30), floors, color=FLOOR_COLOUR, linewidth=0, zorder=0)
    resolved = shown[np.isfinite(shown) & (shown > floor)]
    if resolved.size:
        axes.set_ylim(resolved.min() / 1.6, resolved.max() * 1.6)
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
    label_decades(axes)
    _name_lines(axes, values[:, :, -1], drawn)


def _draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, linewidth: float, **style: Any) -> None:
    """Draw values against the step: a line with gaps where there is none, and a dot for a value between two gaps."""
    positive = np.where(values > 0, values, np.nan)
    there = np.pad(np.isfinite(positive), 1)
    alone = there[1:-1] & ~there[:-2] & ~there[2:]
    dots: dict[str, Any] = {
        "marker": "o",
        "markevery": np.flatnonzero(alone),
        "markersize": 1.5 + linewidth,
        "markeredgewidth": 0,
    }
    (line,) = axes.plot(steps, positive, linewidth=linewidth, **dots, **style)
    if alone.any():  # at the first or last step half of a dot stands beside the axes
        line.set_clip_box(TransformedBbox(Bbox([[-1, 0], [2, 1]]), axes.transAxes))


def label_decades(axes: Axes) -> None:
    """Ticks of a logarithmic axis: at most four decades, or round values where the axis spans less than two."""
    low, high = axes.get_ylim()
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    if len(exponents) >= 2:
        kept = list(exponents)[:: math.ceil(len(exponents) / 4)]
        ticks, labels = [10.0**exponent for exponent in kept], [power_of_ten(exponent) for exponent in kept]
    else:
        first = math.floor(math.log10(low))
        ticks = [digit * 10.0**exponent for exponent in range(first, first + 3) for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) < 2:
            ticks = [tick for tick in MaxNLocator(3).tick_values(low, high) if low <= tick <= high]
        labels = [_short(tick) for tick in ticks]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(ticks, labels)


def _short(value: float) -> str:
    """Shortest text of a tick: 0.02, but 5e-4."""
    if 0.01 <= value < 10_000:
        return f"{value:.3g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _name_lines(axes: Axes, last: np.ndarray, drawn: list[int]) -> None:
    """Write the number of each singular value at the end of its lines, where there is room."""
    low, high = np.log10(axes.get_ylim())
    taken: list[float] = []
    for number, k in enumerate(drawn):
        ends = last[1:, number] if len(last) > 1 else last[:, number]
        ends = ends[np.isfinite(ends) & (ends > 0)]
        if not ends.size:
            continue
        height = (np.log10(np.median(ends)) - low) / (high - low)
        if not 0 <= height <= 1 or any(abs(height - other) < 0.13 for other in taken):
            continue
        taken.append(height)
        axes.annotate(
            sigma(k),
            (1, height),
            xycoords="axes fraction",
            xytext=(1.5, 0),
            textcoords="offset points",
            fontsize=5.5,
            va="center",
            annotation_clip=False,
        )


def legend(figure: Any, trees: list[xr.DataTree], width_mm: float, singular_values: list[int], **where: Any) -> None:
    """Name the groups and every other mark of panels of spectra, in as many columns as fit.

    A group has the line of the runs that learned something, that of the runs at chance, or both beside each other, as
    there are such runs among those drawn.
    """
    groups, sizes = shown_groups(trees[0]), training_samples(trees[0])
    kinds = sorted({at_chance(tree) for tree in trees})
    handles: list[Any] = []
    labels = []
    for i, group in enumerate(groups):
        looks = dict.fromkeys((colours(groups, grey)[group], dashes(groups, grey)[group]) for grey in kinds)
        lines = tuple(Line2D([], [], color=colour, linewidth=1.2, linestyle=dash) for colour, dash in looks)
        handles.append(lines if len(lines) > 1 else lines[0])
        labels.append(group_words("whole batch" if i == 0 else group, sizes.get(group)))
    pale = (GREYS if all(kinds) else GROUP_COLOURS)[0]
    marks: dict[str, Any] = {
        "below the noise floor": Patch(color=FLOOR_COLOUR, linewidth=0),
        "limit of resolution": Line2D([], [], **LIMIT),
        "pale: beyond the attainable rank": Line2D([], [], color=pale, alpha=PALE, linewidth=1.2),
    }
    if singular_values:
        marks[f"thick to thin: {', '.join(map(sigma, singular_values))}"] = Line2D([], [], linestyle="none")
    figure.legend(
        handles=[*handles, *marks.values()],
        labels=[*labels, *marks],
        handler_map={tuple: HandlerTuple(ndivide=None)},
        frameon=False,
        ncols=min(len(handles) + len(marks), _columns(width_mm)),
        handlelength=1.8 if len(kinds) == 1 else 4.0,
        columnspacing=1.2,
        **where,
    )


def legend_height_mm(tree: xr.DataTree, width_mm: float) -> float:
    """Height that the legend needs."""
    return 2 + LEGEND_ROW_MM * math.ceil((len(shown_groups(tree)) + 4) / _columns(width_mm))


def _columns(width_mm: float) -> int:
    return max(1, int(width_mm // LEGEND_COLUMN_MM))
