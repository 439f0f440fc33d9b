"""The summary of an analysis: one row for each run, layer and comparison of two groups."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import pandas as pd
import xarray as xr

from autospec.paths import result
from autospec.statistics.sizes import training_samples
from autospec.statistics.table import read_tests, smallest_p
from autospec.storage import written_whole
from autospec.trajectories import open_trajectories

COLUMNS = {
    "experiment": "Name of the experiment.",
    "run": "Name of the run.",
    "seed": "Seed of the initial weights.",
    "architecture": "The network.",
    "task": "autoencoder or classifier.",
    "hidden": "Widths of the hidden layers.",
    "activation": "Activation function.",
    "layer": "Name of the parameter.",
    "group_a": "First group.",
    "group_b": "Second group.",
    "samples_a": "Samples of the first group that the network was trained on.",
    "samples_b": "The same of the second group.",
    "final_loss": "Loss of the last batch.",
    "measure": "What was measured on held-out samples: accuracy, or the share of variance explained.",
    "performance": "Its value.",
    "chance": "What guessing, or the mean of the training samples, reaches.",
    "at_chance": "Whether the run did no better than that; empty where no samples were held out.",
    "first_step": "First recorded step.",
    "last_step": "Last recorded step.",
    "sigma1_a_first": "Largest singular value of the first group's share of the gradient, first recorded step.",
    "sigma1_b_first": "The same of the second group.",
    "sigma1_a_last": "Largest singular value of the first group's share, last recorded step.",
    "sigma1_b_last": "The same of the second group.",
    "log2_ratio_last": "Base-2 logarithm of the last two's ratio; empty where one is not above its noise floor.",
    "alignment_last": "Alignment of the whole batch's factors at the last recorded step, where it is defined.",
    "paper_values": "Share of the gradient's singular values that the paper's t-test over steps calls significant, of "
    "those above the noise floor; no evidence about groups.",
    "permutation_p": "Smallest family-wise p of the contrast's singular values when labels are permuted.",
    "permutation_effect": "Effect of the singular value with that p: its distance from its mean over the other labellings, "
    "in their standard deviations.",
    "permutation_effect_low": "Lower end of that effect's 95 % interval.",
    "permutation_effect_high": "Upper end of that interval.",
    "refit_p": "Smallest family-wise p of the contrast's singular values when trainings are repeated with permuted "
    "labels.",
    "refit_effect": "Effect of the singular value with that p, as above, over trainings.",
    "refit_effect_low": "Lower end of that effect's 95 % interval.",
    "refit_effect_high": "Upper end of that interval.",
}

PLACE = ["layer", "group_a", "group_b"]


class SummarySettings(TypedDict):
    """What the stage reads from the configuration."""

    variance: str
    runs: list[dict[str, Any]]


def build_summary(settings: SummarySettings, inputs: list[str], output: str) -> str:
    """Write the summary as a tab-separated table.

    Parameters
    ----------
    settings : SummarySettings
        Every training: experiment, run, seed, network, and the name of the run whose tests belong to it.
    inputs : list of str
        Every file that is read; they stand at the paths of `autospec.paths`, below the current folder.
    output : str
        The table to write.

    Returns
    -------
    str
        One line that says what the table holds.
    """
    rows = []
    for about in settings["runs"]:
        tree = open_trajectories(result("run", experiment=about["experiment"], run=about["run"]))
        tests = read_tests(result("tests", experiment=about["experiment"], run=about["tests"]))
        described = {name: about[name] for name in list(COLUMNS)[:7]}
        rows += [{**described, **row} for row in summarise(tree, tests, settings["variance"])]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    with written_whole(output) as temporary:
        table.to_csv(temporary, sep="\t", index=False, float_format="%.6g")
    return f"{output}: {len(table)} rows of {len(settings['runs'])} runs"


def summarise(tree: xr.DataTree, tests: pd.DataFrame, variance: str) -> list[dict[str, Any]]:
    """Rows of one run: one for each layer and each pair of groups that was tested.

    Parameters
    ----------
    tree : xarray.DataTree
        Trajectories of the run.
    tests : DataFrame
        Its table of tests.
    variance : {"student", "welch"}
        Which of the paper's t-tests is counted.

    Returns
    -------
    list of dict
        Keys are those of `COLUMNS` from ``layer`` on.
    """
    performance = tree.attrs.get("performance") or {}
    measure = next((name for name in ("accuracy", "explained") if name in performance), None)
    steps = tree["step"].values
    about = {
        "final_loss": float(tree["training/loss"].values[-1]) if "training" in tree else np.nan,
        "measure": measure,
        "performance": performance.get(measure, np.nan),
        "chance": performance.get("chance", np.nan),
        "at_chance": performance.get("at_chance"),
        "first_step": int(steps[0]),
        "last_step": int(steps[-1]),
    }
    sizes = training_samples(tree)
    pairs = list(tests[["group_a", "group_b"]].drop_duplicates().itertuples(index=False, name=None))
    shares = _shares_of_values(tests, f"paper_{variance}")
    smallest = {test: _smallest(tests, test) for test in ("permutation", "refit")}
    rows = []
    for layer, node in tree["layers"].children.items():
        largest = _largest(node)
        alignment = float(node["alignment"].values[-1, 0]) if "alignment" in node else np.nan
        for group_a, group_b in pairs:
            place = (layer, group_a, group_b)
            rows.append(
                {
                    "layer": layer,
                    "group_a": group_a,
                    "group_b": group_b,
                    "samples_a": sizes.get(group_a, np.nan),
                    "samples_b": sizes.get(group_b, np.nan),
                    **about,
                    **_both(largest, group_a, group_b),
                    "alignment_last": alignment,
                    "paper_values": shares.get(place, np.nan),
                    **_effect("permutation", smallest["permutation"].get(place)),
                    **_effect("refit", smallest["refit"].get(place)),
                }
            )
    return rows


def _largest(node: xr.DataTree) -> dict[str, tuple[float, float, bool]]:
    """Each group's largest singular value, first and last, and whether the last lies above the noise floor."""
    if "gradient" not in node:
        return {}
    values = node["gradient"].sel(index=1).transpose("group", "step").values.astype(float)
    floor = node["gradient_noise_floor"].transpose("group", "step").values
    ends = zip(values[:, 0], values[:, -1], values[:, -1] > floor[:, -1], strict=True)
    return dict(zip(map(str, node["group"].values), ends, strict=True))


def _both(largest: dict[str, tuple[float, float, bool]], group_a: str, group_b: str) -> dict[str, float]:
    """Both groups' largest singular values, first and last, and the last's ratio; NaN where none were recorded."""
    (a_first, a_last, a_above), (b_first, b_last, b_above) = (
        largest.get(group, (np.nan, np.nan, False)) for group in (group_a, group_b)
    )
    return {
        "sigma1_a_first": a_first,
        "sigma1_b_first": b_first,
        "sigma1_a_last": a_last,
        "sigma1_b_last": b_last,
        "log2_ratio_last": float(np.log2(a_last / b_last)) if a_above and b_above else np.nan,
    }


def _shares_of_values(tests: pd.DataFrame, test: str) -> dict[Any, float]:
    """Share of the gradient's resolved singular values that the paper's test calls significant, by layer and groups."""
    of_values = (tests["test"] == test) & (tests["statistic"] == "gradient") & tests["step"].isna()
    resolved = tests[of_values & ~tests["below_floor"]]
    return resolved.groupby(PLACE)["significant"].mean().to_dict()


def _smallest(tests: pd.DataFrame, test: str) -> dict[Any, pd.Series | None]:
    """The contrast's singular value with the smallest family-wise p, by layer and groups."""
    rows = tests[(tests["test"] == test) & (tests["statistic"] == "contrast")]
    return {place: smallest_p(here) for place, here in rows.groupby(PLACE)}


def _effect(test: str, found: pd.Series | None) -> dict[str, float]:
    """A smallest p, and the effect that it stands for."""
    columns = {"p": "p_adjusted", "effect": "effect_size", "effect_low": "effect_low", "effect_high": "effect_high"}
    return {f"{test}_{name}": np.nan if found is None else float(found[column]) for name, column in columns.items()}
