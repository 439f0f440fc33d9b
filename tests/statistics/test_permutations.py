"""Labellings: distinct, within strata, whole subjects, seeded; and conditional on confounders."""

import itertools
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from autospec.errors import UserError
from autospec.statistics.permutations import (
    PENALTY,
    _exchanged,
    balance_of,
    compare,
    draw_conditional_labellings,
    draw_labellings,
    group_sizes,
    propensity_logits,
)

LABELS = ["SZ", "HC", "HC", "SZ", None, "HC", "SZ", "other", "HC", "HC"]
SITES = ["x", "x", "y", "y", "x", "y", "y", "x", "x", "y"]


def big(first=30, second=20):
    return compare(["a"] * first + ["b"] * second, "a", "b")


def test_a_comparison_takes_its_two_groups_alone():
    comparison = compare(LABELS, "SZ", "HC")
    assert comparison.unit.tolist() == [0, 1, 2, 3, -1, 4, 5, -1, 6, 7]
    assert comparison.in_first.tolist() == [True, False, False, True, False, True, False, False]
    assert comparison.name == "SZ - HC"
    assert "the group 'SZ' has only 3 subjects" in comparison.warnings[0]
    assert not big().warnings


def test_the_number_of_distinct_labellings_is_that_of_an_enumeration():
    for strata, expected in ((None, math.comb(8, 3)), ({"site": SITES}, math.comb(3, 1) * math.comb(5, 2))):
        comparison = compare(LABELS, "SZ", "HC", strata=strata)
        assert comparison.distinct() == expected
        labellings = draw_labellings(comparison, 10_000, seed=0)
        assert labellings.enumerated
        assert len(labellings) == expected == len(np.unique(labellings.in_first, axis=0))
        assert f"only {expected} labellings are possible" in labellings.message
        for stratum in range(comparison.stratum.max() + 1):
            inside = comparison.stratum == stratum
            assert (labellings.in_first[:, inside].sum(1) == comparison.in_first[inside].sum()).all()
        assert (labellings.in_first[0] == comparison.in_first).all()
    assert draw_labellings(comparison, expected - 1, seed=0).message == f"all {expected} possible labellings were used"
    assert not draw_labellings(comparison, expected - 2, seed=0).enumerated
    assert big(100, 100).distinct() == math.comb(200, 100)


def test_drawn_labellings_are_uniform_within_strata():
    comparison = compare(["a", "a", "b", "b", "a", "b", "b"], "a", "b", strata={"sex": list("mmmmfff")})
    every = 6 * 3
    counts = np.zeros(2**7)
    labellings = np.concatenate([draw_labellings(comparison, every - 2, seed).in_first[1:] for seed in range(400)])
    np.add.at(counts, labellings @ (1 << np.arange(7)), 1)
    counts = counts[counts > 0]
    assert len(counts) == every
    assert stats.chisquare(counts).pvalue > 0.001


def test_labelling_b_depends_on_the_seed_and_b_alone():
    few, many = draw_labellings(big(), 10, seed=4), draw_labellings(big(), 25, seed=4)
    assert (few.in_first == many.in_first[:11]).all()
    assert (few.in_first[1:] != draw_labellings(big(), 10, seed=5).in_first[1:]).any(1).all()
    assert few.digest == draw_labellings(big(), 10, seed=4).digest != many.digest
    # The very labellings, so that another machine or version that draws others is noticed.
    assert np.flatnonzero(draw_labellings(big(5, 5), 1, seed=0).in_first[1]).tolist() == [1, 4, 5, 7, 9]


def test_subjects_move_with_all_their_samples_and_the_order_of_samples_decides_nothing():
    subjects = np.array(["s3", "s1", "s2", "s1", "s4", "s2", "s5", "s3", "s6", "s7", "s8"])
    label_of = dict(zip(np.unique(subjects), "abbabaab", strict=True))
    labels = np.array([label_of[s] for s in subjects])
    comparison = compare(labels, "a", "b", subjects=subjects)
    labellings = draw_labellings(comparison, 30, seed=1)
    per_sample = labellings.in_first[:, comparison.unit]
    for subject in label_of:
        assert (per_sample[:, subjects == subject].std(1) == 0).all()
    order = np.random.default_rng(0).permutation(len(subjects))
    other = compare(labels[order], "a", "b", subjects=subjects[order])
    again = draw_labellings(other, 30, seed=1).in_first[:, other.unit]
    assert (again == per_sample[:, order]).all()
    first, second = group_sizes(labellings, comparison.sizes)
    assert (first == per_sample.sum(1)).all()
    assert (first + second == len(subjects)).all()


def test_subjects_with_unequal_numbers_of_samples_exchange_no_labels():
    label_of = "aaaabbbbab"
    scans = [1, 1, 2, 2, 1, 2, 2, 1, 3, 4]
    subjects, labels = np.repeat(np.arange(10).astype(str), scans), np.repeat(list(label_of), scans)
    comparison = compare(labels, "a", "b", subjects=subjects)
    assert comparison.distinct() == math.comb(4, 2) ** 2
    moved = draw_labellings(comparison, 40, seed=0).in_first
    of_size = np.stack([moved[:, comparison.sizes == size].sum(1) for size in (1, 2, 3, 4)], axis=1)
    assert (of_size == [2, 2, 1, 0]).all()
    assert "subjects have 1 to 4 samples" in comparison.warnings[-1]
    assert "2 of 10 had nobody" in comparison.warnings[-1]
    # A stratum of the user's own divides each of them further.
    sites = np.repeat(list("xxxyxxyxxx"), scans)
    assert compare(labels, "a", "b", subjects=subjects, strata={"site": sites}).distinct() == math.comb(4, 2) * 2 * 2
    once_or_thrice = np.repeat([1, 3], 5)
    with pytest.raises(UserError, match=r"no two subjects of 'a' and 'b' have as many samples.*one scan"):
        compare(
            np.repeat(["a", "b"], 5).repeat(once_or_thrice),
            "a",
            "b",
            subjects=np.arange(10).astype(str).repeat(once_or_thrice),
        )


COLUMNS_THAT_DO_NOT_FIT = {
    "labels as a column": ({"labels": np.array([["a"], ["b"]] * 4)}, r"labels has the shape \(8, 1\): give a list"),
    "labels as a text": ({"labels": "abab"}, r"labels has the shape \(\): give a list"),
    "a stratum without a name": ({"strata": pd.Series(["x", "y"] * 4)}, "strata is to hold columns by name"),
    "a stratum that is not there": ({"strata": {"site": None}}, "strata is to hold columns by name"),
    "a stratum that is too short": ({"strata": {"site": ["x"] * 7}}, "'site' has 7 entries, but there are 8 labels"),
}


@pytest.mark.parametrize("case", COLUMNS_THAT_DO_NOT_FIT)
def test_columns_that_do_not_fit_are_refused(case):
    given, said = COLUMNS_THAT_DO_NOT_FIT[case]
    with pytest.raises(UserError, match=said):
        compare(**{"labels": ["a", "b"] * 4, "first": "a", "second": "b", **given})


def test_strata_may_be_a_table():
    site = ["x", "x", "y", "y"] * 4
    table, columns = (
        compare(["a", "b"] * 8, "a", "b", strata=each) for each in (pd.DataFrame({"site": site}), {"site": site})
    )
    assert table.stratum.tolist() == columns.stratum.tolist()
    assert len(set(table.stratum)) == 2


def test_the_level_holds_where_one_group_was_scanned_more_often():
    rejected = Counter()
    for study in range(400):
        generator = np.random.default_rng(study)
        often = np.arange(24) % 12 < np.repeat([2, 10], 12)
        subjects, labels = (np.repeat(each, 1 + 3 * often) for each in (np.arange(24), ["a"] * 12 + ["b"] * 12))
        x = 0.2 * generator.normal(size=(24, 6))[subjects] + generator.normal(size=(len(subjects), 6))
        comparison = compare(labels, "a", "b", subjects=subjects)
        for name, each in {
            "as they are": comparison,
            "all alike": replace(comparison, stratum=np.zeros(24, dtype=np.int64)),
        }.items():
            drawn = draw_labellings(each, 99, study)
            of_sample = drawn.in_first[:, comparison.unit]
            first, second = group_sizes(drawn, comparison.sizes)
            means = of_sample @ x / first[:, None] - ~of_sample @ x / second[:, None]
            lengths = np.linalg.norm(means, axis=1)
            rejected[name] += (lengths >= lengths[0]).mean() <= 0.05
    assert stats.binomtest(rejected["as they are"], 400, 0.05, alternative="greater").pvalue > 0.01
    assert stats.binomtest(rejected["all alike"], 400, 0.05, alternative="greater").pvalue < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second": "HCC"}, "names the group 'HCC', but the labels are"),
        ({"second": "other"}, "the group 'other' has 1 subject, fewer than the 2"),
        ({"second": "SZ"}, "the comparison of 'SZ' with itself"),
        ({"minimum": 4}, "the group 'SZ' has 3 subjects, fewer than the 4"),
        ({"subjects": list("abcd")}, "'subjects' has 4 entries, but there are 10 labels"),
        ({"subjects": list("aabcdefghi")}, "the subject 'a' has more than one label"),
        ({"subjects": [None, *"abcdefghi"]}, "names no subject for some samples"),
        ({"strata": {"site": [None, *SITES[1:]]}}, "the stratum 'site' is missing"),
        ({"strata": {"site": list(range(10))}}, "no stratum holds subjects of both"),
        (
            {"subjects": list("abbdefghbj"), "strata": {"site": SITES}},
            "the subject 'b' has more than one value of 'site'",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        compare(LABELS, **{"first": "SZ", "second": "HC", **options})


def test_equal_labels_and_no_permutations_are_refused():
    with pytest.raises(UserError, match=r"names the group 'b', but the labels are \['a'\]"):
        compare(["a"] * 8, "a", "b")
    with pytest.raises(UserError, match="permutations=0"):
        draw_labellings(big(), 0, seed=0)
    for numbers in ((99.0, 0), (99, None)):
        with pytest.raises(UserError, match="both whole"):
            draw_labellings(big(), *numbers)


# ---------------------------------------------------------------------- confounders


@pytest.fixture
def confounded():
    """Sixty subjects whose label depends on age."""
    generator = np.random.default_rng(8)
    age = generator.normal(40, 10, size=60)
    labels = np.where(generator.random(60) < 1 / (1 + np.exp(-(age - 40) / 8)), "a", "b")
    return compare(labels, "a", "b"), {"age": age, "motion": generator.gamma(2.0, size=60)}


def test_the_propensity_model_minimises_its_penalised_loss(confounded):
    comparison, columns = confounded
    x = np.column_stack(list(columns.values()))
    design = np.column_stack([np.ones(60), (x - x.mean(0)) / x.std(0)])
    sign = np.where(comparison.in_first, 1, -1)

    def loss(beta):
        return np.logaddexp(0, -sign * (design @ beta)).sum() + PENALTY / 2 * np.square(beta[1:]).sum()

    found = optimize.minimize(loss, np.zeros(3), tol=1e-12)
    assert propensity_logits(x, comparison.in_first) == pytest.approx(design @ found.x, abs=1e-4)


def test_the_model_is_found_for_groups_that_a_confounder_separates():
    x = np.arange(20.0)[:, None]
    logits = propensity_logits(x, x[:, 0] > 9, penalty=1e-3)
    assert np.isfinite(logits).all()
    assert ((logits > 0) == (x[:, 0] > 9)).all()


@pytest.mark.parametrize("stratum", [np.zeros(6, int), np.array([0, 1, 0, 1, 0, 1])])
def test_exchanges_sample_the_distribution_that_the_model_implies(stratum):
    logits = np.array([0.3, -1.0, 1.2, 0.5, -0.4, 0.8])
    observed = np.array([True, True, False, False, True, False])
    odds = {}
    for row in itertools.product([False, True], repeat=6):
        row = np.array(row)
        if all(row[stratum == s].sum() == observed[stratum == s].sum() for s in np.unique(stratum)):
            odds[int(row @ (1 << np.arange(6)))] = math.exp(logits[row].sum())
    label, of_labels = observed.astype(int), np.column_stack([np.zeros(6), logits])
    drawn = [observed[_exchanged(label, of_labels, stratum, np.random.default_rng([3, b]))] for b in range(3000)]
    counts = np.bincount(np.stack(drawn) @ (1 << np.arange(6)), minlength=64)
    assert counts[list(odds)].sum() == 3000
    expected = np.array(list(odds.values())) / sum(odds.values()) * 3000
    assert stats.chisquare(counts[list(odds)], expected).pvalue > 0.001


def test_exchanges_of_three_labels_sample_the_distribution_that_the_model_implies():
    generator = np.random.default_rng(1)
    logits = np.column_stack([np.zeros(5), generator.normal(size=(5, 2))])
    label = np.array([0, 1, 2, 0, 1])
    odds = {row: math.exp(logits[range(5), row].sum()) for row in set(itertools.permutations(label.tolist()))}
    drawn = Counter(
        tuple(label[_exchanged(label, logits, np.zeros(5, int), np.random.default_rng([3, b]))].tolist())
        for b in range(3000)
    )
    expected = np.array(list(odds.values())) / sum(odds.values()) * 3000
    assert stats.chisquare([drawn[row] for row in odds], expected).pvalue > 0.001


def test_conditional_labellings_keep_the_balance_that_plain_ones_destroy(confounded):
    comparison, columns = confounded
    labellings = draw_conditional_labellings(comparison, columns, 300, seed=2)
    assert not labellings.refused
    row = labellings.balance.set_index("confounder").loc["age"]
    a, b = (columns["age"][comparison.in_first == side] for side in (True, False))
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
    assert row["observed"] == pytest.approx((a.mean() - b.mean()) / pooled)
    assert row["observed"] > 0.5
    assert row["low"] < row["observed"] < row["high"]
    assert (labellings.in_first.sum(1) == comparison.in_first.sum()).all()
    assert (labellings.in_first[0] == comparison.in_first).all()
    again = draw_conditional_labellings(comparison, columns, 300, seed=2)
    assert again.digest == labellings.digest
    plain = draw_labellings(comparison, 300, seed=2)
    balance = balance_of(plain.in_first, pd.DataFrame(columns)).set_index("confounder")
    assert balance.loc["age", "imbalanced"]
    assert balance.loc["age", "median"] == pytest.approx(0, abs=0.1)


def test_where_the_model_does_not_describe_the_confounder_no_p_is_given():
    # The young and the old against those in between, which a model that is linear in age cannot say.
    age = np.linspace(20, 60, 60)
    odds = np.exp((np.abs(age - 40) - 10) / 4)
    labels = np.where(np.random.default_rng(0).random(60) < odds / (1 + odds), "a", "b")
    comparison = compare(labels, "a", "b")
    labellings = draw_conditional_labellings(comparison, {"age": age}, 100, seed=0)
    assert "the groups differ in 'age squared' by" in labellings.refused
    assert labellings.balance.set_index("confounder")["imbalanced"].to_dict() == {"age": False, "age squared": True}
    known = draw_conditional_labellings(comparison, {"age": age, "distance": np.square(age - 40)}, 100, seed=0)
    assert not known.balance.set_index("confounder").loc["age squared", "imbalanced"]


def test_a_confounder_that_is_the_label_leaves_nothing_to_tell():
    labels = ["a", "b"] * 15
    labellings = draw_conditional_labellings(compare(labels, "a", "b"), {"scanner": np.array([0, 1] * 15)}, 99, seed=0)
    assert re.search(r"each group has one value of 'scanner' of its own, .*no p", labellings.refused)
    balance = labellings.balance.set_index("confounder")
    assert balance["imbalanced"].to_dict() == {"scanner": True, "scanner squared": False}
    assert np.isfinite(balance[["observed", "low", "median", "high"]]).all(axis=None)


def test_labels_that_are_numbers_are_named_as_they_are():
    assert compare([0, 1] * 6, 0, 1).name == compare(["0", "1"] * 6, "0", "1").name == "0 - 1"


@pytest.mark.parametrize(
    ("confounders", "message"),
    [
        ({}, "no confounder was given"),
        ({"age": np.ones(60)}, "the confounder 'age' is the same for all"),
        ({"age": [np.nan, *range(59)]}, "the confounder 'age' is missing"),
        ({"age": ["old"] * 60}, "the confounder 'age' is not a number"),
        ({"age": np.zeros((60, 2))}, r"the confounder 'age' has the shape \(60, 2\): give one number"),
        ({"age": np.arange(5)}, "the confounder 'age' has 5 entries for 60 samples"),
    ],
)
def test_bad_confounders_are_refused(confounded, confounders, message):
    with pytest.raises(UserError, match=message):
        draw_conditional_labellings(confounded[0], confounders, 10, seed=0)
