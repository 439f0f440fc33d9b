"""A figure of the paper: all panels of an experiment on one page; or a supplement: the comparisons of every run."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import matplotlib
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from autospec.figures.layout import panel_height
from autospec.figures.panel import draw_key, draw_panel, key_height_mm, layers_of
from autospec.figures.selection import shown_layers
from autospec.figures.style import MM, STYLE, save
from autospec.statistics.table import read_tests
from autospec.trajectories import open_trajectories

HEAD_MM = 8.0
# The least height of axes that can be read.
LEAST_ROW_MM = 15.0


class PageSettings(TypedDict):
    """What the stage reads from the configuration."""

    heading: str
    panels: list[dict[str, Any]]
    columns: int
    width_mm: float
    height_mm: float
    dots_per_inch: int
    layers_per_panel: int
    singular_values: list[int] | None
    alpha: float | None
    variance: str | None


def build_page(settings: PageSettings, runs: dict[str, str], tests: dict[str, str], outputs: list[str]) -> str:
    """Compose a page and write it in each format.

    Parameters
    ----------
    settings : PageSettings
        Heading, panels and size; two columns fit the width, and more make the page wider.  The page is as high as its
        panels need, at least ``height_mm``.
    runs, tests : dict of str to str
        Trajectories of each run that a panel names, and tests of those in which two groups are compared.
    outputs : list of str
        Files to write; the extension decides the format.

    Returns
    -------
    str
        One line that says what was drawn.
    """
    trees = {run: open_trajectories(path) for run, path in runs.items()}
    tables = {run: read_tests(path) for run, path in tests.items()}
    with matplotlib.rc_context(STYLE):
        figure = compose(settings, trees, tables)
        save(figure, outputs, settings["dots_per_inch"])
    return f"{settings['heading'].partition('.')[0]}: {len(settings['panels'])} panels"


def compose(settings: PageSettings, trees: dict[str, xr.DataTree], tables: dict[str, pd.DataFrame]) -> Figure:
    """Draw a page; its parts are a heading, one for each row of panels, and the key."""
    panels, columns, most = settings["panels"], settings["columns"], settings["layers_per_panel"]
    width_mm = settings["width_mm"] * max(1.0, columns / 2)
    first = trees[panels[0]["run"]]
    key_mm = key_height_mm(panels, first, settings, width_mm)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    counts = [max(len(shown_layers(layers_of(panel, trees[panel["run"]]), most)) for panel in row) or 1 for row in rows]
    least = [panel_height(count, LEAST_ROW_MM) for count in counts]
    room = settings["height_mm"] - HEAD_MM - key_mm
    stretch = max(0.0, room - sum(least)) / sum(counts)
    heights = [low + stretch * count for low, count in zip(least, counts, strict=True)]
    total = HEAD_MM + sum(heights) + key_mm
    figure = Figure(figsize=(width_mm * MM, math.ceil(total) * MM))
    parts = figure.subfigures(3, 1, height_ratios=[HEAD_MM, sum(heights), key_mm], squeeze=False)
    head, body, foot = parts[:, 0]
    head.text(2 / width_mm, 0.45, settings["heading"], fontsize=10, fontweight="bold", va="center")
    places = body.subfigures(len(rows), columns, squeeze=False, height_ratios=heights)
    for row, place_row in zip(rows, places, strict=True):
        for panel, place in zip(row, place_row, strict=False):
            draw_panel(place, panel, trees[panel["run"]], tables.get(panel["run"]), settings, most)
    draw_key(foot, panels, first, settings, width_mm, key_mm)
    return figure
