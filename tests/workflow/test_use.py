"""The workflow as people use it: folders, profiles, targets, mistakes."""

import json
import re

import numpy as np
import pytest
import yaml

import autospec
from autospec.cli import main
from tests.conftest import ROOT, run_command
from tests.workflow.conftest import ALL_JOBS, STUDY

pytestmark = pytest.mark.workflow


def test_plain_snakemake_uses_the_default_profile(finished):
    assert "profiles/default" in finished.output
    assert 'gpu=Resource("gpu", 1)' in finished.output or "gpu=1" in finished.output
    assert "Provided cores" in finished.output


def test_init_writes_a_config_that_snakemake_takes(analysis, tmp_path, capsys):
    folder = tmp_path / "new"
    assert main(["init", str(folder)]) == 0
    assert "snakemake --directory" in capsys.readouterr().out
    done = run_command("snakemake", "--directory", str(folder), "-n", folder=analysis.code)
    assert done.returncode == 0, done.stdout
    assert "Training digits_mlp/autoencoder" in done.stdout
    assert not (analysis.code / "results").exists()


def test_init_does_not_overwrite_a_config(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("mine: true\n")
    assert main(["init", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "mine: true\n"


def test_results_stay_in_the_analysis_folder(finished):
    assert (finished.folder / ".snakemake").is_dir()
    assert not (finished.code / "results").exists()
    assert not (finished.code / ".snakemake").exists()


def test_configfile_replaces_the_config(analysis, tmp_path):
    other = json.loads(json.dumps(STUDY).replace('"small"', '"other"'))
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(other))
    planned = analysis.planned("--configfile", str(file))
    assert "Training other/classifier" in planned
    assert not any("small" in name for name in planned)


def test_one_figure_and_one_experiment_are_targets(analysis):
    config = analysis.config()
    config["training"]["epochs"] = 4
    analysis.write(config)
    assert analysis.planned("figure_1") == ALL_JOBS - {
        "Building the data set digits",
        "Writing the report",
        "Drawing the panels of small",
        "Testing groups in small/autoencoder",  # no panel of the page compares groups in it
        "Composing figure s1",
        "Summing up",
    }
    rest = {"Building the data set digits", "Writing the report", "Summing up"}
    assert analysis.planned("experiment_small") == ALL_JOBS - rest


@pytest.mark.parametrize("target", ["figure_99", "experiment_nothing", "results/runs/nothing/classifier.zarr.zip"])
def test_a_target_named_in_no_config_is_one_sentence(analysis, target):
    done = analysis.snakemake("-n", target)
    assert done.returncode != 0
    assert target in done.stdout
    assert "this config has no" in done.stdout
    assert "small" in done.stdout.split("it has", 1)[1]
    assert "Traceback" not in done.stdout


def test_a_folder_may_be_called_like_a_target_that_does_not_exist(analysis):
    base = analysis.folder.rename(analysis.folder.with_name("figure_99")).parent
    command = ("snakemake", "--snakefile", "code/Snakefile", "--directory", "figure_99", "-n", "figure_1")
    done = run_command(*command, folder=base)
    assert done.returncode == 0, done.stdout
    assert "this config has no" not in done.stdout


def test_trajectories_hold_what_the_config_asked_for(finished):
    tree = autospec.open_trajectories(finished.folder / "results/runs/small/classifier.zarr.zip")
    assert tree["step"].values.tolist() == [0, 2, 4]
    assert tree["group"].values.tolist() == ["all", "0", "1", "3"]
    assert tree["group_size"].values.tolist() == [[36, 12, 12, 12]] * 3
    assert list(tree["layers"].children) == ["encoder.0.weight", "classifier.weight"]
    assert tree["training/loss"].shape == (6,)
    assert tree["training/accuracy"].shape == (6,)
    assert tree.attrs["settings"]["activation"] == "tanh"
    assert tree.attrs["device"] in ("cpu", "cuda", "mps")
    assert tree.attrs["audit"]["largest_error"] < 1e-6


def test_time_and_memory_stand_beside_every_output(finished):
    results = finished.folder / "results"
    for name in ("datasets/digits", "runs/small/classifier", "figures/figure-1", "figures/small", "report"):
        used = json.loads((results / f"{name}.json").read_text())
        assert used["wall_seconds"] > 0
        assert used["cpu_seconds"] > 0
        assert used["peak_memory_mib"] > 10


def test_logs_show_the_progress_of_a_training(finished):
    log = (finished.folder / "logs/train/small-classifier.log").read_text()
    assert "update 6 of 6" in log
    assert "small/classifier: update 6 of 6" in finished.output


def test_the_work_folder_holds_what_more_epochs_go_on_from_and_nothing_else(finished):
    work = finished.folder / "work"
    folders = [path.parent for path in work.rglob("checkpoint.pt")]
    assert {folder.parent.relative_to(work).as_posix() for folder in folders} == {
        "small/autoencoder",
        "small/classifier",
    }
    for path in work.rglob("*"):
        assert path.is_dir() or any(path.is_relative_to(folder) for folder in folders)


def test_a_mistake_in_the_config_is_one_sentence(analysis):
    config = analysis.config()
    config["training"]["epoch"] = 4
    analysis.write(config)
    done = analysis.snakemake("-n")
    assert done.returncode != 0
    assert "there is no setting called 'training.epoch'" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_missing_file_is_one_sentence(analysis):
    config = analysis.config()
    config["datasets"]["digits"] |= {"images": "data/images.gz", "labels": "data/labels.gz"}
    analysis.write(config)
    done = analysis.snakemake("-n")
    assert done.returncode != 0
    assert "the data set 'digits' needs the file data/images.gz, which does not exist" in done.stdout
    assert str(analysis.folder) in done.stdout
    assert "Traceback" not in done.stdout


def test_own_digits_in_files_are_a_data_set(analysis, digits):
    images, labels = digits
    folder = analysis.folder / "data"
    folder.mkdir()
    head = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
    (folder / "images.idx").write_bytes(head + images.tobytes())
    (folder / "labels.idx").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 24]) + labels.astype(np.uint8).tobytes())
    config = analysis.config()
    config["datasets"]["digits"] |= {"images": "data/images.idx", "labels": "data/labels.idx", "samples_per_class": 8}
    analysis.write(config)
    target = "results/runs/small/autoencoder.zarr.zip"
    done = analysis.snakemake(target)
    assert done.returncode == 0, done.stdout
    tree = autospec.open_trajectories(analysis.folder / target)
    assert tree["group_size"].values[0].tolist() == [24, 8, 8, 8]
    (folder / "images.idx").write_bytes((folder / "images.idx").read_bytes()[:-1] + b"7")
    assert "Building the data set digits" in analysis.planned(target)


def test_a_failing_job_leaves_no_output_and_says_why(analysis):
    config = analysis.config()
    config["experiments"]["small"]["runs"]["classifier"]["training"] = {"learning_rate": 1.0e30}
    config["experiments"]["small"]["runs"]["autoencoder"]["training"] = {"learning_rate": 1.0e30}
    analysis.write(config)
    done = analysis.snakemake("results/runs/small/autoencoder.zarr.zip")
    assert done.returncode != 0
    assert "the loss is no longer finite" in done.stdout
    assert "lower learning_rate" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list((analysis.folder / "results/runs/small").glob("*autoencoder*.zip*"))


def test_every_rule_has_a_docstring_a_message_and_a_log(finished):
    for file in (finished.code / "workflow/rules").glob("*.smk"):
        rules = re.split(r"\n *rule ", file.read_text())[1:]
        assert rules, file
        for rule in rules:
            assert '"""' in rule, (file, rule[:30])
            if "shell:" in rule:
                for part in ("log:", "message:", "conda:", "params:", "spec="):
                    assert part in rule, (file, rule[:30], part)


@pytest.mark.parametrize("profile", [file.parent.name for file in (ROOT / "profiles").glob("*/config.yaml")])
def test_a_clusters_profile_names_every_rule_that_trains_or_permutes(profile):
    settings = yaml.safe_load((ROOT / f"profiles/{profile}/config.yaml").read_text())
    if "executor" not in settings:  # jobs here take what is here
        return
    texts = [file.read_text() for file in (ROOT / "workflow/rules").glob("*.smk")]
    rules = {rule.split(":", 1)[0]: rule for text in texts for rule in re.split(r"\n *rule ", text)[1:]}
    with_gpu = {name for name, rule in rules.items() if re.search(r"^ *gpu=", rule, re.MULTILINE)}
    assert with_gpu == {"train", "refit_part"}
    asked = settings["set-resources"]
    for name in with_gpu | {"permute"}:
        assert {"mem_mb", "runtime"} <= asked[name].keys(), name
        assert ("gpu" in asked[name]) == (name in with_gpu), name
    page = (ROOT / "docs/cluster.md").read_text()
    assert all(f"`{name}`" in page for name in asked)


def test_snakemake_lint_finds_nothing(analysis):
    done = analysis.snakemake("--lint")
    assert done.returncode == 0, done.stdout
