"""One panel: drawn on a page by `autospec.figures.page`, or on its own by the stage here."""

from __future__ import annotations

import textwrap
from typing import Any, TypedDict

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import SubFigure

from autospec.describe import content
from autospec.figures.differences import draw_differences
from autospec.figures.spectra import draw_spectra, legend, legend_height_mm
from autospec.figures.style import MM, STYLE, save
from autospec.statistics.table import read_tests
from autospec.trajectories import open_trajectories

ROW_HEIGHT_MM = 38.0
MARGIN_MM = 17.0
# Of the 6 point type of the key, with room to spare.
CHARACTERS_A_MM = 0.8


class PanelSettings(TypedDict):
    """What the stage reads from the configuration."""

    panel: dict[str, Any]
    width_mm: float
    dots_per_inch: int
    singular_values: list[int] | None
    alpha: float | None
    variance: str | None


def draw_panel(
    figure: SubFigure, panel: dict[str, Any], tree: xr.DataTree, tests: pd.DataFrame | None, settings: Any
) -> np.ndarray:
    """Draw a panel: spectra, or the differences of two groups.

    Parameters
    ----------
    figure : SubFigure
        Where to draw.
    panel : dict
        Letter, run, and the two groups to compare or None.
    tree : xarray.DataTree
        Trajectories of the run.
    tests : DataFrame or None
        The paper's tests of the run, where two groups are compared.
    settings : mapping
        ``singular_values``, ``variance`` and ``alpha``.

    Returns
    -------
    ndarray of Axes, shape (layers, statistics)
    """
    figure.suptitle(f"{panel['letter']}   {content(panel)}", x=0.01, ha="left", fontsize=7.5, fontweight="bold")
    if panel["compare"] is None:
        return draw_spectra(figure, tree, settings["singular_values"])
    assert tests is not None
    return draw_differences(figure, tree, tests, panel["compare"], settings["variance"], settings["alpha"])


def build_panel(settings: PanelSettings, run: str, tests: str | None, outputs: list[str]) -> str:
    """Draw one panel on its own and write it in each format.

    Parameters
    ----------
    settings : PanelSettings
        What to draw and how large.
    run, tests : str
        The run's trajectories, and its tests where the panel compares two groups.
    outputs : list of str
        Files to write; the extension decides the format.

    Returns
    -------
    str
        One line that says what was drawn.
    """
    tree = open_trajectories(run)
    layers = len(tree["layers"].children)
    with plt.rc_context(STYLE):
        width_mm = settings["width_mm"]
        key = None if settings["panel"]["compare"] is None else difference_key(settings, width_mm)
        foot_mm = 3 + (legend_height_mm(tree, width_mm) if key is None else 3 * len(key.splitlines()))
        body_mm = MARGIN_MM + ROW_HEIGHT_MM * layers
        figure = plt.figure(figsize=(width_mm * MM, (body_mm + foot_mm) * MM), layout="constrained")
        body, foot = figure.subfigures(2, 1, height_ratios=[body_mm, foot_mm])
        draw_panel(body, settings["panel"], tree, read_tests(tests) if tests else None, settings)
        if key is None:
            legend(foot, tree, width_mm, settings["singular_values"] or [], loc="center")
        else:
            foot.text(0.5, 0.5, key, ha="center", va="center", fontsize=6)
        save(figure, outputs, settings["dots_per_inch"])
        plt.close(figure)
    return f"panel {settings['panel']['letter']}: {content(settings['panel'])}"


def difference_key(settings: Any, width_mm: float) -> str:
    """What the marks of a panel of differences mean, in lines that fit the width."""
    test = {"student": "Student's", "welch": "Welch's"}[settings["variance"]]
    text = (
        f"Dots at the right: singular values with p < {settings['alpha']:g} over steps. Squares above: steps with "
        f"p < {settings['alpha']:g} over singular values. Grey: below the noise floor. {test} t-test as in the paper, "
        "which takes dependent samples for independent: no test of groups."
    )
    return textwrap.fill(text, max(20, int(CHARACTERS_A_MM * width_mm)))
