"""Variability over seeds, and intervals over subjects: against statsmodels' terms, scipy and brute force."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from autospec.introspection.sample_shares import StackedShares
from autospec.statistics.build import build_tests
from autospec.statistics.permutations import compare
from autospec.statistics.permute import shares_at
from autospec.statistics.seeds import WHAT_IT_IS, bootstrap_mean, describe_seeds, mixed_model
from autospec.statistics.subjects import WHAT_IT_IS as WHAT_INTERVALS_ARE
from autospec.statistics.subjects import drawn_subjects, interval, population_intervals, resampled
from autospec.storage import write_packed
from autospec.training.prepare import prepare
from autospec.training.snapshots import open_snapshots
from tests.statistics.people import contrast_by_autograd, settings_of, train, write_people
from tests.statistics.test_paper_table import GROUPS, STEPS, trajectories
from tests.statistics.test_paper_table import settings as table_settings


def test_a_balanced_mixed_model_is_the_analysis_of_variance():
    generator = np.random.default_rng(1)
    seeds, steps = 7, 12
    values = 0.4 + 0.5 * generator.normal(size=(seeds, 1)) + 0.2 * generator.normal(size=(seeds, steps))
    found = mixed_model(values)
    # Restricted maximum likelihood of a balanced design: means of squares between and within.
    within = ((values - values.mean(1, keepdims=True)) ** 2).sum() / (seeds * (steps - 1))
    between = steps * ((values.mean(1) - values.mean()) ** 2).sum() / (seeds - 1)
    half = stats.norm.ppf(0.975) * np.sqrt(between / (seeds * steps))
    assert found["converged"]
    assert found["estimate"] == pytest.approx(values.mean(), abs=1e-6)
    assert found["deviation_within"] == pytest.approx(np.sqrt(within), rel=1e-3)
    assert found["deviation_between_seeds"] == pytest.approx(np.sqrt((between - within) / steps), rel=1e-2)
    assert (found["low"], found["high"]) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-2)


def test_a_fit_at_the_boundary_says_so():
    generator = np.random.default_rng(0)
    generator.normal(size=126)  # from here on seeds differ by less than their steps would make them differ
    values = 0.3 + 0.2 * generator.normal(size=(6, 20))
    values -= values.mean(1, keepdims=True)
    assert mixed_model(values)["warnings"]
    assert mixed_model(np.full((3, 4), 2.0))["estimate"] is None
    assert mixed_model(np.array([[1.0, 2.0, np.nan]]))["warnings"] == [
        "there is too little that varies for a mixed model"
    ]


def test_the_bootstrap_over_seeds_is_scipy_s_percentile_bootstrap():
    values = np.random.default_rng(2).normal(1, 2, size=9)
    mean, low, high = bootstrap_mean(np.append(values, np.nan), repetitions=20_000)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.05)


def test_the_description_holds_every_pair_and_says_that_it_is_no_test(tmp_path):
    trees = {f"net-{seed}": trajectories(GROUPS, seed) for seed in range(3)}
    found = describe_seeds(trees, [("HC", "SZ"), ("F", "M")])
    assert found["what_it_is"] == WHAT_IT_IS
    assert "no test of groups" in WHAT_IT_IS
    assert f"{STEPS} recorded steps" in found["method"]
    assert [each["comparison"] for each in found["layers"]] == ["HC - SZ", "F - M"]
    last = [tree["layers/a.weight/gradient"].values[-1, :, 0] for tree in trees.values()]
    expected = np.mean([np.log2(each[1] / each[2]) for each in last])
    assert found["layers"][0]["last_step"]["mean"] == pytest.approx(expected)
    for name, tree in trees.items():
        write_packed(tree, tmp_path / f"{name}.zarr.zip")
    one, *further = (str(tmp_path / f"{name}.zarr.zip") for name in trees)
    build_tests(table_settings("autoencoder"), one, str(tmp_path / "t.tsv"), str(tmp_path / "t.json"), further=further)
    assert json.loads((tmp_path / "t.json").read_text())["seeds"] == json.loads(json.dumps(found))


def test_subjects_are_drawn_with_replacement_within_their_groups():
    in_first = np.array([True] * 5 + [False] * 9)
    times = drawn_subjects(in_first, 50, seed=4)
    assert (times[0] == 1).all()
    assert (times[:, in_first].sum(1) == 5).all()
    assert (times[:, ~in_first].sum(1) == 9).all()
    assert (times[1:] == 0).any(1).all()
    np.testing.assert_array_equal(times[:11], drawn_subjects(in_first, 10, seed=4))


def test_drawn_subjects_weigh_as_often_as_they_are_drawn(tmp_path):
    dataset = write_people(tmp_path / "people.zarr.zip", effect=1.0)
    train(settings_of("autoencoder"), dataset, tmp_path / "w.pt")
    run = open_snapshots(tmp_path / "w.pt")
    prepared = prepare(run.settings, str(dataset), torch.device("cpu"))
    labels = np.array(prepared.labels["target"])
    comparison = compare(labels, "HC", "SZ", subjects=prepared.training.subjects)
    shares = shares_at(run, prepared, 5)
    times = drawn_subjects(comparison.in_first, 3, seed=0)
    # One subject a group, drawn as often as the group is large: its share alone, and per sample its own.
    chosen = [np.flatnonzero(comparison.in_first)[2], np.flatnonzero(~comparison.in_first)[3]]
    times[3] = 0
    times[3, chosen] = 18
    unit = comparison.unit
    alone = contrast_by_autograd(prepared, run.weights(5), unit == chosen[0], unit == chosen[1])
    whole = contrast_by_autograd(prepared, run.weights(5), labels == "HC", labels == "SZ")
    for layer, of_layer in shares.items():
        found = resampled(of_layer, comparison, times)
        for draw, brute in ((0, whole), (3, alone)):
            a, b = found["log2_ratio"][draw], found["cosine"][draw]
            matrices = [
                of_layer.weighted_sums(torch.from_numpy((rows / rows.sum())[None].astype(float)))[0]
                for rows in ((labels == "HC", labels == "SZ") if draw == 0 else (unit == chosen[0], unit == chosen[1]))
            ]
            np.testing.assert_allclose(
                torch.linalg.svdvals(matrices[0] - matrices[1]), brute[layer], rtol=2e-5, atol=1e-6 * brute[layer][0]
            )
            sigma = [float(torch.linalg.svdvals(matrix)[0]) for matrix in matrices]
            assert a == pytest.approx(np.log2(sigma[0] / sigma[1]), abs=1e-6)
            cosine = (matrices[0] * matrices[1]).sum() / (matrices[0].norm() * matrices[1].norm())
            assert b == pytest.approx(float(cosine), abs=1e-6)
    intervals = population_intervals([shares, shares], comparison, seed=0, repetitions=40)
    for each in intervals:
        for name in ("log2_ratio", "cosine"):
            assert each[name]["low"] < each[name]["high"]
            found = resampled(shares[each["layer"]], comparison, drawn_subjects(comparison.in_first, 40, 0))[name]
            assert each[name]["estimate"] == pytest.approx(found[0])
            scale, back = (np.arctanh, np.tanh) if name == "cosine" else (np.asarray, float)
            half = stats.norm.ppf(0.975) * np.std(scale(found[1:]), ddof=1)
            ends = [each[name]["low"], each[name]["high"]]
            assert ends == pytest.approx([back(scale(found[0]) - half), back(scale(found[0]) + half)])


def test_a_training_that_diverged_has_no_intervals():
    comparison = compare(["a", "b"] * 10, "a", "b")
    fine, wrong = torch.randn(2, 20, 3, 4).double()
    wrong[3] = torch.nan
    fine, wrong = ({"w": StackedShares(each, np.ones(20, int), torch.float32)} for each in (fine, wrong))
    found = resampled(wrong["w"], comparison, drawn_subjects(comparison.in_first, 60, seed=0))
    for name in ("log2_ratio", "cosine"):
        assert np.isnan(found[name]).all()
        assert population_intervals([fine], comparison, seed=0)[0][name]["low"] is not None
        assert population_intervals([fine, wrong], comparison, seed=0)[0][name]["estimate"] is None


@pytest.mark.parametrize("cosine", [False, True])
def test_there_is_no_interval_where_a_draw_has_a_share_of_zero(cosine):
    values = np.array([0.2, 0.1, np.nan if cosine else -np.inf, 0.3])
    assert interval(values, cosine) == {"estimate": pytest.approx(0.2), "low": None, "high": None}
    assert "There is none where the share of subjects who are drawn together is zero" in WHAT_INTERVALS_ARE


@pytest.mark.parametrize("signal", [0.25, 1.0])
def test_the_interval_for_the_population_holds_the_mean_over_new_samples_of_subjects(signal):
    generator = np.random.default_rng(1)
    common = np.outer(generator.normal(size=5), generator.normal(size=6))
    common *= signal / np.sqrt(np.square(common).mean())
    comparison = compare(["a"] * 40 + ["b"] * 60, "a", "b")
    times = drawn_subjects(comparison.in_first, 200, 0)
    first = comparison.in_first

    def statistics(weights, shares):
        a, b = (np.tensordot(each / each.sum(-1, keepdims=True), shares, 1) for each in weights)
        inner = (a * b).sum((-2, -1)) / np.linalg.norm(a, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))
        return {
            "cosine": inner,
            "log2_ratio": np.log2(np.divide(*(np.linalg.norm(each, 2, axis=(-2, -1)) for each in (a, b)))),
        }

    def study():
        return common + generator.normal(size=(100, 5, 6))

    one = (first.astype(float), (~first).astype(float))
    expected = {
        name: np.mean([statistics(one, study())[name] for _ in range(1000)]) for name in ("cosine", "log2_ratio")
    }
    held = {name: 0 for name in expected}
    for _ in range(150):
        shares = study()
        for name, values in statistics((times * first, times * ~first), shares).items():
            found = interval(values, name == "cosine")
            assert found["low"] < found["estimate"] < found["high"]
            held[name] += found["low"] <= expected[name] <= found["high"]
    for name, count in held.items():
        assert stats.binomtest(count, 150, 0.88, alternative="less").pvalue > 0.01, name
