"""Panels: drawn on a page by `autospec.figures.page`, or each on its own by the stage here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import matplotlib
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from autospec.describe import data_words, network, performance_words
from autospec.errors import UserError
from autospec.figures.differences import difference_key, difference_words, draw_differences, of_pair
from autospec.figures.layout import HEAD_MM, KEY_LINE_MM, head_height, panel_height, wrap, write_heading
from autospec.figures.positions import POSITION_KEY, column_names, draw_positions, tied_layers
from autospec.figures.selection import shown_groups, shown_layers
from autospec.figures.spectra import GREY_WORDS, LIMIT_WORDS, draw_spectra, legend, legend_height_mm
from autospec.figures.style import MM, STYLE, save
from autospec.statistics.table import read_tests
from autospec.trajectories import open_trajectories

ROW_HEIGHT_MM = 34.0
KEY_POINTS = 5.5


class PanelsSettings(TypedDict):
    """What the stage reads from the configuration."""

    panels: list[dict[str, Any]]
    width_mm: float
    dots_per_inch: int
    singular_values: list[int] | None
    alpha: float | None
    variance: str | None
    scale: str | None


def shows_spectra(panel: dict[str, Any]) -> bool:
    """Whether a panel shows neither a comparison nor positions."""
    return panel["compare"] is None and not panel["by_position"]


def layers_of(panel: dict[str, Any], tree: xr.DataTree) -> list[str]:
    """Layers that a panel can show."""
    return tied_layers(tree) if panel["by_position"] else list(tree["layers"].children)


def heading_words(
    panel: dict[str, Any],
    tree: xr.DataTree,
    tests: pd.DataFrame | None,
    settings: Any,
    most_layers: int | None = None,
    note: str = "",
) -> str:
    """What stands below the title of a panel, of which `draw_panel` takes the same."""
    pair = _pair(panel, tree)
    words = [performance_words(tree.attrs.get("performance"))]
    if panel["compare"] is not None:
        assert tests is not None
        rows = of_pair(tests, pair, panel["test"], settings["variance"])
        words = [f"{pair[0]} against {pair[1]}", difference_words(rows, panel["test"]), *words]
    elif panel["by_position"]:
        words = [f"positions in time: {pair[0]} against {pair[1]}", *words]
    everything = layers_of(panel, tree)
    layers = shown_layers(everything, most_layers)
    if len(layers) < len(everything):
        words.append(f"{len(layers)} of {len(everything)} layers")
    return "; ".join(filter(None, [*words, note]))


def panel_head_mm(panel: dict[str, Any], tree: xr.DataTree, words: str, width_mm: float) -> float:
    """Height above the axes that a panel needs, with these words below its title."""
    return head_height(words, column_names(_pair(panel, tree), width_mm) if panel["by_position"] else [], width_mm)


def draw_panel(
    figure: Any,
    panel: dict[str, Any],
    tree: xr.DataTree,
    tests: pd.DataFrame | None,
    settings: Any,
    most_layers: int | None = None,
    note: str = "",
    head_mm: float = HEAD_MM,
) -> np.ndarray:
    """Draw a panel: spectra, the differences of two groups, or spectra along positions.

    Parameters
    ----------
    figure : Figure or SubFigure
        Where to draw.
    panel : dict
        Letter, run, and what to show of it, as `autospec.specs.described_panel` makes it.
    tree : xarray.DataTree
        Trajectories of the run.
    tests : DataFrame or None
        The tests of the run, where two groups are compared.
    settings : mapping
        ``singular_values`` and ``variance``.
    most_layers : int, optional
        Draw only so many layers, and say so; all of them by default.
    note : str
        What a reader must know of the data; a page says it once, at its top.
    head_mm : float
        Height above the axes: as much as `panel_head_mm` says, or as panels beside this one need.

    Returns
    -------
    ndarray of Axes, shape (layers, columns)

    Raises
    ------
    UserError
        If the run has no such group.
    """
    pair = _pair(panel, tree)
    words = heading_words(panel, tree, tests, settings, most_layers, note)
    layers = shown_layers(layers_of(panel, tree), most_layers)
    if panel["compare"] is not None:
        assert tests is not None
        axes = draw_differences(figure, tree, tests, pair, panel["test"], settings["variance"], layers, head_mm)
    elif panel["by_position"]:
        axes = draw_positions(figure, tree, pair, layers, head_mm)
    else:
        axes = draw_spectra(figure, tree, settings["singular_values"], layers, head_mm)
    write_heading(figure, f"{panel['letter']}   {network(panel)}", words)
    return axes


def _pair(panel: dict[str, Any], tree: xr.DataTree) -> list[str]:
    groups = [str(group) for group in tree["group"].values]
    pair = panel["compare"] or panel["pair"] or shown_groups(tree)[1:3]
    for label in pair:
        if label not in groups:
            raise UserError(
                f"panel {panel['letter']} compares the group '{label}', but the groups of the run '{panel['run']}' are "
                f"{', '.join(repr(group) for group in groups[1:])}: correct compare in the config."
            )
    return pair


def key_words(panels: list[dict[str, Any]], settings: Any) -> list[str]:
    """What the marks of some panels mean, apart from the legend of the groups; one text for each kind of panel."""
    compared = {panel["test"] for panel in panels if panel["compare"] is not None}
    texts = []
    if any(map(shows_spectra, panels)):
        texts.append(f"{LIMIT_WORDS[0].upper()}{LIMIT_WORDS[1:]}. {GREY_WORDS}")
    if compared:
        texts.append(difference_key(compared, settings["alpha"], settings["variance"], settings["scale"]))
    if any(panel["by_position"] for panel in panels):
        texts.append(POSITION_KEY)
    return texts


def draw_key(
    figure: Any,
    panels: list[dict[str, Any]],
    trees: Mapping[str, xr.DataTree],
    settings: Any,
    width_mm: float,
    height_mm: float,
) -> None:
    """Draw the legend of the groups, where spectra are shown, and the meaning of the marks below it."""
    below = 0.0
    shown = [trees[panel["run"]] for panel in panels if shows_spectra(panel)]
    if shown:
        where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 1.0), "borderaxespad": 0.1}
        legend(figure, shown, width_mm, _drawn_values(panels, trees, settings), **where)
        below = legend_height_mm(shown[0], width_mm)
    text = key_text(panels, settings, width_mm)
    figure.text(0.5, 1 - (below + 0.8) / height_mm, text, ha="center", va="top", fontsize=KEY_POINTS)


def _drawn_values(panels: list[dict[str, Any]], trees: Mapping[str, xr.DataTree], settings: Any) -> list[int]:
    """Those of the singular values asked for that some layer of the panels of spectra has."""
    there: set[int] = set()
    for panel in filter(shows_spectra, panels):
        tree = trees[panel["run"]]
        for layer in shown_layers(layers_of(panel, tree), settings.get("layers_per_panel")):
            there.update(tree["layers"][layer]["index"].values.tolist())
    return [k for k in settings["singular_values"] if k in there]


def key_text(panels: list[dict[str, Any]], settings: Any, width_mm: float) -> str:
    """The meaning of the marks, in lines that fit the width."""
    return "\n".join(wrap(words, width_mm - 6, KEY_POINTS) for words in key_words(panels, settings))


def key_height_mm(
    panels: list[dict[str, Any]], trees: Mapping[str, xr.DataTree], settings: Any, width_mm: float
) -> float:
    """Height that the key needs."""
    shown = [trees[panel["run"]] for panel in panels if shows_spectra(panel)]
    lines = key_text(panels, settings, width_mm).count("\n") + 1
    return 2 + KEY_LINE_MM * lines + (legend_height_mm(shown[0], width_mm) if shown else 0)


def build_panels(settings: PanelsSettings, runs: dict[str, str], tests: dict[str, str], outputs: list[str]) -> str:
    """Draw panels, each on its own, and write each in every format asked for.

    Parameters
    ----------
    settings : PanelsSettings
        What to draw and how large.
    runs, tests : dict of str to str
        Trajectories of each run that a panel names, and tests of those in which two groups are compared.
    outputs : list of str
        Files to write: the name says which panel, the extension the format.

    Returns
    -------
    str
        One line that says what was drawn.
    """
    trees = {run: open_trajectories(path) for run, path in runs.items()}
    tables = {run: read_tests(path) for run, path in tests.items()}
    with matplotlib.rc_context(STYLE):
        for panel in settings["panels"]:
            figure = _on_its_own(panel, trees, tables.get(panel["run"]), settings)
            save(figure, [path for path in outputs if Path(path).stem == panel["name"]], settings["dots_per_inch"])
    return f"panels {', '.join(panel['letter'] for panel in settings['panels'])}"


def _on_its_own(
    panel: dict[str, Any], trees: Mapping[str, xr.DataTree], tests: pd.DataFrame | None, settings: PanelsSettings
) -> Figure:
    """Draw a panel with all of its layers, and its key below."""
    width_mm, tree = settings["width_mm"], trees[panel["run"]]
    key_mm = key_height_mm([panel], trees, settings, width_mm)
    note = data_words(tree.attrs.get("dataset"))
    head_mm = panel_head_mm(panel, tree, heading_words(panel, tree, tests, settings, note=note), width_mm)
    body_mm = panel_height(max(1, len(layers_of(panel, tree))), ROW_HEIGHT_MM, head_mm)
    figure = Figure(figsize=(width_mm * MM, (body_mm + key_mm) * MM))
    body, foot = figure.subfigures(2, 1, height_ratios=[body_mm, key_mm], squeeze=False)[:, 0]
    draw_panel(body, panel, tree, tests, settings, note=note, head_mm=head_mm)
    draw_key(foot, [panel], trees, settings, width_mm, key_mm)
    return figure
