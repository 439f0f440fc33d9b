"""Panels along the tying dimension: the gradient's largest singular value at each position, over training."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator, NullLocator

from autospec.errors import UserError
from autospec.figures.differences import COLOURS, GREYS, UNRESOLVED, colour_limit, draw_cells, draw_ratio_bar, edges
from autospec.figures.layout import COLUMN_GAP_MM, HEAD_MM, LEFT_MM, NAME_POINTS, name_axes, place_axes, size_of, wrap
from autospec.figures.selection import at_chance
from autospec.figures.spectra import label_decades

RIGHT_MM, BAR_MM = 15.0, 11.0
NAME = "gradient_by_position"


def tied_layers(tree: xr.DataTree) -> list[str]:
    """Layers whose weights are used at several positions, as far as those were recorded."""
    return [name for name, node in tree["layers"].children.items() if NAME in node]


def largest_by_position(tree: xr.DataTree, layer: str, group: str) -> np.ndarray:
    """Largest singular value of a group's share of the gradient at each position.

    Returns
    -------
    ndarray, shape (position, step)
        NaN where it is missing or not above the group's noise floor.
    """
    node = tree["layers"][layer]
    values = node[NAME].sel(group=group, index=1).transpose("step", "position").values
    floor = node["gradient_noise_floor"].sel(group=group).values
    return np.where(values > floor[:, None], values, np.nan).astype(float).T


def column_names(pair: list[str], width_mm: float) -> list[str]:
    """Names of a panel's columns, in lines that keep clear of each other."""
    between_centres = (width_mm - LEFT_MM - RIGHT_MM - BAR_MM + COLUMN_GAP_MM) / 3
    return [wrap(name, between_centres - 3, NAME_POINTS) for name in (*pair, "ratio")]


def draw_positions(
    figure: Any, tree: xr.DataTree, pair: list[str], layers: list[str], head_mm: float = HEAD_MM
) -> np.ndarray:
    """Draw one row of axes a layer; a column for each of two groups, and one for their ratio.

    Parameters
    ----------
    figure : Figure or SubFigure
        Where to draw.
    tree : xarray.DataTree
        Trajectories of a run.
    pair : list of str
        The two groups.
    layers : list of str
        Which layers to draw.
    head_mm : float
        Height above the axes.

    Returns
    -------
    ndarray of Axes, shape (layers, 3)

    Raises
    ------
    UserError
        If no layer was recorded by position.
    """
    if not layers:
        raise UserError(
            "a panel shows positions, but no layer of the run has weights that are used at several: take the panel out "
            "of the config, or choose a recurrent network or one with tokens."
        )
    axes = place_axes(figure, len(layers), 3, RIGHT_MM + BAR_MM, head_mm)
    for ax in axes[:, 2]:  # makes room for the scale of both groups beside theirs
        box = ax.get_position()
        ax.set_position((box.x0 + BAR_MM / size_of(figure).width, box.y0, box.width, box.height))
    values = {layer: [largest_by_position(tree, layer, group) for group in pair] for layer in layers}
    ratios = {layer: np.log2(first / second) for layer, (first, second) in values.items()}
    limit = colour_limit(ratios.values())
    grey = at_chance(tree)
    steps = tree["step"].values
    for row, layer in zip(axes, layers, strict=True):
        positions = tree["layers"][layer]["position"].values
        scale = _scale(values[layer])
        for ax, value in zip(row, values[layer], strict=False):
            ax.patch.set(**UNRESOLVED)
            ax.pcolormesh(
                edges(steps), edges(positions), np.ma.masked_invalid(value), norm=scale,
                cmap="Greys_r" if grey else "cividis", rasterized=True,
            )  # fmt: skip
            ax.set_xlim(edges(steps)[0], edges(steps)[-1])
            ax.set_ylim(edges(positions)[-1], edges(positions)[0])
            ax.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
            ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        draw_cells(row[2], steps, positions, ratios[layer], limit, GREYS if grey else COLOURS)
        _bar(figure, row[1], scale, "Greys_r" if grey else "cividis")
    name_axes(axes, layers, column_names(pair, size_of(figure).width), "position")
    draw_ratio_bar(figure, axes[0, -1], axes[-1, -1], limit, GREYS if grey else COLOURS, pair)
    return axes


def _scale(values: list[np.ndarray]) -> LogNorm:
    finite = np.concatenate([value[np.isfinite(value)] for value in values])
    low, high = (finite.min(), finite.max()) if finite.size else (0.1, 1.0)
    return LogNorm(low, max(high, low * 1.1))


def _bar(figure: Any, beside: Any, scale: LogNorm, colours: str) -> None:
    """Draw the scale of the largest singular value, which both groups have, at the right of the second."""
    width = size_of(figure).width
    box = beside.get_position()
    cax = figure.add_axes((box.x1 + 1.5 / width, box.y0, 2.0 / width, box.y1 - box.y0))
    bar = figure.colorbar(ScalarMappable(scale, colours), cax=cax)
    bar.set_label("σ₁ of the gradient", fontsize=5.5, labelpad=1)
    bar.outline.set_linewidth(0.4)
    label_decades(bar.ax)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(length=1.5)


POSITION_KEY = (
    "Positions: the largest singular value of each group's share of the gradient at each position in time, and the log₂ of "
    "the groups' ratio; dotted grey, below the noise floor."
)
