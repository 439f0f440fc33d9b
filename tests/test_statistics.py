"""The paper's t-tests against their formulas, and what counts as resolved."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from autospec import open_trajectories
from autospec.statistics.build import group_pairs, paper_tests
from autospec.statistics.paper import compare_spectra
from autospec.statistics.table import read_tests, write_tests

STEPS, VALUES = 9, 5


@pytest.fixture
def spectra():
    """Two groups' spectra, descending and far above their floors."""
    generator = np.random.default_rng(7)
    a, b = (np.sort(generator.lognormal(size=(STEPS, VALUES)), axis=1)[:, ::-1] for _ in range(2))
    return a, 1.3 * b, np.full(STEPS, 1e-6), np.full(STEPS, 1e-6)


def by_formula(x: np.ndarray, y: np.ndarray, equal: bool) -> tuple[float, float]:
    """T and two-tailed p of Student's or Welch's test, from the textbook."""
    n, m = len(x), len(y)
    u, v = x.var(ddof=1), y.var(ddof=1)
    if equal:
        degrees = n + m - 2
        error = math.sqrt(((n - 1) * u + (m - 1) * v) / degrees * (1 / n + 1 / m))
    else:
        error = math.sqrt(u / n + v / m)
        degrees = (u / n + v / m) ** 2 / ((u / n) ** 2 / (n - 1) + (v / m) ** 2 / (m - 1))
    t = (x.mean() - y.mean()) / error
    return t, special.betainc(degrees / 2, 0.5, degrees / (degrees + t**2))


@pytest.mark.parametrize("scale", ["raw", "log"])
def test_both_tests_follow_their_formulas_over_steps_and_over_singular_values(spectra, scale):
    a, b, *floors = spectra
    steps, index = np.arange(0, 2 * STEPS, 2), np.arange(1, VALUES + 1)
    table = compare_spectra(a, b, *floors, steps, index, scale)
    if scale == "log":
        a, b = np.log(a), np.log(b)
    rows = table.set_index(["test", "at"])
    assert len(rows) == STEPS + VALUES
    samples = {("step", step): (a[i], b[i]) for i, step in enumerate(steps)}
    samples |= {("singular_value", k): (a[:, i], b[:, i]) for i, k in enumerate(index)}
    for key, (x, y) in samples.items():
        row = rows.loc[key]
        assert row["samples"] == len(x)
        for name, equal in (("student", True), ("welch", False)):
            assert (row[f"t_{name}"], row[f"p_{name}"]) == pytest.approx(by_formula(x, y, equal), rel=1e-9)
            library = stats.ttest_ind(x, y, equal_var=equal)
            assert row[f"p_{name}"] == pytest.approx(library.pvalue, rel=1e-9)
    assert rows["resolved"].all()


def resolved(table: pd.DataFrame, test: str) -> dict[int, bool]:
    """Whether each step, or singular value, is resolved."""
    rows = table[table["test"] == test]
    return dict(zip(rows["at"].tolist(), rows["resolved"].tolist(), strict=True))


def test_a_singular_value_below_the_noise_floor_once_is_not_resolved(spectra):
    a, b, floor_a, floor_b = spectra
    b[4, 1] = 1e-7
    table = compare_spectra(a, b, floor_a, floor_b, np.arange(STEPS), np.arange(1, VALUES + 1))
    assert resolved(table, "singular_value") == {1: True, 2: False, 3: True, 4: True, 5: True}
    assert all(resolved(table, "step").values())


def test_a_step_needs_two_values_above_the_noise_floor_in_both_groups(spectra):
    a, b, floor_a, floor_b = spectra
    a[2, 1:] = 1e-7  # one value above
    a[3, 2:] = 1e-7  # two values above
    a[5, :3], b[5, 3:] = 1e-7, 1e-7  # two of one group, three of the other, none of both
    table = compare_spectra(a, b, floor_a, floor_b, np.arange(STEPS), np.arange(1, VALUES + 1))
    assert resolved(table, "step") == {step: step not in (2, 5) for step in range(STEPS)}


def test_a_singular_value_that_never_changes_is_not_resolved(spectra):
    a, b, floor_a, floor_b = spectra
    a[:, 0], b[:, 0] = 100.0 + 1e-7 * np.arange(STEPS) / STEPS, 90.0  # changes by less than the floor
    a[:, 1] = 50.0  # the other group's changes
    table = compare_spectra(a, b, floor_a, floor_b, np.arange(STEPS), np.arange(1, VALUES + 1))
    assert resolved(table, "singular_value") == {1: False, 2: True, 3: True, 4: True, 5: True}


def test_values_that_a_group_does_not_have_are_not_tested(spectra):
    a, b, floor_a, floor_b = spectra
    b[:, 3:] = np.nan
    table = compare_spectra(a, b, floor_a, floor_b, np.arange(STEPS), np.arange(1, VALUES + 1))
    assert list(resolved(table, "singular_value")) == [1, 2, 3]
    rows = table[table["test"] == "step"]
    assert rows["samples"].unique().tolist() == [3]
    assert rows["p_student"].iloc[0] == pytest.approx(stats.ttest_ind(a[0, :3], b[0, :3]).pvalue)


def test_every_pair_of_groups_is_tested_in_every_layer_and_statistic(study):
    tree = open_trajectories(study.run("judge"))
    assert group_pairs(tree) == [("0", "1"), ("0", "3"), ("1", "3")]
    table = paper_tests(tree, "raw")
    for layer, width in (("encoder.0.weight", 6), ("classifier.weight", 3)):
        for statistic in ("gradient", "activation", "adjoint"):
            for a, b in group_pairs(tree):
                part = table.query("layer == @layer and statistic == @statistic and group_a == @a and group_b == @b")
                assert part.loc[part["test"] == "step", "at"].tolist() == [0, 2, 4, 6, 8, 10]
                assert part.loc[part["test"] == "singular_value", "at"].tolist() == list(range(1, width + 1))
                values = tree[f"layers/{layer}/{statistic}"]
                row = part[(part["test"] == "singular_value") & (part["at"] == 1)].iloc[0]
                if row["resolved"]:
                    expected = stats.ttest_ind(values.sel(group=a, index=1), values.sel(group=b, index=1)).pvalue
                    assert row["p_student"] == pytest.approx(expected, rel=1e-5)
    # What enters the first layer is the data, which training does not change.
    inputs = table.query("layer == 'encoder.0.weight' and statistic == 'activation' and test == 'singular_value'")
    assert not inputs["resolved"].any()
    assert table["resolved"].any()


@pytest.mark.parametrize("labels", [("0", "1"), ("NA", "None"), ("nan", "null"), ("1.50", "True"), ("a b", 'quote "')])
def test_labels_stay_text_when_the_table_is_written_and_read(tmp_path, spectra, labels):
    a, b, *floors = spectra
    a[:, 2] = b[:, 2] = 5.0  # constant: p is NaN or 0
    table = compare_spectra(a, b, *floors, np.arange(STEPS), np.arange(1, VALUES + 1))
    for position, (name, value) in enumerate(
        {"layer": "a.weight", "statistic": "gradient", "group_a": labels[0], "group_b": labels[1]}.items()
    ):
        table.insert(position, name, value)
    write_tests(table, tmp_path / "table.tsv")
    read = read_tests(tmp_path / "table.tsv")
    assert read["group_a"].tolist() == [labels[0]] * len(table)
    assert read["group_b"].tolist() == [labels[1]] * len(table)
    assert read["p_student"].isna().any()
    assert read["resolved"].dtype == bool
    pd.testing.assert_frame_equal(read, table, check_dtype=False, rtol=1e-7)
