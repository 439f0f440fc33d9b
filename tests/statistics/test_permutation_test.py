"""The test of two groups: statistics by brute force, exact p, files, seeds, guard rails, calibration."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from autospec.errors import UserError
from autospec.introspection.sample_shares import FactoredShares, StackedShares, sample_shares
from autospec.statistics import measures, null
from autospec.statistics.permutation_test import (
    CLUSTER_COLUMNS,
    NullDistributions,
    average_over_seeds,
    evaluate,
    permutation_test,
)
from autospec.statistics.permutations import compare, draw_conditional_labellings, draw_labellings, group_sizes
from autospec.statistics.table import COLUMNS
from tests.introspection.families import FAMILIES, N
from tests.introspection.oracle import share_by_copies

LABELS = ["a", "b", "b", "c"] * 3


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def autoencoder(features=6, hidden=3):
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, features))


def reconstruction(x):
    return lambda model: (model(x) - x).square().mean()


def matrices(*each):
    """Shares given as one matrix a sample."""
    stacked = torch.from_numpy(np.stack(each).astype(np.float64))
    return StackedShares(stacked, np.full(len(stacked), 1000), torch.float32)


# ---------------------------------------------------------------------- the statistics


@pytest.mark.parametrize("name", ["Linear, batch norm", "Conv1d, plain", "RNN, plain", "Linear, twice"])
def test_permuted_statistics_are_those_of_autograd_with_parameter_copies(name):
    problem = FAMILIES[name]()
    problem.model.double()
    comparison = compare(LABELS, "a", "b")
    labellings = draw_labellings(comparison, 4, seed=0)
    distributions = NullDistributions(comparison, labellings)
    shares = sample_shares(problem.model, problem.loss, N)
    distributions.add(7, shares)
    for b, in_first in enumerate(labellings.in_first):
        everyone = comparison.unit >= 0
        member = everyone & in_first[comparison.unit]
        a, other = share_by_copies(problem, member), share_by_copies(problem, everyone & ~member)
        for layer in shares:
            first, second = (torch.linalg.svdvals(each[layer]).numpy() for each in (a, other))
            contrast = a[layer] / member.sum() - other[layer] / (everyone & ~member).sum()
            ranks = []
            for spectrum in (first, second):
                parts = spectrum[spectrum > 1e-12 * spectrum[0]] / spectrum.sum()
                ranks.append(np.exp(-(parts * np.log(parts)).sum()))
            expected = {
                "contrast": torch.linalg.svdvals(contrast).numpy(),
                "difference": first / member.sum() - second / (everyone & ~member).sum(),
                "cosine": float((a[layer] * other[layer]).sum() / (a[layer].norm() * other[layer].norm())),
                "effective_rank": ranks[0] - ranks[1],
                "distance": float(contrast.norm()),
            }
            scale = first[0] / member.sum()
            for statistic, right in expected.items():
                found = distributions.steps[7][layer, statistic].values[b]
                unit = scale if statistic in ("contrast", "difference", "distance") else 1.0
                right = np.atleast_1d(right)[: len(found)]
                assert np.abs(found - right).max() <= 1e-6 * unit, (layer, statistic)


def test_wide_and_high_matrices_give_the_same():
    generator = torch.Generator().manual_seed(0)
    activation, adjoint = (torch.randn(9, width, generator=generator).double() for width in (12, 4))
    wide, high = (
        FactoredShares(*pair, np.arange(9), 9, torch.float32) for pair in ((activation, adjoint), (adjoint, activation))
    )
    in_first = np.random.default_rng(0).permuted(np.tile(np.arange(9) < 4, (6, 1)), axis=1)
    sizes = in_first.sum(1), (~in_first).sum(1)
    forms = [measures.labelled_spectra(each, in_first, *sizes) for each in (wide, high, wide.stacked())]
    for name in ("first", "second", "contrast", "cosine"):
        for other in forms[1:]:
            assert getattr(forms[0], name) == pytest.approx(getattr(other, name), abs=1e-12)


def test_values_beyond_the_rows_of_a_group_are_zero():
    generator = torch.Generator().manual_seed(0)
    activation, adjoint = (torch.randn(24, width, generator=generator).double() for width in (50, 40))
    sample = np.repeat(np.arange(12), 2)
    factored = FactoredShares(activation, adjoint, sample, 12, torch.float32)
    in_first = np.random.default_rng(0).permuted(np.tile(np.arange(12) < 4, (5, 1)), axis=1)
    matrices = factored.stacked().matrices
    for shares in (factored, factored.stacked()):
        found = measures.labelled_spectra(shares, in_first, in_first.sum(1), (~in_first).sum(1))
        for each, rank in ((found.first, 8), (found.second, 16), (found.contrast, 24)):
            assert each.shape == (5, 40)
            assert (each[:, :rank] > 0.1).all()
            assert not each[:, rank:].any()
        for b, members in enumerate(in_first):
            right = torch.linalg.svdvals(matrices[torch.from_numpy(members)].sum(0)).numpy()
            entropy = stats.entropy(right[:8])
            assert measures.effective_rank(found.first[b]) == pytest.approx(np.exp(entropy), rel=1e-10)


@pytest.mark.parametrize("first", [False, True])
def test_a_group_without_rows_has_no_direction(first):
    shares = FactoredShares(torch.randn(3, 50).double(), torch.randn(3, 40).double(), np.arange(3), 12, torch.float32)
    members = np.full((2, 12), first)
    members[0, 5:] = members[1, 1:] = not first  # the second labelling divides the samples with rows
    found = measures.labelled_spectra(shares, members, members.sum(1), (~members).sum(1))
    with_none, other = (found.second, found.first) if first else (found.first, found.second)
    assert not with_none[0].any()
    assert (other[0, :3] > 0.1).all()
    assert np.isnan(found.cosine).tolist() == [True, False]


def test_shares_of_a_weight_that_is_computed_may_have_more_values_than_rows():
    model, x = nn.utils.parametrizations.weight_norm(nn.Linear(9, 7)).double(), torch.randn(6, 9).double()

    def loss(model, members=slice(None)):
        return model(x[members]).tanh().square().sum()

    name = "parametrizations.weight.original1"
    comparison = compare(["a", "b"] * 3, "a", "b")
    labellings = draw_labellings(comparison, 10, seed=0)
    shares = {name: sample_shares(model, loss, 6)[name]}
    assert (set(shares[name].rows), set(shares[name].ranks)) == ({1}, {7})
    found = measures.labelled_spectra(shares[name], labellings.in_first, *group_sizes(labellings, np.ones(6)))
    for b, members in enumerate(labellings.in_first):
        for spectra, chosen in ((found.first, members), (found.second, ~members)):
            share = torch.autograd.grad(loss(model, torch.from_numpy(chosen)), model.parametrizations.weight.original1)
            right = torch.linalg.svdvals(share[0]).numpy()
            assert right[6] > 1e-3 * right[0]
            assert spectra[b] == pytest.approx(right, rel=1e-9)
    table = permutation_test([0], lambda _: shares, comparison, labellings).table
    assert table.set_index("statistic").loc["contrast", "p"].notna().sum() == 7


def test_dead_units_and_inner_products_leave_every_p_as_it_is():
    generator = torch.Generator().manual_seed(0)
    activation, adjoint = (torch.randn(60, width, generator=generator).double() for width in (70, 44))
    adjoint[:, ::8] = 0
    factored = FactoredShares(activation, adjoint, np.arange(60), 60, torch.float32)
    comparison = compare(["a", "b"] * 30, "a", "b")
    labellings = draw_labellings(comparison, 60, seed=0)
    tables = []
    for shares in (factored, factored.stacked()):  # a matrix a sample, summed in double precision
        shares.reduced = lambda shares=shares: (
            shares if isinstance(shares, StackedShares) else type(shares).reduced(shares)
        )
        tables.append(permutation_test([0], lambda _, shares=shares: {"w": shares}, comparison, labellings).table)
    assert (tables[0]["index"].max(), tables[0]["p"].notna().sum()) == (44, 38 + 30 + 3)
    pd.testing.assert_frame_equal(tables[0][["p", "p_adjusted"]], tables[1][["p", "p_adjusted"]], check_exact=True)
    assert tables[0]["estimate"].to_numpy() == pytest.approx(tables[1]["estimate"].to_numpy(), rel=1e-5, abs=1e-7)


def test_effective_rank():
    assert measures.effective_rank(np.array([[3.0, 3.0, 3.0], [5.0, 0.0, 0.0]])) == pytest.approx([3.0, 1.0])
    uneven = np.array([0.5, 0.25, 0.25])
    assert measures.effective_rank(uneven * 7) == pytest.approx(np.exp(stats.entropy(uneven)))
    assert np.isnan(measures.effective_rank(np.zeros(3)))


@pytest.mark.parametrize("second", [1e-8, 0.3])
def test_effective_ranks_of_shares_of_rank_one_are_not_compared(second):
    """The derivatives at the two outputs of a softmax are each other's negative: what is beside that is rounding."""
    generator = torch.Generator().manual_seed(0)
    activation, one = (
        torch.randn(30, 12, generator=generator).double(),
        torch.randn(30, 1, generator=generator).double(),
    )
    adjoint = torch.cat([one, -one], 1) + second * torch.randn(30, 2, generator=generator).double()
    shares = FactoredShares(activation, adjoint, np.arange(30), 30, torch.float32)
    comparison = compare(["a", "b"] * 15, "a", "b")
    labellings = draw_labellings(comparison, 99, seed=0)
    every, others = (
        permutation_test([0], lambda _: {"head": shares}, comparison, labellings, statistics=chosen).table
        for chosen in (measures.STATISTICS, [name for name in measures.STATISTICS if name != "effective_rank"])
    )
    ranks = every["statistic"] == "effective_rank"
    assert every.loc[ranks, "p"].notna().any() == (second > 0.1)
    if second < 0.1:  # nor do they enter the correction of the others
        assert np.array_equal(every.loc[~ranks, "p_adjusted"], others["p_adjusted"], equal_nan=True)
        assert others["p_adjusted"].notna().any()


# ---------------------------------------------------------------------- p


def scalar_test(values, labels, permutations, **options):
    """The contrast of numbers: the distance between two means."""
    comparison = compare(labels, "a", "b")
    labellings = draw_labellings(comparison, permutations, seed=0)
    shares = {"w": matrices(*(np.full((1, 1), v) for v in values))}
    return permutation_test([0], lambda step: shares, comparison, labellings, statistics=["contrast"], **options)


@pytest.mark.parametrize(("first", "second"), [(4, 4), (3, 6)])
def test_all_permutations_give_the_exact_p_of_scipy(first, second):
    generator = np.random.default_rng(first)
    values = generator.normal(size=first + second) + np.where(np.arange(first + second) < first, 1.0, 0.0)
    result = scalar_test(values, ["a"] * first + ["b"] * second, 100_000)
    a, b = values[:first], values[first:]
    exact = stats.permutation_test(
        (a, b), lambda x, y: abs(np.mean(x) - np.mean(y)), n_resamples=np.inf, alternative="greater"
    )
    assert result.table["p"].item() == pytest.approx(exact.pvalue)
    exact_t = stats.permutation_test(
        (a, b), lambda x, y: abs(stats.ttest_ind(x, y).statistic), n_resamples=np.inf, alternative="greater"
    )
    assert result.table["p"].item() == pytest.approx(exact_t.pvalue)
    assert result.table["p_adjusted"].item() == result.table["p"].item()
    assert "labellings are possible" in result.messages[0]


def test_drawn_permutations_agree_with_the_t_test_of_many_subjects():
    generator = np.random.default_rng(11)
    for shift in (0.0, 0.3):
        values = generator.normal(size=120)
        values[:50] += shift
        result = scalar_test(values, ["a"] * 50 + ["b"] * 70, 4000)
        expected = stats.ttest_ind(values[:50], values[50:]).pvalue
        assert result.table["p"].item() == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 4000))


def test_p_is_never_zero_and_the_observed_labelling_counts():
    values = np.r_[np.full(10, 100.0), np.zeros(10)] + np.random.default_rng(0).normal(size=20)
    assert scalar_test(values, ["a"] * 10 + ["b"] * 10, 99).table["p"].item() == 1 / 100
    # All 20 labellings of six: the observed one and its mirror image are equally far apart.
    values = np.array([10.0, 11.0, 12.0, 0.0, 1.0, 2.5])
    result = scalar_test(values, list("aaabbb"), 500)
    assert result.table["p"].item() == 2 / 20
    assert not result.table["significant"].item()


def test_the_order_of_samples_does_not_matter():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    x[:10] *= 1.3
    subjects = np.array([f"s{i:02d}" for i in range(20)])
    labels = np.array(["a"] * 10 + ["b"] * 10)
    model = autoencoder()
    tables = []
    for order in (np.arange(20), np.random.default_rng(2).permutation(20)):
        comparison = compare(labels[order], "a", "b", subjects=subjects[order])
        labellings = draw_labellings(comparison, 199, seed=3)
        shares = sample_shares(model, reconstruction(x[torch.from_numpy(order)]), 20)
        tables.append(permutation_test([0], lambda step, s=shares: s, comparison, labellings).table)
    first, second = tables
    for column in ("p", "p_adjusted", "p_bh", "p_holm", "significant", "below_floor"):
        pd.testing.assert_series_equal(first[column], second[column])
    assert first["effect_size"].to_numpy() == pytest.approx(second["effect_size"].to_numpy(), rel=1e-3)


def test_subjects_with_several_samples_move_as_one():
    generator = np.random.default_rng(4)
    values = generator.normal(size=8)
    subjects, labels = np.arange(8), np.array(list("aabbabab"))
    once = scalar_test(values, labels, 10_000)
    comparison = compare(np.repeat(labels, 3), "a", "b", subjects=np.repeat(subjects, 3))
    shares = {"w": matrices(*(np.full((1, 1), v) for v in np.repeat(values, 3)))}
    labellings = draw_labellings(comparison, 10_000, seed=0)
    thrice = permutation_test([0], lambda step: shares, comparison, labellings, statistics=["contrast"])
    assert len(labellings) == 70
    for column in ("p", "estimate", "effect_size"):
        assert thrice.table[column].item() == pytest.approx(once.table[column].item(), rel=1e-5)


# ---------------------------------------------------------------------- tables


@pytest.fixture
def run():
    """Four steps of an autoencoder whose groups differ in the mean; 99 permutations of 24 samples."""
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(5))
    x[:12, :2] += 1.5
    labels = ["a"] * 12 + ["b"] * 12
    model = autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    shares = {}
    for step in range(4):
        shares[step * 5] = sample_shares(model, reconstruction(x), 24)
        for _ in range(5):
            optimizer.zero_grad()
            reconstruction(x)(model).backward()
            optimizer.step()
    comparison = compare(labels, "a", "b")
    return comparison, draw_labellings(comparison, 99, seed=1), shares


def test_the_table_and_its_family(run):
    comparison, labellings, shares = run
    result = permutation_test(shares, shares.get, comparison, labellings, alpha=0.05)
    table = result.table
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 4 * 2 * (3 + 3 + 1 + 1 + 1)
    for statistic, rows in table.groupby("statistic"):
        if statistic in ("contrast", "difference"):
            assert rows["index"].tolist() == [1, 2, 3] * 8
        else:
            assert rows["index"].isna().all()
    for column, value in {"group_a": "a", "group_b": "b", "comparison": "a - b", "test": "permutation"}.items():
        assert set(table[column]) == {value}
    tested = table[~table["below_floor"]]
    assert ((tested["p"] > 0) & (tested["p"] <= tested["p_adjusted"]) & (tested["p_adjusted"] <= 1)).all()
    assert (tested["p"] * 100).to_numpy() == pytest.approx(np.rint(tested["p"] * 100).to_numpy())
    assert (tested["significant"] == (tested["p_adjusted"] <= 0.05)).all()
    assert tested["significant"].any()
    for low, middle, high in (
        ("interval_low", "estimate", "interval_high"),
        ("effect_low", "effect_size", "effect_high"),
    ):
        assert ((tested[low] < tested[middle]) & (tested[middle] < tested[high])).all()
    assert f"{len(tested)} tests: contrast (24 values in 2 layers and 4 steps)" in result.family
    assert "100 labellings; 1 comparison" in result.family
    assert any("Holm's correction can reject none" in message for message in result.messages)
    # An interval is the statistic less the middle of what it is by chance.
    row = table[(table["statistic"] == "distance") & (table["layer"] == "0.weight") & (table["step"] == 5)].iloc[0]
    by_chance = null_of(run)[5]["0.weight", "distance"].values[:, 0].astype(float)
    others = by_chance[1:]
    low, high = np.sort(others - others.mean())[[1, -2]]  # of 100 labellings 2 are at least as extreme as these
    assert row["estimate"] == by_chance[0]
    assert [row["interval_low"], row["interval_high"]] == pytest.approx([by_chance[0] - high, by_chance[0] - low])
    size = (by_chance[0] - others.mean()) / others.std()
    assert row["effect_size"] == pytest.approx(size)
    assert row["effect_low"] == pytest.approx((by_chance[0] - others.mean() - high) / others.std())
    # the family-wise p by brute force: the maximum over everything standardised
    z = []
    for _, found in sorted(null_of(run).items()):
        for (_, statistic), each in found.items():
            centred = each.values.astype(float) - each.values.mean(0, dtype=float)
            scaled = centred / centred.std(0)
            z.append(
                {"two-sided": np.abs(scaled), "less": -scaled, "greater": scaled}[measures.ALTERNATIVES[statistic]]
            )
    z = np.concatenate(z, axis=1)
    expected = [(z.max(1) >= value - 1e-6).mean() for value in z[0]]
    assert table["p_adjusted"].to_numpy() == pytest.approx(expected)


def null_of(run):
    comparison, labellings, shares = run
    distributions = NullDistributions(comparison, labellings)
    for step, each in shares.items():
        distributions.add(step, each)
    return distributions.steps


def test_fewer_values_and_more_comparisons_change_the_family(run):
    comparison, labellings, shares = run
    distributions = NullDistributions(comparison, labellings, ["difference", "contrast"])
    for step, each in shares.items():
        distributions.add(step, each)
    every = evaluate(distributions)
    leading = evaluate(distributions, singular_values=1)
    assert set(leading.table["index"]) == {1}
    both = every.table.merge(leading.table, on=["layer", "statistic", "step", "index"], suffixes=("", "_1"))
    assert (both["p"] == both["p_1"]).all()
    assert (both["p_adjusted"] >= both["p_adjusted_1"]).all()
    three = evaluate(distributions, comparisons=3).table
    assert np.minimum(3 * every.table["p_adjusted"], 1).to_numpy() == pytest.approx(three["p_adjusted"].to_numpy())
    assert "3 comparisons, by Bonferroni" in evaluate(distributions, comparisons=3).family
    count = int(every.table["effect_size"].notna().sum())
    assert any(
        f"over {3 * count} tests" in message and f"over the {count} of this comparison" in message
        for message in evaluate(distributions, comparisons=3).messages
    )


def test_clusters_join_neighbouring_steps(run):
    comparison, labellings, shares = run
    distributions = NullDistributions(comparison, labellings, ["distance"])
    for step, each in shares.items():
        distributions.add(step, each)
    found = evaluate(distributions).clusters
    assert tuple(found.columns) == CLUSTER_COLUMNS
    whole = found[(found["first_step"] == 0) & (found["last_step"] == 15)]
    assert len(whole) >= 1
    z, masses = {}, np.zeros(100)
    for layer in shares[0]:
        values = np.stack([distributions.steps[step][layer, "distance"].values[:, 0] for step in shares], axis=1)
        z[layer] = (values - values.mean(0, dtype=float)) / values.std(0, dtype=float)
        threshold = np.quantile(z[layer], 0.95, axis=0)
        for b in range(100):
            for above, steps in itertools.groupby(range(4), key=lambda i: z[layer][b, i] > threshold[i]):
                if above:
                    masses[b] = max(masses[b], sum(z[layer][b, i] for i in steps))
    for row in whole.itertuples():
        assert row.mass == pytest.approx(z[row.layer][0].sum(), rel=1e-5)
        assert row.p_adjusted == pytest.approx((masses >= row.mass - 1e-4).mean())
        mean = z[row.layer].mean(1)
        others = np.sort(mean[1:])
        expected = [(mean[0] - other) / others.std() for other in (others.mean(), others[-2], others[1])]
        assert (row.effect_size, row.effect_low, row.effect_high) == pytest.approx(expected, rel=1e-4)


def test_an_interrupted_test_goes_on_where_it_was(run, tmp_path):
    comparison, labellings, shares = run
    whole = permutation_test(shares, shares.get, comparison, labellings)
    asked = []

    def shares_at(step):
        asked.append(step)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return shares[step]

    with pytest.raises(KeyboardInterrupt):
        permutation_test(shares, shares_at, comparison, labellings, checkpoint=tmp_path / "null")
    again = permutation_test(shares, shares_at, comparison, labellings, checkpoint=tmp_path / "null")
    assert asked == [0, 5, 10, 10, 15]
    pd.testing.assert_frame_equal(again.table, whole.table)
    pd.testing.assert_frame_equal(again.clusters, whole.clusters)
    other = draw_labellings(comparison, 99, seed=2)
    with pytest.raises(UserError, match="belongs to another comparison, other statistics or labellings"):
        permutation_test(shares, shares.get, comparison, other, checkpoint=tmp_path / "null")


def test_seeds_are_averaged_under_the_same_labellings(run):
    comparison, labellings, shares = run
    steps = sorted(shares)
    seeds = []
    for order in ([0, 1], [1, 0]):
        seeds.append(NullDistributions(comparison, labellings))
        for new, old in enumerate(order):
            seeds[-1].add(new, shares[steps[old]])
    mean = average_over_seeds(seeds)
    for key, each in mean.steps[0].items():
        expected = (seeds[0].steps[0][key].values.astype(float) + seeds[1].steps[0][key].values) / 2
        assert each.values == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert any("means over 2 seeds" in message for message in evaluate(mean).messages)
    first, second = (evaluate(mean).table.query("step == @step").drop(columns="step") for step in (0, 1))
    pd.testing.assert_frame_equal(first.reset_index(drop=True), second.reset_index(drop=True))
    other = NullDistributions(comparison, draw_labellings(comparison, 99, seed=9))
    other.add(0, shares[0])
    with pytest.raises(UserError, match="draw one set of labellings for all"):
        average_over_seeds([seeds[0], other])
    fewer = NullDistributions(comparison, labellings)
    fewer.add(0, shares[0])
    with pytest.raises(UserError, match="different steps"):
        average_over_seeds([seeds[0], fewer])


# ---------------------------------------------------------------------- guard rails


def test_values_below_the_noise_floor_and_beyond_the_rank_are_not_tested():
    generator = np.random.default_rng(0)
    # Full 4 x 4 shares: two values far above the floor, two far below.
    each = [np.diag([1.0, 1.0, 1e-9, 1e-9]) * generator.normal(size=(4, 1)) for _ in range(20)]
    comparison = compare(["a"] * 10 + ["b"] * 10, "a", "b")
    labellings = draw_labellings(comparison, 99, seed=0)
    shares = {"w": matrices(*each)}
    result = permutation_test([0], lambda step: shares, comparison, labellings)
    for statistic in ("contrast", "difference"):
        rows = result.table[result.table["statistic"] == statistic].set_index("index")
        assert rows["below_floor"].to_dict() == {1: False, 2: False, 3: True, 4: True}
        assert rows["p"].notna().to_dict() == {1: True, 2: True, 3: False, 4: False}
        assert rows[["p_adjusted", "p_bh", "p_holm", "effect_size"]].loc[3:].isna().all(axis=None)
    assert not result.table.loc[result.table["below_floor"], "significant"].any()
    assert "contrast (2 values" in result.family
    # One row a sample: the share of a group of two has rank two, the contrast of two and three has rank five.
    few = FactoredShares(torch.randn(5, 9).double(), torch.randn(5, 8).double(), np.arange(5), 5, torch.float32)
    comparison = compare(list("aabbb"), "a", "b")
    table = permutation_test([0], lambda step: {"w": few}, comparison, draw_labellings(comparison, 99, seed=0)).table
    assert table.query("statistic == 'difference'")["index"].max() == 2
    assert table.query("statistic == 'contrast'")["index"].max() == 5


def test_what_is_not_finite_is_not_tested_and_the_rest_is():
    good = [np.random.default_rng(i).normal(size=(2, 3)) for i in range(12)]
    bad = [np.full((2, 3), np.nan), *good[1:]]
    comparison = compare(["a", "b"] * 6, "a", "b")
    labellings = draw_labellings(comparison, 50, seed=0)
    shares = {"bad": matrices(*bad), "good": matrices(*good)}
    table = permutation_test([0], lambda step: shares, comparison, labellings).table
    alone = permutation_test([0], lambda step: {"good": shares["good"]}, comparison, labellings).table
    assert table.loc[table["layer"] == "bad", ["p", "p_adjusted"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(table[table["layer"] == "good"].reset_index(drop=True), alone)


def test_where_an_imbalance_remains_there_is_no_p():
    age = np.linspace(20, 60, 40)
    comparison = compare(np.where(np.abs(age - 40) > 10, "a", "b"), "a", "b")
    labellings = draw_conditional_labellings(comparison, {"age": age}, 60, seed=0)
    shares = {"w": matrices(*(np.full((1, 1), v) for v in age))}
    result = permutation_test([0], lambda step: shares, comparison, labellings)
    assert labellings.refused in result.messages
    assert result.table[["p", "p_adjusted", "p_bh", "p_holm"]].isna().all(axis=None)
    assert result.table["estimate"].notna().any()
    assert not result.table["significant"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": ["median"]}, "choose one or more of"),
        ({"statistics": []}, "choose one or more of"),
        ({"statistics": "contrast"}, "choose one or more of"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"cluster_quantile": 1.0}, "cluster_quantile=1.0"),
        ({"steps": []}, "no step was recorded"),
        ({"labels": ["a", "b"] * 11}, "shares of 24 samples, but there are 22 labels"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(run, options, message):
    comparison, labellings, shares = run
    options = {"steps": shares, **options}
    if "labels" in options:
        comparison = compare(options.pop("labels"), "a", "b")
        labellings = draw_labellings(comparison, 19, seed=0)
    with pytest.raises(UserError, match=message):
        permutation_test(options.pop("steps"), shares.get, comparison, labellings, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: this needs an NVIDIA GPU")
def test_a_gpu_gives_the_same_p(run):
    comparison, labellings, shares = run
    on_gpu = {step: {key: moved(each) for key, each in found.items()} for step, found in shares.items()}
    here, there = (permutation_test(each, each.get, comparison, labellings).table for each in (shares, on_gpu))
    for column in ("p", "p_adjusted", "p_bh", "p_holm", "significant", "below_floor"):
        pd.testing.assert_series_equal(here[column], there[column])


def moved(each):
    return FactoredShares(each.activation.cuda(), each.adjoint.cuda(), each.sample, each.samples, each.dtype)


# ---------------------------------------------------------------------- calibration


@pytest.mark.parametrize("first", [12, 18])
def test_labels_at_random_are_found_different_as_often_as_alpha_says(first):
    """A linear autoencoder; the labels know nothing of the data, so five in a hundred runs may be called different."""
    generator = np.random.default_rng(first)
    rejected = {"contrast": 0, "every": 0, "cluster": 0}
    repetitions = 0
    for data in range(5):
        torch.manual_seed(data)
        x = torch.randn(24, 6) * torch.linspace(0.3, 2, 6)
        model = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        shares = {}
        for step in (0, 1):
            shares[step] = sample_shares(model, reconstruction(x), 24)
            for _ in range(30):
                optimizer.zero_grad()
                reconstruction(x)(model).backward()
                optimizer.step()
        for _ in range(40):
            repetitions += 1
            labels = generator.permutation(["a"] * first + ["b"] * (24 - first))
            comparison = compare(labels, "a", "b")
            distributions = NullDistributions(comparison, draw_labellings(comparison, 99, seed=repetitions))
            for step, each in shares.items():
                distributions.add(step, each)
            every = evaluate(distributions)
            rejected["every"] += every.table["significant"].any()
            rejected["cluster"] += (every.clusters["p_adjusted"] <= 0.05).any()
            contrasts = [
                null.standardised(found[layer, "contrast"].values, "greater")[0]
                for found in distributions.steps.values()
                for layer in shares[0]
            ]
            together = np.concatenate(contrasts, axis=1)
            rejected["contrast"] += (null.familywise_p(together[0], null.maxima(together)) <= 0.05).any()
    for count in rejected.values():
        assert stats.binomtest(int(count), repetitions, 0.05).pvalue > 0.01, rejected


def test_a_confounder_is_not_called_a_difference_of_groups():
    """The data depend on age and so does the label; given age, the label says nothing."""
    generator = np.random.default_rng(6)
    rejected, given_age, repetitions = 0, 0, 80
    for repetition in range(repetitions):
        age = generator.normal(size=60)
        labels = np.where(generator.random(60) < 1 / (1 + np.exp(-1.5 * age)), "a", "b")
        values = age + generator.normal(size=60)
        comparison = compare(labels, "a", "b")
        shares = {"w": matrices(*(np.full((1, 1), v) for v in values))}
        plain = draw_labellings(comparison, 39, seed=repetition)
        conditional = draw_conditional_labellings(comparison, {"age": age}, 39, seed=repetition)
        results = [
            permutation_test([0], lambda step, s=shares: s, comparison, each, statistics=["contrast"])
            for each in (plain, conditional)
        ]
        rejected += results[0].table["significant"].item()
        given_age += results[1].table["significant"].item()
    assert rejected > 0.5 * repetitions
    assert stats.binomtest(given_age, repetitions, 0.05, alternative="greater").pvalue > 0.01


def test_a_wrong_model_of_the_label_is_caught_where_squares_show_it_and_not_where_they_do_not():
    """Where the label depends on age in another way than linearly, only an imbalance that is looked for withholds a p."""
    generator = np.random.default_rng(8)
    repetitions = 60
    refused, rejected = {}, {}
    for name, shape in (("square", np.square), ("wave", lambda z: np.sin(3 * z))):
        refused[name] = rejected[name] = 0
        for repetition in range(repetitions):
            age = generator.normal(size=60)
            acting = shape(age) - shape(age).mean()
            labels = np.where(generator.random(60) < 1 / (1 + np.exp(-2 * acting)), "a", "b")
            comparison = compare(labels, "a", "b")
            shares = {"w": matrices(*(np.full((1, 1), v) for v in acting + generator.normal(size=60) / 2))}
            labellings = draw_conditional_labellings(comparison, {"age": age}, 39, seed=repetition)
            result = permutation_test([0], lambda step, s=shares: s, comparison, labellings, statistics=["contrast"])
            refused[name] += bool(labellings.refused)
            rejected[name] += result.table["significant"].item()
    assert refused["square"] > 0.9 * repetitions
    assert rejected["square"] < 0.1 * repetitions
    # The limit of the guard, which docs/calibration.md states with its numbers.
    assert refused["wave"] < 0.5 * repetitions
    assert rejected["wave"] > 0.2 * repetitions


def of_weights(*weights):
    """Shares of one step of layers of the given matrices, one for each sample."""
    return {
        str(i): StackedShares(each.double(), np.ones(len(each), int), torch.float32) for i, each in enumerate(weights)
    }


def forty():
    comparison = compare(["a", "b"] * 20, "a", "b")
    return comparison, draw_labellings(comparison, 19, seed=0)


def test_a_layer_without_a_gradient_spares_the_others():
    """As at the first update of a last layer that begins with zeros, or of an expert that nobody of both groups reaches."""
    comparison = compare(["a", "b"] * 20 + [None] * 3, "a", "b")
    labellings = draw_labellings(comparison, 19, seed=0)
    ones = torch.ones(3, 50, dtype=torch.float64)
    shares = {
        **of_weights(torch.randn(43, 3, 4), torch.zeros(43, 3, 4)),
        "expert": FactoredShares(ones, ones, np.arange(40, 43), 43, torch.float32),
    }
    table = permutation_test([0], lambda _: shares, comparison, labellings).table
    tested = table[table["p"].notna()]
    assert set(tested["layer"]) == {"0"}
    assert tested["statistic"].value_counts()["contrast"] == 3
    assert set(table["layer"]) == {"0", "1", "expert"}


def test_labellings_of_another_comparison_are_refused():
    labels = ["a"] * 10 + ["b"] * 10
    mixed = compare(["a", "b"] * 10, "a", "b")
    for other in (draw_labellings(mixed, 19, 0), draw_labellings(compare(labels[3:], "a", "b"), 19, 0)):
        with pytest.raises(UserError, match="those of another comparison than 'a - b'"):
            NullDistributions(compare(labels, "a", "b"), other)


def test_a_network_that_diverged_is_said_to_have():
    comparison, labellings = forty()
    fine, wrong = torch.randn(2, 40, 3, 4)
    wrong[5] = torch.nan
    runs = []
    for weights in (fine, wrong):
        runs.append(NullDistributions(comparison, labellings))
        runs[-1].add(10, of_weights(fine))
        runs[-1].add(20, of_weights(weights))
    assert not any("finite" in message for message in evaluate(runs[0]).messages)
    for each in (runs[1], average_over_seeds(runs)):
        found = evaluate(each)
        assert any("gradients of 1 layer were not finite at 1 step, first at 20" in said for said in found.messages)
        assert set(found.table[found.table["p"].notna()]["step"]) == {10}


def test_a_checkpoint_gives_the_steps_that_are_asked_for(tmp_path):
    comparison, labellings = forty()
    drawn = {step: of_weights(torch.randn(40, 3, 4)) for step in (0, 10, 20)}
    permutation_test([0, 10, 20], drawn.get, comparison, labellings, checkpoint=tmp_path)
    some = permutation_test([20, 0], drawn.get, comparison, labellings, checkpoint=tmp_path)
    plain = permutation_test([0, 20], drawn.get, comparison, labellings)
    pd.testing.assert_frame_equal(some.table, plain.table)
    (tmp_path / "step-000000010.npz").write_bytes(b"half")
    with pytest.raises(UserError, match=r"step-000000010\.npz cannot be read"):
        permutation_test([0], drawn.get, comparison, labellings, checkpoint=tmp_path)


def test_numbers_and_shares_that_make_no_test_are_refused():
    comparison, labellings = forty()
    distributions = NullDistributions(comparison, labellings)
    with pytest.raises(UserError, match="step='3': give the number"):
        distributions.add("3", of_weights(torch.randn(40, 3, 4)))
    with pytest.raises(UserError, match="no layer's share at step 3"):
        distributions.add(3, {})
    distributions.add(3, of_weights(torch.randn(40, 3, 4)))
    for name in ("comparisons", "singular_values"):
        with pytest.raises(UserError, match=f"{name}=0: give at least 1"):
            evaluate(distributions, **{name: 0})
    with pytest.raises(UserError, match="no seed to average over"):
        average_over_seeds([])
    narrow = NullDistributions(comparison, labellings)
    narrow.add(3, of_weights(torch.randn(40, 2, 4)))
    with pytest.raises(UserError, match="does not have as many singular values for each seed"):
        average_over_seeds([distributions, narrow])
