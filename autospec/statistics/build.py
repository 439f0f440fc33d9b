"""The stage that puts a run's tests of groups into one table, and describes them in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import xarray as xr

from autospec.statistics.null import benjamini_hochberg, holm
from autospec.statistics.paper import WHAT_IT_IS_NOT, compare_spectra
from autospec.statistics.seeds import describe_seeds
from autospec.statistics.table import COLUMNS, PAPER, comparison_name, read_tests, tidy, write_description, write_tests
from autospec.trajectories import open_trajectories

STATISTICS = ("gradient", "activation", "adjoint")
SEEN = "The network is a classifier, so its weights and adjoints have seen the labels that it learned"


class TestSettings(TypedDict):
    """What the stage reads from the configuration."""

    name: str
    task: str
    scale: str
    alpha: float


class Found(TypedDict):
    """Paths of the table and the description that another test has written."""

    table: str
    described: str


def build_tests(
    settings: TestSettings,
    run: str,
    output: str,
    described: str,
    permutation: Found | None = None,
    refit: Found | None = None,
    further: Sequence[str] = (),
) -> str:
    """Test every pair of groups in every layer and statistic of a run, and write a table and its description.

    Parameters
    ----------
    settings : TestSettings
        What is tested at which level.
    run : str
        The run's trajectories.
    output : str
        The tab-separated table to write.
    described : str
        The JSON file to write: what each column is, which test applied and why, in words.
    permutation, refit : Found, optional
        What the valid tests found, where they were made.
    further : sequence of str
        Trajectories of the run from further seeds: their variability is described.

    Returns
    -------
    str
        One line that says what was tested.
    """
    tree = open_trajectories(run)
    table = paper_tests(tree, settings["scale"], settings["alpha"])
    tests = {"paper": describe_paper(table, tree, settings)}
    frames = [table]
    for name, found in (("permutation", permutation), ("refit", refit)):
        if found is not None:
            frames.append(read_tests(found["table"]))
            tests[name] = json.loads(Path(found["described"]).read_text(encoding="utf-8"))
    description: dict[str, Any] = {
        "run": settings["name"],
        "alpha": settings["alpha"],
        "which_test_applies": which_applies(settings, tests, frames),
        "tests": tests,
        "columns": dict(COLUMNS),
    }
    if further:
        trees = {Path(path).name.split(".", 1)[0]: open_trajectories(path) for path in (run, *further)}
        description["seeds"] = describe_seeds(trees, group_pairs(tree))
    write_tests(pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True), output)
    write_description(description, described)
    return f"{sum(map(len, frames))} tests of {len(group_pairs(tree))} pairs of groups: {', '.join(tests)}"


def paper_tests(tree: xr.DataTree, scale: str, alpha: float) -> pd.DataFrame:
    """All of the paper's tests for the trajectories of a run, as `autospec.statistics.table.COLUMNS` says."""
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
                frames.append(
                    frame.assign(
                        layer=layer,
                        statistic=statistic,
                        group_a=group_a,
                        group_b=group_b,
                        comparison=comparison_name(group_a, group_b),
                    )
                )
    if not frames:
        return tidy(pd.DataFrame(columns=list(COLUMNS)))
    table = pd.concat(frames, ignore_index=True)
    for test in PAPER:
        family = (table["test"] == test) & table["p"].notna()
        p = table.loc[family, "p"].to_numpy()
        table.loc[family, "p_bh"] = benjamini_hochberg(p)
        table.loc[family, "p_holm"] = holm(p)
    table["p_adjusted"] = table["p_holm"]
    table["significant"] = (table["p"] < alpha) & ~table["below_floor"]
    return tidy(table)


def group_pairs(tree: xr.DataTree) -> list[tuple[str, str]]:
    """Every pair of groups of the same grouping, for the trajectories of a run."""
    members = [(str(name), str(of)) for name, of in zip(tree["group"].values, tree["grouping"].values, strict=True)][1:]
    return [(a, b) for (a, of_a), (b, of_b) in combinations(members, 2) if of_a == of_b]


def describe_paper(table: pd.DataFrame, tree: xr.DataTree, settings: TestSettings) -> dict[str, Any]:
    """The paper's tests in words that a section on methods can quote, with the numbers filled in."""
    steps = np.asarray(tree["step"].values)
    values = "logarithms of singular values" if settings["scale"] == "log" else "singular values"
    when = f"{len(steps)} recorded steps ({steps[0]} to {steps[-1]})" if len(steps) else "no recorded step"
    sizes = {test: int(table.loc[table["test"] == test, "p"].notna().sum()) for test in PAPER}
    below = int(table.loc[table["test"] == PAPER[0], "below_floor"].sum())
    return {
        "method": (
            f"Two-tailed t-tests, Student's (equal variances) and Welch's, compared the {values} of two groups over "
            f"{when} of one training: for each singular value with the steps as samples, and for each step with the "
            f"singular values as samples, in every layer, for every pair of groups of one grouping. Differences are called "
            f"significant at p < {settings['alpha']:g} without correction, as in the paper; p-values adjusted by Holm and by "
            "Benjamini and Hochberg, and Hedges' g with its 95 % interval, stand beside them."
        ),
        "what_it_is_not": WHAT_IT_IS_NOT,
        "family": (
            f"All layers, statistics, pairs, steps and singular values of this run that lie above the noise floor: "
            f"{sizes[PAPER[0]]} tests of Student's kind, {sizes[PAPER[1]]} of Welch's; {below} of either lie below it and "
            "have no p."
        ),
        "tests": sizes,
    }


def which_applies(settings: TestSettings, tests: dict[str, Any], frames: list[pd.DataFrame]) -> str:
    """Which test of groups is valid for this run, and why."""
    made = {str(name) for frame in frames for name in frame["test"].unique()}
    sentences = []
    if settings["task"] == "autoencoder":
        sentences.append(
            "The network is an autoencoder, whose weights and adjoints have seen no label: permutation of labels with the "
            "weights as they are is an exact test of groups."
        )
    else:
        sentences.append(
            f"{SEEN}: groups that differ in the target are tested by refits alone, with labels permuted before training; "
            "groups within one target can be permuted after it."
        )
    for name in ("permutation", "refit"):
        if name in made:
            sentences.append(f"The test '{name}' was made.")
        elif name in tests:
            sentences.append(f"The test '{name}' applied to no pair of groups.")
        else:
            sentences.append(f"The test '{name}' was not made.")
    if not made & {"permutation", "refit"}:
        sentences.append(f"So this table holds no valid test of groups. {WHAT_IT_IS_NOT}")
    return " ".join(sentences)
