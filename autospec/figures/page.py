"""A figure of the paper: all panels of an experiment on one page."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import matplotlib.pyplot as plt

from autospec.figures.panel import difference_key, draw_panel
from autospec.figures.spectra import legend, legend_height_mm
from autospec.figures.style import MM, STYLE, save
from autospec.statistics.table import read_tests
from autospec.trajectories import open_trajectories

HEAD_MM, FOOT_MM = 8.0, 9.5


class PageSettings(TypedDict):
    """What the stage reads from the configuration."""

    number: int
    title: str
    panels: list[dict[str, Any]]
    width_mm: float
    height_mm: float
    dots_per_inch: int
    singular_values: list[int] | None
    alpha: float | None
    variance: str | None


def build_page(settings: PageSettings, runs: dict[str, str], tests: dict[str, str], outputs: list[str]) -> str:
    """Compose a page and write it in each format.

    Parameters
    ----------
    settings : PageSettings
        Title, panels and size.
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
    panels = settings["panels"]
    with plt.rc_context({**STYLE, "font.size": 6, "axes.labelsize": 5.5, "xtick.labelsize": 5, "ytick.labelsize": 5}):
        width, height = settings["width_mm"] * MM, settings["height_mm"] * MM
        figure = plt.figure(figsize=(width, height), layout="constrained")
        first = trees[panels[0]["run"]]
        foot_mm = FOOT_MM + legend_height_mm(first, settings["width_mm"])
        head, body, foot = figure.subfigures(
            3, 1, height_ratios=[HEAD_MM, settings["height_mm"] - HEAD_MM - foot_mm, foot_mm]
        )
        head.text(0.01, 0.4, f"Figure {settings['number']}.  {settings['title']}", fontsize=10, fontweight="bold")
        rows = math.ceil(len(panels) / 2)
        places = body.subfigures(rows, 2, squeeze=False, wspace=0.02, hspace=0.02).flat
        for place, panel in zip(places, panels, strict=False):
            draw_panel(place, panel, trees[panel["run"]], tables.get(panel["run"]), settings)
        legend(
            foot,
            first,
            settings["width_mm"],
            settings["singular_values"] or [],
            loc="upper center",
            bbox_to_anchor=(0.5, 1.0),
        )
        if any(panel["compare"] for panel in panels):
            key = difference_key(settings, settings["width_mm"])
            foot.text(0.5, 0.08, key, ha="center", va="bottom", fontsize=6)
        save(figure, outputs, settings["dots_per_inch"])
        plt.close(figure)
    return f"figure {settings['number']}: {len(panels)} panels"
