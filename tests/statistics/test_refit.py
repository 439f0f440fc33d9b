"""Refits: whose labels are permuted and how, the trainings, p by counting, parts and seeds, bad input."""

import json
from collections import Counter
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import stats

from autospec import specs
from autospec.config import parse_config
from autospec.datasets.labelled import open_labelled, samples_with
from autospec.errors import UserError
from autospec.statistics.covariates import matched_samples
from autospec.statistics.null import holm
from autospec.statistics.refit import average, build_refit, evaluate_refits, joined
from autospec.statistics.refit_part import (
    build_refit_part,
    checks_of,
    draw_conditional_relabellings,
    draw_relabellings,
    retrained,
    statistics_of,
    strata_of,
    with_labels_of,
)
from autospec.statistics.table import read_confounds, read_tests
from autospec.storage import open_store
from autospec.training.prepare import prepare
from autospec.training.snapshots import open_snapshots
from tests.statistics.people import contrast_by_autograd, settings_of, train, write_people
from tests.study import SETTINGS

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These small networks are not worth several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A data set with a clear difference of diagnoses."""
    return write_people(tmp_path_factory.mktemp("people") / "people.zarr.zip", effect=2.0)


def settings(first: int, last: int, refits: int, run: dict | None = None, **changed) -> dict:
    """Settings of a part."""
    part = {
        "first": first,
        "last": last,
        "refits": refits,
        "seed": 3,
        "within": [],
        "conditional_on": [],
        "matched": False,
        "minimum_group_size": 3,
    }
    return {"run": run or settings_of("classifier"), **part, **changed}


def refits(path) -> xr.Dataset:
    """What a part holds."""
    return open_store(path, "refits").to_dataset()


# ---------------------------------------------------------------------- labels


def test_labels_are_permuted_within_strata_and_each_refit_depends_on_its_number_alone():
    labels, strata = np.array([0, 1] * 20), np.repeat([0, 1, 2, 3], 10)
    many, few = (draw_relabellings(labels, strata, count, seed=5).giver for count in (30, 7))
    np.testing.assert_array_equal(many[:8], few)
    np.testing.assert_array_equal(many[0], np.arange(40))
    for giver in many:
        assert sorted(giver) == list(range(40))
        np.testing.assert_array_equal(strata[giver], strata)
    assert len({tuple(labels[giver]) for giver in many}) > 25
    other = draw_relabellings(labels, strata, 7, seed=6).giver
    assert (other[1:] != few[1:]).any()


def test_where_fewer_labellings_are_possible_all_are_used_once():
    labels, strata = np.array([0, 0, 1, 2, 1, 1]), np.array([0, 0, 0, 0, 1, 1])
    found = draw_relabellings(labels, strata, 99, seed=0)
    assert found.enumerated
    assert "only 12 labellings are possible, no more than the 99" in found.message
    expected = {(*first, 1, 1) for first in set(permutations([0, 0, 1, 2]))}
    assert len(expected) == 12
    assert Counter(tuple(labels[giver]) for giver in found.giver) == Counter(expected)
    assert all(sorted(giver) == list(range(6)) for giver in found.giver)
    np.testing.assert_array_equal(labels[found.giver[0]], labels)


def test_equal_labels_are_a_mistake():
    with pytest.raises(UserError, match="all labels are equal within each stratum"):
        draw_relabellings(np.array([0, 0, 1]), np.array([0, 0, 1]), 19, 0)


def test_target_and_groups_move_together_by_subject_within_sex_where_that_is_crossed(tmp_path):
    dataset = write_people(tmp_path / "people.zarr.zip", scans=2)
    prepared = prepare(settings_of("classifier", ["diagnosis x sex", "site"]), str(dataset), CPU)
    subjects = np.array(prepared.training.subjects)
    names, unit = np.unique(subjects, return_inverse=True)
    assert len(subjects) == 2 * len(names)
    strata, columns = strata_of(prepared, str(dataset), ["site"], unit)
    assert columns == ["site", "sex"]
    assert len(set(strata)) == 4
    giver = draw_relabellings(prepared.target.numpy()[np.unique(unit, return_index=True)[1]], strata, 19, 0).giver[4]
    moved = with_labels_of(prepared, giver, unit)
    target = np.array(moved.classes)[moved.target.numpy()]
    assert target.tolist() == moved.labels["diagnosis"]
    assert torch.equal(moved.answer, moved.target)
    assert moved.labels["sex"] == prepared.labels["sex"]
    assert moved.labels["site"] == prepared.labels["site"]
    assert target.tolist() != prepared.labels["diagnosis"]
    assert (target[::2] == target[1::2]).all()  # both samples of a subject
    assert Counter(target) == Counter(prepared.labels["diagnosis"])
    assert moved.x is prepared.x


def test_samples_of_one_subject_with_different_labels_are_a_mistake(tmp_path):
    from autospec.datasets.labelled import labelled, write_labelled

    x = np.random.default_rng(0).normal(size=(20, 8))
    target = ["SZ", "HC", "SZ", "HC", *["SZ", "HC"] * 8]
    subjects = ["a", "a", *(f"s{i:02d}" for i in range(18))]
    write_labelled(
        labelled(x, ("region",), [str(i) for i in range(20)], target, {}, {}, subjects), tmp_path / "people.zarr.zip"
    )
    run = settings_of("classifier", held_out=0.0)
    with pytest.raises(UserError, match="the samples of the subject 'a' differ in target or groups"):
        build_refit_part(settings(0, 5, 19, run), str(tmp_path / "people.zarr.zip"), str(tmp_path / "part"), "cpu")


def test_targets_are_drawn_as_the_confounder_makes_them_likely_with_the_balance_reported():
    generator = np.random.default_rng(4)
    motion = generator.normal(size=120)
    target = generator.permuted(np.repeat([0, 1, 2], 40))
    order = np.argsort(motion + 4 * (generator.random(120) - 0.5))
    target[order] = np.sort(target)  # the more motion, the higher the target's number
    confounders, strata = pd.DataFrame({"motion": motion}), np.arange(120) % 2
    found = draw_conditional_relabellings(target, ["a", "b", "c"], strata, confounders, 200, seed=1)
    assert not found.enumerated
    np.testing.assert_array_equal(found.giver[0], np.arange(120))
    assert all(sorted(giver) == list(range(120)) for giver in found.giver)
    assert (strata[found.giver] == strata).all()
    assert {each["comparison"] for each in found.balance} == {"a - b", "a - c", "b - c"}
    of_motion = {each["comparison"]: each for each in found.balance if each["confounder"] == "motion"}
    for (a, b), name in (((0, 1), "a - b"), ((0, 2), "a - c"), ((1, 2), "b - c")):
        one, two = motion[target == a], motion[target == b]
        pooled = np.sqrt((one.var() * len(one) + two.var() * len(two)) / (len(one) + len(two) - 2))
        assert of_motion[name]["observed"] == pytest.approx((one.mean() - two.mean()) / pooled)
        assert of_motion[name]["low"] < of_motion[name]["observed"] < of_motion[name]["high"]
    assert of_motion["a - c"]["median"] < -0.8  # plain permutations have none
    assert not found.imbalance
    few = draw_conditional_relabellings(target, ["a", "b", "c"], strata, confounders, 7, seed=1).giver
    np.testing.assert_array_equal(found.giver[:8], few)


def test_where_the_model_of_the_target_is_wrong_no_p_is_given(tmp_path):
    from autospec.datasets.labelled import labelled, write_labelled

    generator = np.random.default_rng(0)
    age = generator.normal(size=60)
    target = np.where(np.abs(age) > np.median(np.abs(age)), "SZ", "HC").tolist()  # no line, but a hill
    ids = [f"{i:02d}" for i in range(60)]
    x = generator.normal(size=(60, 8))
    write_labelled(
        labelled(x, ("region",), ids, target, {}, {}, covariates={"age": age.tolist()}), tmp_path / "people.zarr.zip"
    )
    run = settings_of("classifier", held_out=0.0)
    part = settings(0, 19, 19, run, conditional_on=["age"])
    build_refit_part(part, str(tmp_path / "people.zarr.zip"), str(tmp_path / "part.zarr.zip"), "cpu")
    stage = {"name": "people/net", "alpha": 0.05, "refits": 19}
    paths = [str(tmp_path / f"refit.{ending}") for ending in ("tsv", "json", "confounds.tsv")]
    build_refit(stage, [[str(tmp_path / "part.zarr.zip")]], *paths)
    table, words = read_tests(paths[0]), json.loads((tmp_path / "refit.json").read_text())
    assert len(table) > 0
    assert table["p"].isna().all()
    assert not table["significant"].any()
    assert "conditionally on age by a logistic model of the target" in words["method"]
    assert any("'age squared'" in message and "no p is given" in message for message in words["messages"])
    assert [each["imbalanced"] for each in words["balance"]] == [False, True]
    assert words["family"].startswith("0 tests: a confounder differs, so no p is given, over 1 comparison;")
    with pytest.raises(UserError, match=r"statistics\.conditional_on names 'iq'"):
        build_refit_part({**part, "conditional_on": ["iq"]}, str(tmp_path / "people.zarr.zip"), "part", "cpu")


# ---------------------------------------------------------------------- trainings


def test_a_refit_is_the_whole_training_again_measured_as_defined(people, tmp_path):
    run = settings_of("classifier")
    prepared = train(run, people, tmp_path / "w.pt")
    build_refit_part(settings(0, 3, 19), str(people), str(tmp_path / "part.zarr.zip"), "cpu")
    found = refits(tmp_path / "part.zarr.zip")
    assert found["refit"].values.tolist() == [0, 1, 2, 3]
    labels = np.array(prepared.labels["target"])
    for step in (0, 2, 5):
        brute = contrast_by_autograd(
            prepared, open_snapshots(tmp_path / "w.pt").weights(step), labels == "HC", labels == "SZ"
        )
        for layer, values in brute.items():
            part = found.isel(test=(found["layer"] == layer) & (found["step"] == step)).isel(refit=0)
            contrast = part["value"].values[part["statistic"].values == "contrast"]
            np.testing.assert_allclose(contrast, values, rtol=2e-5, atol=1e-6 * values[0])
            distance = part["value"].values[part["statistic"].values == "distance"]
            np.testing.assert_allclose(distance, np.sqrt((values**2).sum()), rtol=2e-5)
    # Labels that were permuted before training give other weights, so other shares of the same people.
    at_the_end = found.isel(test=(found["step"] == 5) & (found["statistic"] == "distance"))["value"].values
    assert len({tuple(row) for row in at_the_end}) == 4


def test_a_refit_is_the_same_whatever_was_trained_before_it(people):
    prepared = prepare(settings_of("classifier"), str(people), CPU)
    unit = np.arange(len(prepared.training))
    giver = np.random.default_rng(0).permutation(len(unit))

    def once() -> np.ndarray:
        return statistics_of(retrained(with_labels_of(prepared, giver, unit), [0, 5], 6), [("HC", "SZ")])["value"]

    first = once()
    retrained(with_labels_of(prepared, unit, unit), [0, 5], 6)
    np.testing.assert_array_equal(first, once())


def test_parts_together_are_the_refits_of_one_job(people, tmp_path):
    for name, first, last in (("whole", 0, 5), ("0", 0, 2), ("1", 3, 5), ("2", 6, 8)):
        build_refit_part(settings(first, last, 5), str(people), str(tmp_path / f"{name}.zarr.zip"), "cpu")
    parts = [refits(tmp_path / f"{name}.zarr.zip") for name in ("1", "0", "2")]
    assert parts[2].sizes["refit"] == 0
    xr.testing.assert_identical(joined(parts), refits(tmp_path / "whole.zarr.zip"))
    with pytest.raises(UserError, match=r"hold the refits \[3, 4, 5\], but 0 to 5 are needed"):
        joined(parts[:1])
    assert (tmp_path / "whole.zarr.zip").read_bytes() != (tmp_path / "0.zarr.zip").read_bytes()


def test_subjects_with_unequal_numbers_of_scans_exchange_no_labels(tmp_path):
    scans = np.where(np.arange(20) % 3 == 0, 3, 1)
    dataset = str(write_people(tmp_path / "people.zarr.zip", 20, scans=scans))
    run = settings_of("classifier", held_out=0.0)
    run["hidden"] = [32]  # wider than groups have samples, whose number limits the rank
    prepared = prepare(run, dataset, torch.device("cpu"))
    unit = np.unique(prepared.training.subjects, return_inverse=True)[1]
    strata, names = strata_of(prepared, dataset, [], unit)
    assert names == []
    np.testing.assert_array_equal(strata, (np.bincount(unit) > 1).astype(int))
    part = tmp_path / "part.zarr.zip"
    build_refit_part(settings(0, 9, 9, run), dataset, str(part), "cpu")
    assert "subjects have 1 to 3 samples" in refits(part).attrs["message"]
    patients_more = str(write_people(tmp_path / "more.zarr.zip", 20, scans=np.where(np.arange(20) % 2 == 0, 3, 1)))
    with pytest.raises(UserError, match="one scan of each subject"):
        build_refit_part(settings(0, 9, 9, run), patients_more, str(tmp_path / "no.zarr.zip"), "cpu")


def test_the_stage_finds_a_difference_that_the_network_learned(people, tmp_path):
    build_refit_part(settings(0, 39, 39), str(people), str(tmp_path / "part.zarr.zip"), "cpu")
    table, described = tmp_path / "refit.tsv", tmp_path / "refit.json"
    stage = {"name": "people/net", "alpha": 0.05, "refits": 39}
    build_refit(stage, [[str(tmp_path / "part.zarr.zip")]], str(table), str(described), str(tmp_path / "confounds.tsv"))
    found, words = read_tests(table), json.loads(described.read_text())
    assert found["test"].unique().tolist() == ["refit"]
    assert found["comparison"].unique().tolist() == ["HC - SZ"]
    assert set(found["statistic"]) == {"contrast", "difference", "cosine", "effective_rank", "distance"}
    # Here the shares of two classes oppose each other less, the more there is to learn.
    cosine = found.query("statistic == 'cosine' and layer == 'encoder.0.weight'")
    assert cosine["significant"].all()
    assert (cosine["effect_low"] > 0).all()
    assert found["p"].min() == pytest.approx(1 / 40)
    assert "repeated 39 times" in words["method"]
    assert "3 updates (0 to 5)" in words["method"]
    assert words["family"].startswith(f"{found['p'].notna().sum()} tests: contrast (")
    assert words["refused"] == {}
    assert any("no p is below 0.025" in message for message in words["messages"])


def test_pairs_within_a_target_and_small_groups_are_left_to_others(people, tmp_path):
    run = settings_of("classifier", ["diagnosis x sex"])
    build_refit_part(settings(0, 1, 19, run), str(people), str(tmp_path / "part.zarr.zip"), "cpu")
    found = refits(tmp_path / "part.zarr.zip")
    assert found.attrs["strata"] == ["sex"]
    refused = dict(found.attrs["refused"])
    assert "see the permutation test" in refused["sex=F - sex=M"]
    assert set(found["comparison"].values) == {
        "diagnosis=HC - diagnosis=SZ",
        *(f"diagnosis=HC & sex={a} - diagnosis=SZ & sex={b}" for a in "FM" for b in "FM"),
    }
    few = settings(0, 1, 19, minimum_group_size=30)
    build_refit_part(few, str(people), str(tmp_path / "few.zarr.zip"), "cpu")
    stage = {"name": "people/net", "alpha": 0.05, "refits": 19}
    paths = [str(tmp_path / f"refit.{ending}") for ending in ("tsv", "json", "confounds.tsv")]
    build_refit(stage, [[str(tmp_path / "few.zarr.zip")]], *paths)
    assert read_tests(paths[0]).empty
    assert (
        "fewer than the 30 that a test needs" in json.loads((tmp_path / "refit.json").read_text())["refused"]["HC - SZ"]
    )


# ---------------------------------------------------------------------- is it just motion?


def test_what_refits_say_beside_a_comparison_of_diagnoses(people, tmp_path):
    run = settings_of("classifier")
    prepared = train(run, people, tmp_path / "w.pt")
    parts = {"0": (0, 25, False), "matched-0": (0, 12, True), "matched-1": (13, 25, True)}
    for name, (first, last, matched) in parts.items():
        part = settings(first, last, 25, run, matched=matched)
        build_refit_part(part, str(people), str(tmp_path / f"{name}.zarr.zip"), "cpu")
    files = [str(tmp_path / f"{name}.zarr.zip") for name in parts]
    found = joined([refits(file) for file in files])
    stage = {"name": "people/net", "alpha": 0.05, "refits": 25}
    paths = [str(tmp_path / f"refit.{ending}") for ending in ("tsv", "json", "confounds.tsv")]
    build_refit(stage, [files], *paths)
    rows = read_confounds(paths[2])
    assert list(rows["check"].unique()) == ["labels", "matched", "shuffled"]
    whole = rows[rows["layer"] == ""].set_index("check")
    # The checks are no part of the run's own table.
    main = read_tests(paths[0])
    assert not main.duplicated(["layer", "statistic", "step", "index", "comparison"]).any()

    # Labels: the maximum over the contrast and the distance alone, by hand.
    names, checks = found["statistic"].values, found["check"].values
    here = (checks == "") & np.isin(names, ["contrast", "distance"])
    values = found["value"].values[:, here].astype(float)
    kept = found["above"].values[:, here].mean(0) >= 0.5
    z = np.abs(values[:, kept] - values[:, kept].mean(0)) / values[:, kept].std(0)
    assert whole.loc["labels", "p"] == pytest.approx((z.max(1) >= z[0].max() - 1e-6).mean(), rel=1e-5)
    # The shuffled twin is a refit, among the others with permuted labels: the run itself has no part in it.
    twin = int(whole.loc["shuffled", "note"].split()[1])
    values = values[1:][:, kept]
    z = np.abs(values - values.mean(0)) / values.std(0)
    assert whole.loc["shuffled", "p"] == pytest.approx((z.max(1) >= z[twin - 1].max() - 1e-6).mean(), rel=1e-5)

    # Matched: the run's weights, and the contrast of the matched subjects by the definition.
    labels, trained = np.array(prepared.labels["target"]), list(prepared.training.ids)
    samples = samples_with(open_labelled(people), set(trained))
    partner = matched_samples(labels.astype(object), ("HC", "SZ"), samples, list(prepared.training.subjects))
    assert whole.loc["matched", "n_a"] == whole.loc["matched", "n_b"] == partner.max() + 1 < (labels == "HC").sum()
    brute = contrast_by_autograd(
        prepared,
        open_snapshots(tmp_path / "w.pt").weights(5),
        (labels == "HC") & (partner >= 0),
        (labels == "SZ") & (partner >= 0),
    )
    for layer, right in brute.items():
        here = (checks == "matched") & (found["layer"].values == layer) & (found["step"].values == 5)
        mine = found["value"].values[0, here & (names == "contrast")]
        np.testing.assert_allclose(mine, right, rtol=2e-5, atol=1e-6 * right[0])
    assert "exchanged within pairs before training" in whole.loc["matched", "note"]

    # Without the matched there are the same tests, and no such table.
    build_refit(stage, [files[:1]], *paths)
    pd.testing.assert_frame_equal(read_tests(paths[0]), main)
    assert read_confounds(paths[2]).empty


def test_among_the_matched_only_partners_exchange_labels_and_everybody_else_keeps_them(people):
    run = settings_of("classifier")
    prepared = prepare(run, str(people), CPU)
    unit = np.unique(np.array(prepared.training.subjects), return_inverse=True)[1]
    labels = prepared.target.numpy()[np.unique(unit, return_index=True)[1]]
    strata = np.zeros(len(labels), dtype=int)
    part = settings(0, 30, 30, run, matched=True)
    (matched,) = checks_of(prepared, str(people), part, [("HC", "SZ")], unit, labels, strata).matched
    partner = np.full(len(labels), -1)
    partner[unit] = matched_samples(
        np.array(prepared.labels["target"], dtype=object),
        ("HC", "SZ"),
        samples_with(open_labelled(people), set(prepared.training.ids)),
        list(prepared.training.subjects),
    )
    for giver in matched.drawn.giver:
        moved = giver != np.arange(len(giver))
        assert (partner[moved] >= 0).all()
        assert (partner[giver] == partner).all()
    assert (matched.drawn.giver[1:] != np.arange(len(labels))).mean() > 0.2
    assert Counter(matched.prepared.labels["matched"])[None] == (partner < 0).sum()
    few = {**part, "minimum_group_size": 30}
    found = checks_of(prepared, str(people), few, [("HC", "SZ")], unit, labels, strata)
    assert not found.matched
    assert "fewer than the 30 that a test needs" in found.unmatched["HC - SZ"]


# ---------------------------------------------------------------------- p-values


def made_up(refits: int, tests: int, seed: int = 0, **attributes) -> xr.Dataset:
    """Refits of one layer with made-up values: contrast, then cosine, then difference, a third each."""
    generator = np.random.default_rng(seed)
    statistics = np.repeat(["contrast", "cosine", "difference"], tests // 3)
    text = np.dtypes.StringDType()
    words = {"layer": "a.weight", "group_a": "x", "group_b": "y", "comparison": "x - y", "check": ""}
    return xr.Dataset(
        {
            "value": (("refit", "test"), generator.normal(size=(refits, tests))),
            "above": (("refit", "test"), np.ones((refits, tests), dtype=bool)),
        },
        coords={
            "refit": np.arange(refits),
            **{name: ("test", np.full(tests, word).astype(text)) for name, word in words.items()},
            "statistic": ("test", statistics.astype(text)),
            "step": ("test", np.arange(tests)),
            "index": ("test", np.where(statistics == "cosine", 0, 1)),
        },
        attrs={"labellings": refits, "digest": "d", "pairs": 1, **attributes},
    )


def test_p_counts_refits_that_are_as_extreme_and_the_maximum_holds_the_family():
    data = made_up(20, 9)
    table = evaluate_refits(data, 0.5).set_index("step")
    values = data["value"].values
    z = np.abs(values - values.mean(0)) / values.std(0)
    largest = z.max(1)
    for test in range(9):
        row = table.loc[test]
        assert row["p"] == pytest.approx(sum(z[b, test] >= z[0, test] for b in range(20)) / 20)
        assert row["p_adjusted"] == pytest.approx(sum(largest[b] >= z[0, test] for b in range(20)) / 20)
        assert row["estimate"] == pytest.approx(values[0, test])
        assert row["effect_size"] == pytest.approx((values[0, test] - values[1:, test].mean()) / values[1:, test].std())
    np.testing.assert_allclose(table["p_bh"], stats.false_discovery_control(table["p"]))
    np.testing.assert_allclose(table["p_holm"], holm(table["p"].to_numpy()))
    assert (table["significant"] == (table["p_adjusted"] <= 0.5)).all()
    assert table["index"].isna().sum() == 3


def test_ties_count_and_values_below_the_floor_are_not_tested():
    data = made_up(20, 9)
    data["value"][:, 0] = 1.0  # the same under all labellings
    data["above"][0, 1] = False  # below as observed, above elsewhere
    data["above"][1:, 2] = False  # above as observed alone
    data["value"][7, 4] = np.nan
    table = evaluate_refits(data, 0.05).set_index("step")
    assert table.loc[0, "p"] == 1
    assert table["p"].isna().to_numpy().nonzero()[0].tolist() == [1, 2, 4]
    assert table["below_floor"].to_numpy().nonzero()[0].tolist() == [1, 4]
    assert not table.loc[[0, 1, 2, 4], "significant"].any()
    # What is not tested is no part of the family, except that a rule must not look at the observed labels alone.
    kept = data.isel(test=[0, 1, 3, 5, 6, 7, 8])
    np.testing.assert_allclose(
        evaluate_refits(kept, 0.05)["p_adjusted"], table["p_adjusted"].drop([2, 4]).to_numpy(), equal_nan=True
    )


def test_seeds_are_averaged_labelling_by_labelling_and_must_share_labellings():
    one, two = made_up(20, 9, seed=1), made_up(20, 9, seed=2)
    mean = average([one, two])
    np.testing.assert_allclose(mean["value"], (one["value"] + two["value"]) / 2)
    with pytest.raises(UserError, match="the seeds' refits have other labellings"):
        average([one, two.assign_attrs(digest="other")])


# ---------------------------------------------------------------------- the workflow's jobs


def config(**statistics):
    """The small study's config with refits."""
    changed = json.loads(json.dumps(SETTINGS))
    changed["experiments"]["small"]["runs"]["judge"].update(refit=True, training={"further_seeds": [4]})
    changed["statistics"] = {"refits": 50, "refits_per_job": 20, **statistics}
    return parse_config(changed)


def parts_of(config) -> dict[str, dict]:
    """Settings of each part of the small study's refits."""
    return {
        part: specs.refit_part_settings(config, "small", "judge", part) for part in specs.refit_parts(config, "small")
    }


def test_parts_cover_every_refit_once_and_the_first_has_the_labels_as_they_are():
    parts = parts_of(config())
    assert {name: (part["first"], part["last"]) for name, part in parts.items()} == {
        "0": (0, 20), "1": (21, 40), "2": (41, 50)
    }  # fmt: skip
    assert not any(part["matched"] for part in parts.values())  # digits have neither age nor motion


def test_without_checks_of_confounders_the_refits_of_matched_subjects_are_left_out_and_no_other_repeats():
    def of_cohort(**statistics):
        plain = config(**statistics)
        content = plain.model_dump(exclude_unset=True) | {"cohort": {"kind": "simulated"}}
        content["datasets"]["digits"] = {"kind": "freesurfer"}
        content["experiments"]["small"]["panels"] = [{"run": "judge"}]
        return parts_of(parse_config(content))

    with_checks, without = of_cohort(), of_cohort(confounds=False)
    assert list(with_checks) == ["0", "1", "2", "matched-0", "matched-1", "matched-2"]
    assert without == {name: with_checks[name] for name in ("0", "1", "2")}
    assert with_checks["matched-1"] == {**with_checks["1"], "matched": True}


def test_what_is_recorded_of_the_run_does_not_repeat_its_refits():
    plain = specs.refit_part_settings(config(), "small", "judge", "0")
    assert specs.refit_part_settings(config(alpha=0.01, permutations=20), "small", "judge", "0") == plain
    assert specs.refit_part_settings(config(seed=7), "small", "judge", "0") != plain
    again = config()
    recorded = again.introspection.model_copy(update={"every": 3})
    assert (
        specs.refit_part_settings(again.model_copy(update={"introspection": recorded}), "small", "judge", "0") == plain
    )
    assert specs.refit_part_settings(config(), "small", "judge-seed-4", "0")["run"]["training"]["seed"] == 4
