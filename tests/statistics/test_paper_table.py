"""The paper's t-tests against their formulas and scipy, what counts as resolved, and the table that holds them."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import special, stats

from autospec.errors import UserError
from autospec.statistics.build import build_tests, group_pairs, paper_tests
from autospec.statistics.paper import WHAT_IT_IS_NOT, compare_spectra
from autospec.statistics.table import COLUMNS, read_tests, tidy, write_tests
from autospec.storage import write_packed

STEPS, VALUES = 9, 5
COUNTED = [
    "layer",
    "statistic",
    "step",
    "index",
    "group_a",
    "group_b",
    "comparison",
    "test",
    "estimate",
    "interval_low",
    "interval_high",
    "effect_size",
    "effect_low",
    "effect_high",
    "p",
    "p_adjusted",
    "p_bh",
    "p_holm",
    "significant",
    "below_floor",
]


@pytest.fixture
def spectra():
    """Two groups' spectra, descending and far above their floors."""
    generator = np.random.default_rng(7)
    a, b = (np.sort(generator.lognormal(size=(STEPS, VALUES)), axis=1)[:, ::-1] for _ in range(2))
    return a, 1.3 * b, np.full(STEPS, 1e-6), np.full(STEPS, 1e-6)


def by_formula(x: np.ndarray, y: np.ndarray, equal: bool) -> tuple[float, float, float]:
    """Two-tailed p of Student's or Welch's test, and the ends of the 95 % interval, from the textbook."""
    n, m = len(x), len(y)
    u, v = x.var(ddof=1), y.var(ddof=1)
    if equal:
        degrees = n + m - 2
        error = math.sqrt(((n - 1) * u + (m - 1) * v) / degrees * (1 / n + 1 / m))
    else:
        error = math.sqrt(u / n + v / m)
        degrees = (u / n + v / m) ** 2 / ((u / n) ** 2 / (n - 1) + (v / m) ** 2 / (m - 1))
    t = (x.mean() - y.mean()) / error
    half = error * special.stdtrit(degrees, 0.975)
    p = special.betainc(degrees / 2, 0.5, degrees / (degrees + t**2))
    return p, x.mean() - y.mean() - half, x.mean() - y.mean() + half


def hedges(x: np.ndarray, y: np.ndarray) -> float:
    """Hedges' g from its definition, with the exact correction by gamma functions."""
    n, m = len(x), len(y)
    pooled = math.sqrt(((n - 1) * x.var(ddof=1) + (m - 1) * y.var(ddof=1)) / (n + m - 2))
    degrees = n + m - 2
    factor = math.gamma(degrees / 2) / (math.sqrt(degrees / 2) * math.gamma((degrees - 1) / 2))
    return factor * (x.mean() - y.mean()) / pooled


@pytest.mark.parametrize("scale", ["raw", "log"])
def test_both_tests_follow_their_formulas_over_steps_and_over_singular_values(spectra, scale):
    a, b, *floors = spectra
    steps, index = np.arange(0, 2 * STEPS, 2), np.arange(1, VALUES + 1)
    table = compare_spectra(a, b, *floors, steps, index, scale)
    if scale == "log":
        a, b = np.log(a), np.log(b)
    assert len(table) == 2 * (STEPS + VALUES)
    samples = {("step", step): (a[i], b[i]) for i, step in enumerate(steps)}
    samples |= {("index", k): (a[:, i], b[:, i]) for i, k in enumerate(index)}
    for (column, at), (x, y) in samples.items():
        for name, equal in (("student", True), ("welch", False)):
            rows = table[(table[column] == at) & (table["test"] == f"paper_{name}")]
            assert len(rows) == 1
            row = rows.iloc[0]
            found = (row["p"], row["interval_low"], row["interval_high"])
            assert found == pytest.approx(by_formula(x, y, equal), rel=1e-9)
            assert row["p"] == pytest.approx(stats.ttest_ind(x, y, equal_var=equal).pvalue, rel=1e-12)
            assert row["estimate"] == pytest.approx(x.mean() - y.mean(), rel=1e-12)
            assert row["effect_size"] == pytest.approx(hedges(x, y), rel=1e-9)
            assert row["effect_low"] < row["effect_size"] < row["effect_high"]
    assert not table["below_floor"].any()


def resolved(table: pd.DataFrame, column: str) -> dict[int, bool]:
    """Whether each step, or singular value, is resolved: then it has a p, and else none."""
    rows = table[table[column].notna() & (table["test"] == "paper_student")]
    assert (rows["p"].isna() == rows["below_floor"]).all()
    return dict(zip(rows[column].astype(int).tolist(), (~rows["below_floor"]).tolist(), strict=True))


@pytest.mark.parametrize("zero", [[4], [0, 1, 2, 3, 4]], ids=["one", "all"])
def test_logarithms_are_of_singular_values_that_are_above_the_floor_at_every_step(spectra, zero):
    a, b, *floors = spectra
    a[3, [k for k in zero if k < VALUES]] = 0
    steps, index = np.arange(STEPS), np.arange(1, VALUES + 1)
    table = compare_spectra(a, b, *floors, steps, index, "log")
    kept = [k for k in range(VALUES) if k not in zero]
    assert not np.isinf(table["estimate"]).any()
    assert resolved(table, "step") == dict.fromkeys(range(STEPS), len(kept) >= 2)
    assert resolved(table, "index") == {k + 1: k in kept for k in range(VALUES)}
    for step in range(STEPS) if kept else ():
        row = table[(table["step"] == step) & (table["test"] == "paper_welch")].iloc[0]
        x, y = np.log(a[step, kept]), np.log(b[step, kept])
        assert row["p"] == pytest.approx(stats.ttest_ind(x, y, equal_var=False).pvalue, rel=1e-12)


def test_a_step_without_a_group_takes_no_part_in_tests_over_steps(spectra):
    a, b, *floors = spectra
    b[3], floors[1][3] = np.nan, np.nan
    table = compare_spectra(a, b, *floors, np.arange(STEPS), np.arange(1, VALUES + 1))
    assert resolved(table, "step") == {step: step != 3 for step in range(STEPS)}
    others = np.arange(STEPS) != 3
    for k in range(VALUES):
        row = table[(table["index"] == k + 1) & (table["test"] == "paper_student")].iloc[0]
        assert row["p"] == pytest.approx(stats.ttest_ind(a[others, k], b[others, k]).pvalue, rel=1e-12)


def test_a_singular_value_below_the_noise_floor_once_is_not_tested(spectra):
    a, b, floor_a, floor_b = spectra
    b[4, 1] = 1e-7
    table = compare_spectra(a, b, floor_a, floor_b, np.arange(STEPS), np.arange(1, VALUES + 1))
    assert resolved(table, "index") == {1: True, 2: False, 3: True, 4: True, 5: True}
    assert all(resolved(table, "step").values())


def test_a_step_needs_two_values_above_the_noise_floor_in_both_groups(spectra):
    a, b, floor_a, floor_b = spectra
    a[2, 1:] = 1e-7  # one value above
    a[3, 2:] = 1e-7  # two values above
    a[5, :3], b[5, 3:] = 1e-7, 1e-7  # two of one group, three of the other, none of both
    table = compare_spectra(a, b, floor_a, floor_b, np.arange(STEPS), np.arange(1, VALUES + 1))
    assert resolved(table, "step") == {step: step not in (2, 5) for step in range(STEPS)}


def test_a_singular_value_that_never_changes_is_not_tested(spectra):
    a, b, floor_a, floor_b = spectra
    a[:, 0], b[:, 0] = 100.0 + 1e-7 * np.arange(STEPS) / STEPS, 90.0  # changes by less than the floor
    a[:, 1] = 50.0  # the other group's changes
    table = compare_spectra(a, b, floor_a, floor_b, np.arange(STEPS), np.arange(1, VALUES + 1))
    assert resolved(table, "index") == {1: False, 2: True, 3: True, 4: True, 5: True}


def test_values_that_a_group_does_not_have_are_no_rows(spectra):
    a, b, floor_a, floor_b = spectra
    b[:, 3:] = np.nan
    table = compare_spectra(a, b, floor_a, floor_b, np.arange(STEPS), np.arange(1, VALUES + 1))
    assert list(resolved(table, "index")) == [1, 2, 3]
    first = table[(table["step"] == 0) & (table["test"] == "paper_student")].iloc[0]
    assert first["p"] == pytest.approx(stats.ttest_ind(a[0, :3], b[0, :3]).pvalue)


def trajectories(groups: dict[str, str], seed: int = 3) -> xr.DataTree:
    """Trajectories of one layer with made-up gradients; groups are given with their grouping."""
    generator = np.random.default_rng(seed)
    names = ["all", *groups]
    shape = (STEPS, len(names), VALUES)
    values = -np.sort(-generator.lognormal(size=shape), axis=2)
    text = np.dtypes.StringDType()
    root = xr.Dataset(
        {"group_size": (("step", "group"), np.full(shape[:2], 10))},
        coords={
            "step": np.arange(0, 3 * STEPS, 3),
            "group": ("group", np.array(names, dtype=text)),
            "grouping": ("group", np.array(["all", *groups.values()], dtype=text)),
        },
    )
    layer = xr.Dataset(
        {
            "gradient": (("step", "group", "index"), values),
            "gradient_noise_floor": (("step", "group"), np.full(shape[:2], 1e-6)),
            "rank_limit": ("group", np.full(len(names), VALUES)),
        },
        coords={"index": np.arange(1, VALUES + 1)},
    )
    return xr.DataTree.from_dict({"/": root, "layers/a.weight": layer})


GROUPS = {"HC": "diagnosis", "SZ": "diagnosis", "F": "sex", "M": "sex"}


def test_pairs_are_those_of_one_grouping_and_corrections_are_over_the_whole_run():
    tree = trajectories(GROUPS)
    assert group_pairs(tree) == [("HC", "SZ"), ("F", "M")]
    table = paper_tests(tree, "raw", 0.2)
    assert list(table.columns) == COUNTED == list(COLUMNS)
    assert table["comparison"].unique().tolist() == ["HC - SZ", "F - M"]
    for test in ("paper_student", "paper_welch"):
        part = table[table["test"] == test]
        assert len(part) == 2 * (STEPS + VALUES)
        p = part["p"].to_numpy()
        np.testing.assert_allclose(part["p_bh"], stats.false_discovery_control(p), rtol=1e-12)
        # Holm's procedure as it is told: reject from the smallest on while p < alpha / (tests that are left).
        for alpha in (0.05, 0.2, 0.6):
            rejected = set()
            for place, row in enumerate(np.argsort(p)):
                if p[row] > alpha / (len(p) - place):
                    break
                rejected.add(row)
            assert set(np.flatnonzero(part["p_holm"].to_numpy() <= alpha)) == rejected
        assert (part["p_adjusted"] == part["p_holm"]).all()
    assert (table["significant"] == (table["p"] < 0.2)).all()
    assert table["significant"].any()
    assert not table["significant"].all()


def test_the_order_of_a_pair_turns_signs_and_leaves_p():
    one, other = (trajectories(dict(order)) for order in ([("x", "g"), ("y", "g")], [("x", "g"), ("y", "g")]))
    swapped = other["layers/a.weight"].to_dataset()
    swapped["gradient"] = swapped["gradient"][:, [0, 2, 1]].drop_vars("group", errors="ignore")
    other = xr.DataTree.from_dict({"/": other.to_dataset(), "layers/a.weight": swapped})
    first, second = paper_tests(one, "log", 0.05), paper_tests(other, "log", 0.05)
    np.testing.assert_allclose(first["p"], second["p"], rtol=1e-12)
    np.testing.assert_allclose(first["estimate"], -second["estimate"], rtol=1e-12)
    np.testing.assert_allclose(first["effect_low"], -second["effect_high"], rtol=1e-12)


@pytest.mark.parametrize("labels", [("0", "1"), ("NA", "None"), ("nan", "null"), ("1.50", "True"), ("a b", 'quote "')])
def test_labels_stay_text_when_the_table_is_written_and_read(tmp_path, labels):
    table = paper_tests(trajectories(dict.fromkeys(labels, "g")), "raw", 0.05)
    table.loc[0, ["p", "p_adjusted"]] = np.nan
    write_tests(table, tmp_path / "table.tsv")
    read = read_tests(tmp_path / "table.tsv")
    assert read["group_a"].tolist() == [labels[0]] * len(table)
    assert read["comparison"].tolist() == [f"{labels[0]} - {labels[1]}"] * len(table)
    assert read["p"].isna().sum() == 1
    assert read["step"].isna().sum() == read["index"].notna().sum() == 2 * VALUES
    assert read["significant"].dtype == read["below_floor"].dtype == bool
    pd.testing.assert_frame_equal(read, table, check_dtype=False, rtol=1e-7)


def test_a_table_with_other_columns_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "table.tsv").write_text("layer\tp\na\t0.5\n")
    with pytest.raises(UserError, match=r"table\.tsv is no table of tests"):
        read_tests(tmp_path / "table.tsv")
    with pytest.raises(UserError, match="there is no table of tests"):
        read_tests(tmp_path / "other.tsv")


def settings(task: str) -> dict:
    """Settings of the stage."""
    return {"name": "small/net", "task": task, "scale": "raw", "alpha": 0.05}


def test_the_description_names_every_column_the_family_and_what_the_tests_are_not(tmp_path):
    write_packed(trajectories(GROUPS), tmp_path / "net.zarr.zip")
    table, described = tmp_path / "net.tsv", tmp_path / "net.json"
    build_tests(settings("classifier"), str(tmp_path / "net.zarr.zip"), str(table), str(described))
    found = json.loads(described.read_text())
    assert list(found["columns"]) == table.read_text().splitlines()[0].split("\t")
    assert all(len(text) > 10 for text in found["columns"].values())
    paper = found["tests"]["paper"]
    assert paper["what_it_is_not"] == WHAT_IT_IS_NOT
    assert f"{STEPS} recorded steps (0 to {3 * (STEPS - 1)})" in paper["method"]
    assert f"{2 * (STEPS + VALUES)} tests of Student's kind" in paper["family"]
    assert "no valid test of groups" in found["which_test_applies"]
    assert "have seen the labels" in found["which_test_applies"]


def test_the_table_holds_the_valid_tests_beside_the_paper_s(tmp_path):
    write_packed(trajectories(GROUPS), tmp_path / "net.zarr.zip")
    row = {"layer": "a.weight", "statistic": "contrast", "step": 0, "index": 1, "group_a": "HC", "group_b": "SZ"}
    row |= {"comparison": "HC - SZ", "test": "permutation", "p": 0.01, "p_adjusted": 0.04, "significant": True}
    write_tests(tidy(pd.DataFrame([{**row, "below_floor": False}])), tmp_path / "permutation.tsv")
    (tmp_path / "permutation.json").write_text('{"method": "as done", "refused": {"F - M": "too few."}}')
    build_tests(
        settings("autoencoder"),
        str(tmp_path / "net.zarr.zip"),
        str(tmp_path / "net.tsv"),
        str(tmp_path / "net.json"),
        {"table": str(tmp_path / "permutation.tsv"), "described": str(tmp_path / "permutation.json")},
    )
    table = read_tests(tmp_path / "net.tsv")
    assert table["test"].value_counts().to_dict() == {
        "paper_student": 2 * (STEPS + VALUES),
        "paper_welch": 2 * (STEPS + VALUES),
        "permutation": 1,
    }
    found = json.loads((tmp_path / "net.json").read_text())
    assert found["tests"]["permutation"]["refused"] == {"F - M": "too few."}
    assert "exact test of groups" in found["which_test_applies"]
    assert "'refit' was not made" in found["which_test_applies"]
