"""The summary: one row for each run, layer and comparison."""

import contextlib

import numpy as np
import pandas as pd
import pytest

from autospec import specs
from autospec.describe import interval_words
from autospec.paths import result
from autospec.statistics.summary import COLUMNS, summarise
from autospec.statistics.table import read_tests, tidy
from autospec.trajectories import open_trajectories
from tests.conftest import ROOT


@pytest.fixture
def tree(study):
    """Trajectories of the study's autoencoder."""
    return open_trajectories(study.run("coder"))


@pytest.fixture
def tests(study):
    """Its tests."""
    return read_tests(study.tests("coder"))


def test_there_is_one_row_for_each_run_layer_and_comparison(study, tmp_path):
    with contextlib.chdir(study.folder):
        settings = specs.summary_settings(study.config)
        arguments = ("--spec", specs.spec("summary", settings), "--inputs", "unused")
        study.command("summary", *arguments, "--output", str(tmp_path / "summary.tsv"))
    table = pd.read_csv(tmp_path / "summary.tsv", sep="\t", dtype={"group_a": str, "group_b": str})
    assert list(table.columns) == list(COLUMNS)
    keys = table[["experiment", "run", "layer", "group_a", "group_b"]]
    assert not keys.duplicated().any()
    assert table["run"].value_counts().to_dict() == {"coder": 4 * 3, "judge": 2 * 3}
    assert set(zip(table["group_a"], table["group_b"], strict=True)) == {("0", "1"), ("0", "3"), ("1", "3")}
    assert result("summary") == "results/summary.tsv"


def test_values_are_those_of_the_trajectories_and_the_table_of_tests(tree, tests):
    tree.attrs["performance"] = {"held_out": 6, "explained": 0.25, "chance": 0.0, "at_chance": False}
    row = next(
        row
        for row in summarise(tree, tests, "student")
        if (row["layer"], row["group_a"], row["group_b"]) == ("encoder.0.weight", "0", "3")
    )
    largest = tree["layers/encoder.0.weight/gradient"].sel(index=1)
    for group, name in (("0", "a"), ("3", "b")):
        assert row[f"sigma1_{name}_first"] == pytest.approx(float(largest.sel(group=group)[0]))
        assert row[f"sigma1_{name}_last"] == pytest.approx(float(largest.sel(group=group)[-1]))
    ratio = float(largest.sel(group="0")[-1]) / float(largest.sel(group="3")[-1])
    assert row["log2_ratio_last"] == pytest.approx(np.log2(ratio), rel=1e-5)
    assert (row["first_step"], row["last_step"]) == (0, 10)
    assert row["final_loss"] == pytest.approx(float(tree["training/loss"][-1]))
    assert (row["measure"], row["performance"], row["at_chance"]) == ("explained", 0.25, False)
    assert (row["samples_a"], row["samples_b"]) == (6, 7)
    values = tests.query(
        "layer == 'encoder.0.weight' and statistic == 'gradient' and group_a == '0' and group_b == '3'"
        " and test == 'paper_student' and step.isna() and not below_floor"
    )
    assert row["paper_values"] == pytest.approx((values["p"] < 0.05).mean())
    assert np.isnan(row["permutation_p"])
    assert np.isnan(row["refit_p"])
    assert np.isnan(row["refit_effect"])


def test_samples_are_those_of_the_training_whatever_a_batch_holds(tree, tests):
    def samples():
        rows = summarise(tree, tests, "student")
        return [(row["samples_a"], row["samples_b"]) for row in rows if row["layer"] == "encoder.0.weight"]

    trained_on = [(6, 6), (6, 7), (6, 7)]
    assert samples() == trained_on
    sizes = tree.attrs.pop("training_samples")  # as in older stores
    assert samples() == trained_on
    tree["group_size"][1:] = [5, 2, 0, 3]  # mini-batches
    assert np.isnan(samples()).all()
    tree.attrs["training_samples"] = sizes
    assert samples() == trained_on


def test_the_smallest_family_wise_p_is_that_of_the_contrast_in_that_layer_with_its_effect(tree, tests):
    rows = pd.DataFrame(
        [
            {
                "layer": layer,
                "statistic": statistic,
                "step": 0,
                "index": 1,
                "test": test,
                "p_adjusted": p,
                "effect_size": effect,
                "effect_low": effect - 1,
                "effect_high": effect + 2,
            }
            for layer, statistic, test, p, effect in (
                ("encoder.0.weight", "contrast", "permutation", 0.2, 5.0),
                ("encoder.0.weight", "contrast", "permutation", 0.07, 3.0),
                ("encoder.0.weight", "contrast", "permutation", 0.07, 4.0),  # as rare, and larger
                ("encoder.0.weight", "difference", "permutation", 0.001, 9.0),
                ("encoder.2.weight", "contrast", "permutation", 0.002, 6.0),
                ("encoder.0.weight", "contrast", "refit", 0.4, -1.0),
            )
        ]
    ).assign(group_a="0", group_b="3", significant=False, below_floor=False)
    both = pd.concat([tests, tidy(rows)], ignore_index=True)
    found = {(row["layer"], row["group_a"], row["group_b"]): row for row in summarise(tree, both, "student")}
    names = [
        f"{test}_{name}" for test in ("permutation", "refit") for name in ("p", "effect", "effect_low", "effect_high")
    ]
    row = found["encoder.0.weight", "0", "3"]
    assert [row[name] for name in names] == [0.07, 4.0, 3.0, 6.0, 0.4, -1.0, -2.0, 1.0]
    assert found["encoder.2.weight", "0", "3"]["permutation_p"] == 0.002
    assert np.isnan([found["encoder.0.weight", "0", "1"][name] for name in names]).all()


def test_a_ratio_of_values_that_are_rounding_is_left_out(tree, tests):
    tree["layers/encoder.0.weight/gradient_noise_floor"][-1] = 1e9
    for row in summarise(tree, tests, "student"):
        assert np.isnan(row["log2_ratio_last"]) == (row["layer"] == "encoder.0.weight")


def test_the_page_explains_every_column():
    page = (ROOT / "docs/figures.md").read_text()
    for column, meaning in COLUMNS.items():
        assert f"| `{column}` | {meaning} |" in page


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((3.21, 1.0, 5.55), "3.2 (1 to 5.5)"),
        ((-139.6, -141.2, -99.4), "-140 (-141 to -99)"),
        ((2.0, -np.inf, np.inf), "2 (too few labellings for an interval)"),
        ((-0.24, None, None), "-0.24 (no interval)"),
        ((-0.24, np.nan, np.nan), "-0.24 (no interval)"),
        ((None, None, None), "–"),
    ],
)
def test_an_effect_has_two_digits_or_all_before_its_point(numbers, words):
    assert interval_words(*numbers) == words
