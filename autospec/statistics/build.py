"""The stage that tests every pair of groups of a run."""

from __future__ import annotations

from itertools import combinations
from typing import TypedDict

import pandas as pd
import xarray as xr

from autospec.statistics.paper import compare_spectra
from autospec.statistics.table import tidy, write_tests
from autospec.trajectories import open_trajectories

STATISTICS = ("gradient", "activation", "adjoint")


class TestSettings(TypedDict):
    """What the stage reads from the configuration."""

    scale: str
    alpha: float


def build_tests(settings: TestSettings, run: str, output: str) -> str:
    """Test every pair of groups in every layer and statistic of a run, and write a table.

    Parameters
    ----------
    settings : TestSettings
        Whether logarithms are tested.
    run : str
        The run's trajectories.
    output : str
        The tab-separated table to write.

    Returns
    -------
    str
        One line that says what was tested.
    """
    tree = open_trajectories(run)
    table = paper_tests(tree, settings["scale"], settings["alpha"])
    write_tests(table, output)
    pairs = table[["group_a", "group_b"]].drop_duplicates()
    return f"{len(table)} tests of {len(pairs)} pairs of groups"


def paper_tests(tree: xr.DataTree, scale: str, alpha: float) -> pd.DataFrame:
    """All of the paper's tests for the trajectories of a run, one row a test."""
    steps = tree["step"].values
    frames = []
    for layer, node in tree["layers"].children.items():
        for statistic in STATISTICS:
            if statistic not in node:
                continue
            for group_a, group_b in group_pairs(tree):
                a, b = (node[statistic].sel(group=group).values for group in (group_a, group_b))
                floor = node[f"{statistic}_noise_floor"]
                floor_a, floor_b = (floor.sel(group=group).values for group in (group_a, group_b))
                frame = compare_spectra(a, b, floor_a, floor_b, steps, node["index"].values, scale)
                labels = {
                    "layer": layer,
                    "statistic": statistic,
                    "group_a": group_a,
                    "group_b": group_b,
                    "comparison": f"{group_a} - {group_b}",
                }
                frames += [_rows(frame, variance, alpha).assign(**labels) for variance in ("student", "welch")]
    return tidy(pd.concat(frames, ignore_index=True))


def _rows(frame: pd.DataFrame, variance: str, alpha: float) -> pd.DataFrame:
    """Rows of the table for one of the t-tests: either ``step`` or ``index`` is empty."""
    over_values, p = frame["test"] == "step", frame[f"p_{variance}"]
    return pd.DataFrame(
        {
            "step": frame["at"].where(over_values).astype("Int64"),
            "index": frame["at"].where(~over_values).astype("Int64"),
            "test": f"paper_{variance}",
            "p": p,
            "significant": (p < alpha) & frame["resolved"],
            "below_floor": ~frame["resolved"],
        }
    )


def group_pairs(tree: xr.DataTree) -> list[tuple[str, str]]:
    """Every pair of groups of the same grouping."""
    names = [str(name) for name in tree["group"].values]
    groupings = [str(name) for name in tree["grouping"].values]
    members = list(zip(names, groupings, strict=True))[1:]
    return [(a, b) for (a, of_a), (b, of_b) in combinations(members, 2) if of_a == of_b]
