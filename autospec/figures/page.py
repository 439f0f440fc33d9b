"""A figure of the paper: all panels of an experiment on pages; or a supplement: the comparisons of every run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import matplotlib
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from autospec.describe import data_words
from autospec.figures.layout import panel_height
from autospec.figures.panel import (
    ROW_HEIGHT_MM,
    draw_key,
    draw_panel,
    heading_words,
    key_height_mm,
    layers_of,
    panel_head_mm,
)
from autospec.figures.selection import shown_layers
from autospec.figures.style import MM, STYLE, save_pages
from autospec.statistics.table import read_tests
from autospec.trajectories import open_trajectories

HEAD_MM = 8.0
# The least height of axes that can be read.
LEAST_ROW_MM = 15.0
COLUMNS = 2


class PageSettings(TypedDict):
    """What the stage reads from the configuration."""

    heading: str
    panels: list[dict[str, Any]]
    width_mm: float
    height_mm: float
    dots_per_inch: int
    layers_per_panel: int
    singular_values: list[int] | None
    alpha: float | None
    variance: str | None
    scale: str | None


def build_page(settings: PageSettings, runs: dict[str, str], tests: dict[str, str], outputs: list[str]) -> str:
    """Compose a figure on as many pages as it needs, and write it in each format.

    Parameters
    ----------
    settings : PageSettings
        Heading, panels and the size of a page.
    runs, tests : dict of str to str
        Trajectories of each run that a panel names, and tests of those in which two groups are compared.
    outputs : list of str
        Files to write, a PDF of pages or a PNG with the pages below each other; the extension decides.

    Returns
    -------
    str
        One line that says what was drawn.
    """
    trees = {run: open_trajectories(path) for run, path in runs.items()}
    tables = {run: read_tests(path) for run, path in tests.items()}
    with matplotlib.rc_context(STYLE):
        pages = compose(settings, trees, tables)
        save_pages(pages, outputs, settings["dots_per_inch"])
    name = settings["heading"].partition(".")[0]
    return f"{name}: {len(settings['panels'])} panels on {len(pages)} page{'s' * (len(pages) > 1)}"


@dataclass(frozen=True)
class _Row:
    """Panels beside each other: how many rows of axes the largest has, and how much room above them all of them need."""

    panels: list[dict[str, Any]]
    count: int
    head_mm: float

    def height(self, axes_mm: float) -> float:
        return panel_height(self.count, axes_mm, self.head_mm)


def compose(settings: PageSettings, trees: dict[str, xr.DataTree], tables: dict[str, pd.DataFrame]) -> list[Figure]:
    """Draw the pages; the parts of each are a heading, the panels, and the key."""
    panels = settings["panels"]
    rows = [_row(panels[start : start + COLUMNS], settings, trees, tables) for start in range(0, len(panels), COLUMNS)]
    room = settings["height_mm"] - HEAD_MM - key_height_mm(panels, trees, settings, settings["width_mm"])
    starts = paginate([row.height(LEAST_ROW_MM) for row in rows], room)
    pages = []
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(rows)], strict=True), 1):
        heading = settings["heading"] + (f"  ({number} of {len(starts)})" if len(starts) > 1 else "")
        pages.append(_page(heading, rows[start:stop], room, settings, trees, tables))
    return pages


def _row(
    panels: list[dict[str, Any]],
    settings: PageSettings,
    trees: dict[str, xr.DataTree],
    tables: dict[str, pd.DataFrame],
) -> _Row:
    most, counts, heads = settings["layers_per_panel"], [1], []
    for panel in panels:
        tree = trees[panel["run"]]
        counts.append(len(shown_layers(layers_of(panel, tree), most)))
        words = heading_words(panel, tree, tables.get(panel["run"]), settings, most)
        heads.append(panel_head_mm(panel, tree, words, settings["width_mm"] / COLUMNS))
    return _Row(panels, max(counts), max(heads))


def paginate(heights: list[float], room: float) -> list[int]:
    """Fill pages from the top.

    Parameters
    ----------
    heights : list of float
        Least height of each row of panels.
    room : float
        Height that a page has for rows; a row that is higher has a page of its own.

    Returns
    -------
    list of int
        The first row of each page.
    """
    starts, used = [0], 0.0
    for number, height in enumerate(heights):
        if used and used + height > room:
            starts.append(number)
            used = 0.0
        used += height
    return starts


def _page(
    heading: str,
    rows: list[_Row],
    room: float,
    settings: PageSettings,
    trees: dict[str, xr.DataTree],
    tables: dict[str, pd.DataFrame],
) -> Figure:
    """Draw one page; rows of panels share what room is left, up to the height that a panel of its own has."""
    panels = [panel for row in rows for panel in row.panels]
    width_mm = settings["width_mm"]
    key_mm = key_height_mm(panels, trees, settings, width_mm)
    spare = (room - sum(row.height(LEAST_ROW_MM) for row in rows)) / sum(row.count for row in rows)
    axes_mm = LEAST_ROW_MM + min(max(0.0, spare), ROW_HEIGHT_MM - LEAST_ROW_MM)
    heights = [row.height(axes_mm) for row in rows]
    used = HEAD_MM + sum(heights) + key_mm
    height_mm = max(settings["height_mm"], used)
    figure = Figure(figsize=(width_mm * MM, height_mm * MM))
    ratios = [HEAD_MM, sum(heights), key_mm, max(1e-3, height_mm - used)]
    head, body, foot, _ = figure.subfigures(4, 1, height_ratios=ratios, squeeze=False)[:, 0]
    head.text(2 / width_mm, 0.45, heading, fontsize=10, fontweight="bold", va="center")
    notes = {data_words(trees[panel["run"]].attrs.get("dataset")): None for panel in panels}
    head.text(1 - 2 / width_mm, 0.45, "; ".join(filter(None, notes)), fontsize=6.5, ha="right", va="center")
    places = body.subfigures(len(rows), COLUMNS, squeeze=False, height_ratios=heights)
    for row, beside in zip(rows, places, strict=True):
        for panel, place in zip(row.panels, beside, strict=False):
            tree, tests = trees[panel["run"]], tables.get(panel["run"])
            draw_panel(place, panel, tree, tests, settings, settings["layers_per_panel"], head_mm=row.head_mm)
    draw_key(foot, panels, trees, settings, width_mm, key_mm)
    return figure
