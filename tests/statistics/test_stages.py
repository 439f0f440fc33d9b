"""The stage of permutations: which pairs it tests, against brute force, by seeds, interrupted, with bad input; and motion."""

import copy
import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from autospec import inputs, specs
from autospec.config import parse_config
from autospec.datasets.labelled import open_labelled
from autospec.errors import UserError
from autospec.introspection.groups import Groups
from autospec.introspection.sample_shares import sample_shares
from autospec.statistics import permute
from autospec.statistics.covariates import balance_in_words
from autospec.statistics.matching import matched_pairs, standardised_difference
from autospec.statistics.permutation_test import permutation_test
from autospec.statistics.permutations import compare, draw_labellings
from autospec.statistics.permute import build_permutation, shares_at
from autospec.statistics.study import exchangeable, grouped
from autospec.statistics.table import CONFOUNDS_COLUMNS, read_tests
from autospec.storage import open_store
from autospec.training.prepare import prepare
from autospec.training.snapshots import open_snapshots
from tests.statistics.people import contrast_by_autograd, settings_of, train, write_people
from tests.study import SETTINGS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The shares of these small networks are not worth several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(**changed) -> dict:
    """Settings of the stage."""
    return {
        "name": "people/net",
        "alpha": 0.05,
        "permutations": 39,
        "seed": 1,
        "within": [],
        "conditional_on": [],
        "minimum_group_size": 3,
        "confounds": False,
        "keep_null": False,
        **changed,
    }


class Found:
    """What the stage wrote."""

    def __init__(
        self,
        folder: Path,
        dataset: Path,
        weights: list[Path],
        null: bool = False,
        refit: str | None = None,
        **changed,
    ) -> None:
        paths = {name: str(folder / f"net.{name}") for name in ("table", "described", "confounds")}
        self.null = str(folder / "net.null.zarr.zip") if null else None
        self.message = build_permutation(
            settings(**changed),
            "code",
            str(dataset),
            list(map(str, weights)),
            {**paths, "null": self.null},
            str(folder / "work"),
            refit,
        )
        self.table = read_tests(paths["table"])
        self.described = json.loads(Path(paths["described"]).read_text())
        self.confounds = pd.read_csv(paths["confounds"], sep="\t", keep_default_na=False, na_values={"p": [""]})


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    """An autoencoder of people, from two seeds."""
    folder = tmp_path_factory.mktemp("coder")
    dataset = write_people(folder / "people.zarr.zip", effect=1.5)
    weights = [folder / f"seed-{seed}.weights.pt" for seed in (0, 1)]
    for seed, path in enumerate(weights):
        train(settings_of("autoencoder", seed=seed), dataset, path)
    return dataset, weights


# ---------------------------------------------------------------------- which labels may be exchanged

TARGET = ["SZ", "SZ", "HC", "HC", "SZ", "HC"]
SEX = ["F", "M", "F", "M", "F", "M"]


def test_an_autoencoder_has_seen_no_label_and_a_classifier_those_that_differ_in_its_target():
    assert exchangeable("autoencoder", TARGET, TARGET, "SZ", "HC") == ""
    assert "differ in the target" in exchangeable("classifier", TARGET, TARGET, "SZ", "HC")
    both = [f"{a} & {b}" for a, b in zip(TARGET, SEX, strict=True)]
    assert exchangeable("classifier", TARGET, both, "SZ & F", "SZ & M") == ""
    assert exchangeable("classifier", TARGET, both, "SZ & F", "HC & F") != ""
    assert exchangeable("classifier", TARGET, SEX, "F", "M") == ""  # within each target


def test_groups_are_called_as_the_trajectories_call_them_and_missing_labels_belong_to_none():
    labels = {"diagnosis": TARGET, "sex": ["F", None, "F", "M", "F", "M"]}
    found = {each.name: each for each in grouped(labels, [("diagnosis", "sex")])}
    groups = Groups(labels, [("diagnosis", "sex")])
    assert list(found) == ["diagnosis", "sex", "diagnosis & sex"]
    for name, each in found.items():
        members = [group for group, of in zip(groups.names, groups.groupings, strict=True) if of == name]
        assert sorted({group for pair in each.pairs for group in pair}) == sorted(members)
        assert len(each.pairs) == len(members) * (len(members) - 1) // 2
    assert found["diagnosis & sex"].labels.tolist() == [
        "diagnosis=SZ & sex=F",
        None,
        "diagnosis=HC & sex=F",
        "diagnosis=HC & sex=M",
        "diagnosis=SZ & sex=F",
        "diagnosis=HC & sex=M",
    ]
    assert grouped(TARGET)[0].pairs == [("HC", "SZ")]


# ---------------------------------------------------------------------- an autoencoder


def test_the_contrast_and_its_p_are_those_of_brute_force_by_autograd(coder, tmp_path):
    dataset, weights = coder
    found = Found(tmp_path, dataset, weights[:1], null=True)
    prepared = prepare(open_snapshots(weights[0]).settings, str(dataset), torch.device("cpu"))
    labels = np.array(prepared.labels["target"])
    drawn = draw_labellings(compare(labels, "HC", "SZ", subjects=prepared.training.subjects), 39, 1)
    assert len(set(prepared.training.subjects)) == len(labels)
    order = np.argsort(prepared.training.subjects)
    kept = open_snapshots(weights[0]).weights(2)
    values = []
    for row in drawn.in_first:
        first = np.empty(len(labels), dtype=bool)
        first[order] = row
        values.append(contrast_by_autograd(prepared, kept, first, ~first))
    assert not np.array_equal(drawn.in_first[0], drawn.in_first[1])
    rows = found.table.query("statistic == 'contrast' and step == 2")
    for layer in ("encoder.0.weight", "decoder.0.weight"):
        brute = np.array([each[layer] for each in values])
        part = rows[rows["layer"] == layer].sort_values("index")
        assert part["index"].tolist() == list(range(1, brute.shape[1] + 1))
        np.testing.assert_allclose(part["estimate"], brute[0], rtol=2e-5)
        p = (brute >= brute[0] * (1 - 1e-5)).mean(0)
        np.testing.assert_allclose(part["p"], p)
        effect = (brute[0] - brute[1:].mean(0)) / brute[1:].std(0)
        np.testing.assert_allclose(part["effect_size"], effect, rtol=1e-3)
        assert ((part["interval_low"] < part["estimate"]) & (part["estimate"] < part["interval_high"])).all()
        null = open_store(found.null, "null")[f"HC - SZ/{layer}/contrast"]["value"]
        np.testing.assert_allclose(null.sel(step=2).values, brute, rtol=2e-5, atol=1e-7 * brute.max())
    assert found.table["p"].min() >= 1 / 40
    assert found.table.query("significant")["statistic"].isin(["contrast", "distance", "cosine", "difference"]).any()


def test_statistics_are_averaged_over_seeds_under_the_same_labellings(coder, tmp_path):
    dataset, weights = coder
    places = [tmp_path / name for name in ("one", "two", "both")]
    for place in places:
        place.mkdir()
    one, two, both = (
        Found(place, dataset, chosen, null=True)
        for place, chosen in zip(places, (weights[:1], weights[1:], weights), strict=True)
    )
    np.testing.assert_allclose(both.table["estimate"], (one.table["estimate"] + two.table["estimate"]) / 2, rtol=1e-5)
    assert (one.table["estimate"] != two.table["estimate"]).any()
    path = "HC - SZ/encoder.0.weight/distance"
    nulls = [open_store(each.null, "null")[path]["value"].values for each in (one, two, both)]
    np.testing.assert_allclose(nulls[2], (nulls[0] + nulls[1]) / 2, rtol=1e-5)
    assert "averaged over 2 trainings" in both.described["method"]


def test_an_interrupted_test_takes_finished_updates_from_its_folder(coder, tmp_path, monkeypatch):
    dataset, weights = coder
    whole = Found(tmp_path, dataset, weights[:1])
    assert not list((tmp_path / "work").rglob("*.npz"))  # nothing is left
    computed: list[int] = []

    def until_step_5(run, prepared, step):
        computed.append(step)
        if step == 5 and len(computed) == 3:
            raise KeyboardInterrupt
        return shares_at(run, prepared, step)

    monkeypatch.setattr(permute, "shares_at", until_step_5)
    with pytest.raises(KeyboardInterrupt):
        Found(tmp_path, dataset, weights[:1])
    again = Found(tmp_path, dataset, weights[:1])
    assert computed == [0, 2, 5, 5]
    pd.testing.assert_frame_equal(again.table, whole.table)


def test_the_description_counts_what_was_done(coder, tmp_path):
    dataset, weights = coder
    found = Found(tmp_path, dataset, weights[:1], within=["site"])
    assert "within site (39 permutations asked for, seed 1)" in found.described["method"]
    assert "3 updates (0 to 5)" in found.described["method"]
    pair = found.described["comparisons"]["HC - SZ"]
    assert pair["subjects"] == {"HC": 18, "SZ": 18}
    assert pair["strata"] == 2
    assert pair["labellings"] == 40
    tested = found.table["p"].notna().sum()
    assert pair["family"].startswith(f"{tested} tests: contrast (")
    assert found.described["refused"] == {}
    assert "1 pair of groups tested" in found.message


def test_few_labellings_are_all_used_and_the_description_says_so(tmp_path):
    dataset = write_people(tmp_path / "people.zarr.zip", count=8)
    train(settings_of("autoencoder", held_out=0.0), dataset, tmp_path / "w.pt")
    found = Found(tmp_path, dataset, [tmp_path / "w.pt"], permutations=500)
    pair = found.described["comparisons"]["HC - SZ"]
    assert pair["enumerated"]
    assert pair["labellings"] == 70
    assert "only 70 labellings are possible, fewer than the 500" in pair["messages"][0]
    assert found.table["p"].dropna().mul(70).round(6).mod(1).eq(0).all()


# ---------------------------------------------------------------------- a classifier


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A classifier of people, with diagnosis x sex."""
    folder = tmp_path_factory.mktemp("judge")
    dataset = write_people(folder / "people.zarr.zip", effect=1.0)
    train(settings_of("classifier", ["diagnosis x sex"]), dataset, folder / "w.pt")
    return dataset, folder / "w.pt"


def test_a_classifier_s_pairs_are_refused_where_they_differ_in_the_target(judge, tmp_path):
    found = Found(tmp_path, judge[0], [judge[1]])
    within = {
        "sex=F - sex=M",
        "diagnosis=HC & sex=F - diagnosis=HC & sex=M",
        "diagnosis=SZ & sex=F - diagnosis=SZ & sex=M",
    }
    assert set(found.described["comparisons"]) == set(found.table["comparison"]) == within
    assert len(found.described["refused"]) == 5
    assert "refit set to true" in found.described["refused"]["diagnosis=HC - diagnosis=SZ"]
    assert found.described["comparisons"]["sex=F - sex=M"]["strata"] == 2  # one for each target
    assert "within one and the same target" in found.described["method"]
    assert (found.table["p_adjusted"].dropna() >= 3 / 40).all()  # three comparisons


def test_too_small_groups_are_refused_in_one_sentence(judge, tmp_path):
    found = Found(tmp_path, judge[0], [judge[1]], minimum_group_size=15)
    assert set(found.described["comparisons"]) == {"sex=F - sex=M"}
    sentence = found.described["refused"]["diagnosis=HC & sex=F - diagnosis=HC & sex=M"]
    assert "fewer than the 15 that a test needs" in sentence


# ---------------------------------------------------------------------- mistakes


def test_a_grouping_or_covariate_that_is_not_there_is_a_mistake(coder, tmp_path):
    dataset, weights = coder
    with pytest.raises(UserError, match=r"statistics\.within names 'scanner', but .* \['sex', 'site'\]"):
        Found(tmp_path, dataset, weights[:1], within=["scanner"])
    with pytest.raises(UserError, match=r"statistics\.conditional_on names 'iq', but .* \['age', 'mean_fd'\]"):
        Found(tmp_path, dataset, weights[:1], conditional_on=["iq"])
    assert not (tmp_path / "net.table").exists()


def test_weights_of_other_data_are_a_mistake(coder, tmp_path):
    other = write_people(tmp_path / "others.zarr.zip", seed=5)
    with pytest.raises(UserError, match="was trained on other data"):
        Found(tmp_path, other, coder[1][:1])


def test_an_update_without_weights_is_a_mistake(coder):
    dataset, weights = coder
    run = open_snapshots(weights[0])
    with pytest.raises(UserError, match=r"no weights were kept before update 3: choose one of \[0, 2, 5\]"):
        shares_at(run, prepare(run.settings, str(dataset), torch.device("cpu")), 3)


def test_a_group_that_does_not_exist_is_a_mistake(coder):
    labels = [str(each) for each in open_labelled(coder[0])["target"].values]
    with pytest.raises(UserError, match=r"names the group 'BP', but the labels are \['HC', 'SZ'\]"):
        compare(labels, "HC", "BP")


# ---------------------------------------------------------------------- is it just motion?


def checked(folder: Path, dataset: Path, **changed) -> pd.DataFrame:
    """Rows of the whole network, by check."""
    train(settings_of("autoencoder", epochs=3, snapshots=[0, 2]), dataset, folder / "w.pt")
    found = Found(folder, dataset, [folder / "w.pt"], confounds=True, **changed).confounds
    assert list(found.columns) == list(CONFOUNDS_COLUMNS)
    return found[found["layer"] == ""].set_index("check")


def test_motion_that_drives_the_data_is_found_beside_the_diagnosis(tmp_path):
    dataset = write_people(tmp_path / "people.zarr.zip", count=80, motion_effect=2.0)
    found = checked(tmp_path, dataset)
    assert list(found.index) == ["labels", "motion", "site", "sex", "matched", "shuffled"]
    assert found.loc["motion", "p"] == pytest.approx(1 / 40)
    assert (found.drop("motion")["p"] > 0.05).all()
    assert (found.loc["motion", ["group_a", "group_b"]] == ["high", "low"]).all()
    assert found.loc["motion", "n_a"] == found.loc["motion", "n_b"] == 36
    assert found.loc["matched", "n_a"] == found.loc["matched", "n_b"]
    assert found.loc["matched", "n_a"] < 36


def test_a_true_difference_stays_among_matched_people_and_goes_with_shuffled_labels(tmp_path):
    dataset = write_people(tmp_path / "people.zarr.zip", count=80, effect=2.0)
    found = checked(tmp_path, dataset)
    assert found.loc[["labels", "matched"], "p"].tolist() == [pytest.approx(1 / 40)] * 2
    assert (found.loc[["motion", "site", "sex", "shuffled"], "p"] > 0.05).all()


def test_a_classifier_s_motion_site_and_sex_are_permuted_within_targets_and_its_labels_are_left_to_refits(tmp_path):
    dataset = write_people(tmp_path / "people.zarr.zip", count=80, effect=2.0, motion_effect=2.0)
    train(settings_of("classifier", epochs=3, snapshots=[0, 2]), dataset, tmp_path / "w.pt")
    alone = Found(tmp_path, dataset, [tmp_path / "w.pt"], confounds=True).confounds
    whole = alone[alone["layer"] == ""].set_index("check")
    assert list(whole.index) == ["labels", "motion", "site", "sex", "matched", "shuffled"]
    assert whole.loc["motion", "p"] == pytest.approx(1 / 40)
    assert whole.loc[["motion", "site", "sex"], "note"].str.contains("permuted within each target").all()
    assert whole.loc[["labels", "matched", "shuffled"], "p"].isna().all()
    assert whole.loc[["labels", "matched", "shuffled"], "note"].str.contains("set refit to true").all()

    given = alone[alone["check"].isin(["labels", "matched", "shuffled"])].assign(p=0.25, note="by refits")
    given.to_csv(tmp_path / "refit.confounds.tsv", sep="\t", index=False)
    both = Found(
        tmp_path, dataset, [tmp_path / "w.pt"], confounds=True, refit=str(tmp_path / "refit.confounds.tsv")
    ).confounds
    whole = both[both["layer"] == ""].set_index("check")
    assert list(whole.index) == ["labels", "motion", "site", "sex", "matched", "shuffled"]
    assert whole.loc[["labels", "matched", "shuffled"], "p"].tolist() == [0.25] * 3


def test_labels_that_a_classifier_has_not_seen_are_found_different_within_targets_as_often_as_alpha_says():
    """Motion that depends on the diagnosis, and says nothing of the data beyond it."""
    rejected = []
    for repetition in range(120):
        generator = np.random.default_rng([7, repetition])
        target = np.repeat([0, 1], 16)
        x = torch.from_numpy(generator.normal(size=(32, 6)) + 1.5 * target[:, None]).float()
        motion = generator.random(32) < np.where(target, 0.75, 0.25)
        if min(motion.sum(), (~motion).sum()) < 2:
            continue
        torch.manual_seed(repetition)
        model = torch.nn.Linear(6, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        answer = torch.from_numpy(target)

        def loss(model, x=x, answer=answer):
            return torch.nn.functional.cross_entropy(model(x), answer)

        for _ in range(15):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        comparison = compare(np.where(motion, "high", "low"), "high", "low", strata={"target": target.astype(str)})
        labellings = draw_labellings(comparison, 19, seed=repetition)
        shares = sample_shares(model, loss, 32)
        table = permutation_test([15], lambda _, shares=shares: shares, comparison, labellings).table
        rejected.append(table["p_adjusted"].min() <= 0.05)
    # Within the exact interval of the level, at 99.9 %.
    assert stats.binomtest(sum(rejected), len(rejected), 0.05).pvalue > 0.001


def test_where_an_imbalance_remains_there_is_no_p(tmp_path, monkeypatch):
    monkeypatch.setattr("autospec.statistics.covariates.BALANCED", 1e-9)
    dataset = write_people(tmp_path / "people.zarr.zip", effect=2.0)
    found = checked(tmp_path, dataset)
    assert np.isnan(found.loc["matched", "p"])
    assert "remains after matching, so no p is given" in found.loc["matched", "note"]
    assert found["p"].notna().sum() == 5


def test_without_covariates_the_table_is_its_header(tmp_path):
    dataset = write_people(tmp_path / "people.zarr.zip", covariates=False)
    assert checked(tmp_path, dataset).empty


def test_matching_takes_as_many_pairs_as_there_can_be_as_near_as_they_can_be():
    generator = np.random.default_rng(3)
    values, sex = generator.normal(size=(10, 2)), np.array(list("FMFMFFMFMF"))
    in_first = np.arange(10) < 4
    found = matched_pairs(values, sex, in_first, caliper=1.2)
    scaled = (values - values.mean(0)) / values.std(0)

    def cost(pairs: list[tuple[int, int]]) -> tuple[int, float]:
        good = [(i, j) for i, j in pairs if sex[i] == sex[j] and (np.abs(scaled[i] - scaled[j]) <= 1.2).all()]
        return -len(good), sum(np.abs(scaled[i] - scaled[j]).sum() for i, j in good)

    best = min(cost(list(zip(range(4), chosen, strict=True))) for chosen in permutations(range(4, 10), 4))
    assert cost(found) == pytest.approx(best)
    assert len(found) == -best[0] > 0


def test_a_standardised_difference_is_in_pooled_deviations():
    a, b = np.array([[1.0], [3.0]]), np.array([[5.0], [9.0]])
    values, in_first = np.concatenate([a, b]), np.array([True, True, False, False])
    assert standardised_difference(values, in_first)[0] == pytest.approx((2 - 7) / np.sqrt((1 + 4) / 2))


def test_one_subject_alone_has_no_balance():
    labels = np.array(["HC", "SZ", "SZ", "HC", None], dtype=object)
    numbers = {"age": np.array([20.0, 30, 40, np.nan, 50]), "mean_fd": np.array([0.1, 0.2, 0.4, 0.3, 0.5])}
    words, worst = balance_in_words(labels, ("HC", "SZ"), numbers, [*"abcde"])
    assert words == "mean_fd -1.00"
    assert worst == pytest.approx(1.0)
    assert balance_in_words(labels[:2], ("HC", "SZ"), {"age": numbers["age"][:2]}, [*"ab"]) == ("", 0.0)


# ---------------------------------------------------------------------- which runs


def test_the_table_of_tests_reads_the_valid_ones_of_every_seed_where_they_are_made():
    changed = copy.deepcopy(SETTINGS)
    changed["statistics"] = {"permutation": "all", "refits": 30, "refits_per_job": 20}
    runs = changed["experiments"]["small"]["runs"]
    runs["judge"]["refit"] = True
    for run in runs.values():
        run["training"] = {"further_seeds": [4]}
    config = parse_config(changed)
    table = "results/statistics/small/{}.{}.tsv"
    assert inputs.tests_found(config, "permutation", "small", "coder")[0] == table.format("coder", "permutation")
    assert inputs.tests_found(config, "refit", "small", "judge")[0] == table.format("judge", "refit")
    assert inputs.tests_found(config, "refit", "small", "coder") == []
    assert inputs.tests_found(config, "permutation", "small", "judge") == []
    assert inputs.refit_parts(config, "small", "judge") == [
        f"results/refits/small/{run}/{part}.zarr.zip" for run in ("judge", "judge-seed-4") for part in (0, 1)
    ]
    assert inputs.of_every_seed(config, "weights", "small", "coder") == [
        f"results/runs/small/{run}.weights.pt" for run in ("coder", "coder-seed-4")
    ]


def test_which_runs_are_permuted():
    def of(mode: str) -> list[bool]:
        config = parse_config({**SETTINGS, "statistics": {"permutation": mode}})
        return [specs.permuted(config, "small", run) for run in ("coder", "judge")]

    # The judge has seen all its labels, and no panel compares groups of the coder.
    assert (of("none"), of("compared"), of("all")) == ([False, False], [False, False], [True, False])
