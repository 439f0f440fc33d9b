"""Panels A to F: spectra of every layer over training, by group."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from autospec.figures.style import colours, dashes

STATISTICS = ("gradient", "activation", "adjoint")
LEGEND_COLUMN_MM, LEGEND_ROW_MM = 36.0, 4.0


def recorded_statistics(tree: xr.DataTree) -> list[str]:
    """Statistics that a run recorded, in the order of the columns."""
    first = next(iter(tree["layers"].children.values()))
    return [statistic for statistic in STATISTICS if statistic in first]


def draw_spectra(figure: SubFigure, tree: xr.DataTree, singular_values: list[int]) -> np.ndarray:
    """Draw one row of axes a layer, one column a statistic.

    Parameters
    ----------
    figure : SubFigure
        Where to draw.
    tree : xarray.DataTree
        Trajectories of a run.
    singular_values : list of int
        Which singular values to draw, from 1.

    Returns
    -------
    ndarray of Axes, shape (layers, statistics)
    """
    layers, statistics = list(tree["layers"].children), recorded_statistics(tree)
    axes = figure.subplots(len(layers), len(statistics), squeeze=False, sharex=True)
    for row, layer in enumerate(layers):
        for column, statistic in enumerate(statistics):
            draw_trajectories(axes[row, column], tree, layer, statistic, singular_values)
            label_axes(axes, row, column, layer, statistic)
    return axes


def draw_trajectories(axes: Axes, tree: xr.DataTree, layer: str, statistic: str, singular_values: list[int]) -> None:
    """Draw some singular values of one layer against the step, a line for each group."""
    node = tree["layers"][layer]
    steps = tree["step"].values
    index = node["index"].values
    drawn = [k for k in singular_values if k in index]
    groups = [str(group) for group in tree["group"].values]
    values = node[statistic].sel(index=drawn).transpose("group", "index", "step").values
    floor = np.nanmax(node[f"{statistic}_noise_floor"].values, axis=1)
    for position, group in enumerate(groups):
        whole = position == 0
        for number in range(len(drawn)):
            axes.plot(
                steps,
                np.where(values[position, number] > 0, values[position, number], np.nan),
                color=colours(groups)[group],
                linewidth=max(0.35, 1.1 - 0.2 * number),
                linestyle=dashes(groups)[group],
                zorder=1 if whole else 2,
                label=group if number == 0 else "_nolegend_",
            )
    axes.set_yscale("log")
    axes.fill_between(steps, np.full_like(floor, 1e-30), floor, color="#999999", alpha=0.35, linewidth=0, zorder=0)
    resolved = values[np.isfinite(values) & (values > floor[None, None, :])]
    if resolved.size:
        axes.set_ylim(resolved.min() / 1.6, resolved.max() * 1.6)
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _name_lines(axes, values[:, :, -1], drawn)


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
        if not 0 <= height <= 1 or any(abs(height - other) < 0.11 for other in taken):
            continue
        taken.append(height)
        axes.annotate(
            f"$\\sigma_{{{k}}}$",
            (1, height),
            xycoords="axes fraction",
            xytext=(1.5, 0),
            textcoords="offset points",
            fontsize=5.5,
            va="center",
            annotation_clip=False,
        )


def label_axes(axes: np.ndarray, row: int, column: int, layer: str, statistic: str) -> None:
    """Write titles and labels on the outer axes alone."""
    if row == 0:
        axes[row, column].set_title(statistic, pad=3)
    if row == len(axes) - 1:
        axes[row, column].set_xlabel("step", labelpad=1)
    if column == 0:
        axes[row, column].set_ylabel(f"{layer}\nsingular value", labelpad=2)


def legend(figure: Any, tree: xr.DataTree, width_mm: float, singular_values: list[int], **where: Any) -> None:
    """Name the groups, the grey band and the widths of lines, in as many columns as fit."""
    groups = [str(group) for group in tree["group"].values]
    sizes = tree["group_size"].values[0]
    handles: list[Any] = [
        Line2D(
            [],
            [],
            color=colours(groups)[group],
            linewidth=1.2,
            linestyle=dashes(groups)[group],
            label=f"{'whole batch' if i == 0 else group} (N = {sizes[i]})",
        )
        for i, group in enumerate(groups)
    ]
    numbers = ", ".join(f"$\\sigma_{{{k}}}$" for k in singular_values)
    handles.append(Patch(color="#999999", alpha=0.35, linewidth=0, label="below the noise floor"))
    if singular_values:
        handles.append(Line2D([], [], linestyle="none", label=f"thick to thin: {numbers}"))
    figure.legend(
        handles=handles,
        frameon=False,
        ncols=min(len(handles), _columns(width_mm)),
        handlelength=1.8,
        columnspacing=1.4,
        **where,
    )


def legend_height_mm(tree: xr.DataTree, width_mm: float) -> float:
    """Height that the legend needs."""
    return LEGEND_ROW_MM * math.ceil((tree.sizes["group"] + 2) / _columns(width_mm))


def _columns(width_mm: float) -> int:
    return max(1, int(width_mm // LEGEND_COLUMN_MM))
