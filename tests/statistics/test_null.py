"""P-values and corrections against scipy, brute force and their definitions."""

import itertools

import numpy as np
import pytest
from scipy import stats

from autospec.statistics import null


@pytest.fixture
def values():
    """A statistic under 200 labellings: 3 layers of 4 values."""
    return np.random.default_rng(3).gamma(2.0, size=(200, 3, 4)) * 10.0 ** np.arange(-3, 1)


def test_p_counts_the_labellings_that_are_at_least_as_extreme(values):
    for alternative, extreme in (
        ("greater", lambda v: v),
        ("less", lambda v: -v),
        ("two-sided", lambda v: np.abs(v - v.mean(0))),
    ):
        z, tie = null.standardised(values, alternative)
        p = null.p_values(z, tie)
        t = extreme(values)
        for layer, k in np.ndindex(3, 4):
            count = sum(t[b, layer, k] >= t[0, layer, k] for b in range(1, 200))
            assert p[layer, k] == (1 + count) / 200
            assert p[layer, k] >= 1 / 200


def test_standardised_values_have_mean_zero_and_deviation_one(values):
    z, _ = null.standardised(values, "greater")
    assert z.mean(0) == pytest.approx(np.zeros((3, 4)), abs=1e-12)
    assert z.std(0) == pytest.approx(np.ones((3, 4)))


def test_values_that_differ_by_rounding_alone_are_ties():
    exact = np.array([2.0, 2.0, 2.0, 1.0, 3.0, 1.0])[:, None]
    rounded = (exact * (1 + 1e-7 * np.array([1, -1, 0, 1, -1, 0]))[:, None]).astype(np.float32)
    for alternative, expected in (("greater", 4 / 6), ("less", 5 / 6), ("two-sided", 1.0)):
        z, tie = null.standardised(rounded, alternative)
        assert null.p_values(z, tie) == pytest.approx([expected])
        assert null.familywise_p(z[0], null.maxima(z), tie) == pytest.approx([expected])


def test_a_statistic_that_does_not_vary_has_p_one_and_no_effect():
    z, tie = null.standardised(np.full((50, 2), 7.0, np.float32), "two-sided")
    assert null.p_values(z, tie).tolist() == [1.0, 1.0]
    assert all(np.isnan(each).all() for each in null.standardised_effect(np.full((50, 2), 7.0)))


def test_the_familywise_p_is_that_of_the_maximum_by_brute_force(values):
    z, tie = null.standardised(values, "greater")
    largest = null.maxima(z)
    p = null.familywise_p(z[0], largest, tie)
    for layer, k in np.ndindex(3, 4):
        assert p[layer, k] == sum(z[b].max() >= z[0, layer, k] for b in range(200)) / 200
    assert (p >= null.p_values(z, tie)).all()
    alone = null.familywise_p(z[0, :1, :1], null.maxima(z[:, :1, :1]))
    assert alone == null.p_values(z[:, :1, :1])


def test_scaling_comes_before_the_maximum(values):
    z, tie = null.standardised(values, "greater")
    scaled, tie_scaled = null.standardised(values * np.array([1.0, 1e6, 1e-6])[:, None], "greater")
    first, second = (null.familywise_p(a[0], null.maxima(a), t) for a, t in ((z, tie), (scaled, tie_scaled)))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("count", [1, 7, 60])
def test_benjamini_hochberg_and_holm(count):
    p = np.random.default_rng(count).uniform(size=count) ** 2
    assert null.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))
    adjusted = null.holm(p)
    for alpha in (0.01, 0.05, 0.2, 0.5):
        rejected = np.zeros(count, dtype=bool)
        for rank, i in enumerate(np.argsort(p)):  # Holm's procedure, step by step
            if p[i] > alpha / (count - rank):
                break
            rejected[i] = True
        assert ((adjusted <= alpha) == rejected).all()
    assert null.holm(p.reshape(-1, 1)).shape == (count, 1)


def test_it_is_said_when_labellings_are_too_few_for_a_correction():
    assert null.too_few_labellings(1000, 50, 0.05) == ""
    message = null.too_few_labellings(100, 50, 0.05)
    assert "Holm's correction can reject none, Benjamini-Hochberg's only where at least 10 reach it" in message
    assert "999 permutations" in message
    for reach, possible in ((9, False), (10, True)):  # what the message says
        p = np.where(np.arange(50) < reach, 1 / 100, 0.9)
        assert (null.benjamini_hochberg(p) <= 0.05).any() == possible
        assert not (null.holm(p) <= 0.05).any()
    assert (null.holm(np.r_[1 / 1000, np.ones(49)]) <= 0.05)[0]
    assert "none either" in null.too_few_labellings(10, 5, 0.05)


def test_several_comparisons_count_for_the_family_wise_correction_alone():
    message = null.too_few_labellings(200, 180, 0.05, comparisons=3)
    assert "over 540 tests at 0.05, Holm's correction can reject none" in message
    assert "Benjamini-Hochberg's over the 180 of this comparison only where at least 18 reach it" in message
    assert "10799 permutations" in message
    for reach, possible in ((17, False), (18, True)):  # what the message says of one comparison
        p = np.where(np.arange(180) < reach, 1 / 200, 0.9)
        assert (null.benjamini_hochberg(p) <= 0.05).any() == possible
    assert (3 * null.holm(np.r_[1 / 10800, np.ones(179)]) <= 0.05)[0]
    assert "over the 10 of this comparison one alone" in null.too_few_labellings(200, 10, 0.05, comparisons=3)


def test_the_interval_of_the_effect_excludes_zero_exactly_where_the_test_of_equal_tails_rejects():
    generator = np.random.default_rng(0)
    values = generator.gamma(1.5, size=(400, 300))
    estimate, low, high, spread = null.standardised_effect(values)
    others = values[1:]
    assert spread == pytest.approx(others.std(0))
    assert estimate == pytest.approx((values[0] - others.mean(0)) / spread)
    greater, less = ((values >= values[0]).mean(0), (values <= values[0]).mean(0))
    assert ((low > 0) == (greater <= 0.025)).all()
    assert ((high < 0) == (less <= 0.025)).all()
    assert ((low > 0) | (high < 0)).any()
    # An effect moves with the statistic, however large it is.
    shifted = values.copy()
    shifted[0] += 50 * spread
    for moved, end in zip(null.standardised_effect(shifted), (estimate, low, high), strict=False):
        assert moved == pytest.approx(end + 50)


@pytest.mark.parametrize("others", [19, 38, 39, 99, 199])
@pytest.mark.parametrize("effect", [0.0, 2.0, 8.0])
def test_the_interval_holds_the_effect_as_often_as_it_says(effect, others):
    generator = np.random.default_rng(others)
    values = generator.normal(size=(others + 1, 4000))
    values[0] += effect
    found = null.standardised_effect(values)
    # Where the effect is, in the statistic's own units, which no estimated standard deviation blurs.
    low, high = (found.around(0.0, end) + found.estimate * found.spread for end in (found.low, found.high))
    if others < 39:
        assert np.isinf([low, high]).all()
        return
    held = ((low <= effect) & (effect <= high)).mean()
    expected = 1 - 2 * np.floor(0.025 * (others + 1)) / (others + 1)
    assert held == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 4000))


def brute_force_clusters(z, threshold):
    found = []
    for above, run in itertools.groupby(range(len(z)), key=lambda i: z[i] > threshold[i]):
        run = list(run)
        if above:
            found.append((run[0], run[-1], sum(z[i] for i in run)))
    return found


def test_clusters_over_steps():
    z = np.random.default_rng(5).normal(size=(40, 15, 3))
    threshold = null.cluster_threshold(z, 0.7)
    assert threshold == pytest.approx(np.quantile(z, 0.7, axis=0))
    largest = null.largest_cluster(z, threshold)
    for b in range(40):
        masses = []
        for k in range(3):
            expected = brute_force_clusters(z[b, :, k], threshold[:, k])
            found = null.clusters(z[b, :, k], threshold[:, k])
            assert [each[:2] for each in found] == [each[:2] for each in expected]
            assert [each[2] for each in found] == pytest.approx([each[2] for each in expected])
            masses += [each[2] for each in expected]
        assert largest[b] == pytest.approx(max(masses, default=0.0))
