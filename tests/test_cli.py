"""The command line: one sentence for a mistake, and what a stage used beside its output."""

import json
import os
import subprocess
import sys

import pytest
import torch

from autospec import specs
from autospec.cli import main, write_resources
from autospec.config import load_config
from tests.conftest import ROOT, run_command

SPEC = json.dumps(
    {"settings": {"name": "small/judge", "task": "classifier", "scale": "raw", "alpha": 0.05}, "code": "0"}
)


def complaint(capsys, *arguments: str) -> str:
    """The one sentence that a command ends with."""
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("autospec: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    "spec",
    ["", "not json", "[]", "3", "{}", '{"settings": {}}', '{"code": "0"}', '{"settings": 3, "code": "0"}'],
)
def test_a_bad_spec_is_one_sentence(capsys, tmp_path, spec):
    said = complaint(capsys, "test", "--spec", spec, "--run", "x", "--output", str(tmp_path / "y"), "--described", "z")
    assert "--spec is no JSON text with 'settings' and 'code'" in said


def test_a_spec_that_lacks_a_setting_names_it(capsys, tmp_path):
    spec = json.dumps({"settings": {"name": "x", "kind": "mnist"}, "code": "0"})
    said = complaint(capsys, "dataset", "--spec", spec, "--output", str(tmp_path / "y"))
    assert "--spec lacks the settings source, classes, samples_per_class" in said


def test_trajectories_that_are_not_there_are_one_sentence(capsys, tmp_path):
    target = tmp_path / "out" / "tests.tsv"
    said = complaint(
        capsys,
        "test",
        "--spec",
        SPEC,
        "--run",
        str(tmp_path / "no.zarr.zip"),
        "--output",
        str(target),
        "--described",
        "z",
    )
    assert f"no trajectories at {tmp_path / 'no.zarr.zip'}" in said
    assert not target.exists()


def test_a_table_that_is_not_there_is_one_sentence(capsys, study, tmp_path):
    spec = specs.spec("panels", specs.panels_settings(study.config, "small"))
    runs = [str(study.run(run)) for run in ("coder", "judge")]
    arguments = ("--runs", *runs, "--tests", str(tmp_path / "no.tsv"))
    said = complaint(capsys, "panels", "--spec", spec, *arguments, "--output", str(tmp_path / "coder.png"))
    assert "no.tsv" in said
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_no_parameter_has_is_one_sentence(capsys, study, tmp_path):
    settings = specs.run_settings(study.config, "small", "judge")
    settings["introspection"]["layers"] = ["nothing.*"]
    arguments = ("--dataset", str(study.dataset), "--work", str(tmp_path / "work"), "--device", "cpu")
    output = tmp_path / "x.zarr.zip"
    said = complaint(capsys, "train", "--spec", specs.spec("train", settings), *arguments, "--output", str(output))
    assert "nothing.*" in said
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_one_sentence(capsys, study, tmp_path):
    spec = specs.spec("train", specs.run_settings(study.config, "small", "judge"))
    arguments = ("--dataset", str(study.dataset), "--work", str(tmp_path / "work"), "--device", "cuda")
    said = complaint(capsys, "train", "--spec", spec, *arguments, "--output", str(tmp_path / "x.zarr.zip"))
    assert "the device 'cuda' is not available here" in said


def test_an_output_that_cannot_be_written_is_one_sentence(capsys, study, tmp_path):
    (tmp_path / "file").write_text("in the way")
    arguments = ("test", "--spec", SPEC, "--run", str(study.run("judge")), "--described", str(tmp_path / "z"))
    assert "file" in complaint(capsys, *arguments, "--output", str(tmp_path / "file" / "tests.tsv"))
    more = ("--output", str(tmp_path / "tests.tsv"), "--resources", str(tmp_path / "file" / "used.json"))
    assert "file" in complaint(capsys, *arguments, *more)


def test_a_programmers_mistake_keeps_its_traceback(monkeypatch, study, tmp_path):
    def fail(*arguments, **more):
        raise ValueError("a bug")

    monkeypatch.setattr("autospec.statistics.build.build_tests", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["test", "--spec", SPEC, "--run", "x", "--output", "y", "--described", "z"])


def test_an_unknown_command_says_which_there_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code == 2
    assert "train" in capsys.readouterr().err


def test_a_process_ends_as_its_command_did(tmp_path):
    python = (sys.executable, "-m", "autospec")
    done = run_command(*python, "init", "analysis", folder=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout
    again = run_command(*python, "init", "analysis", folder=tmp_path, PYTHONPATH=str(ROOT))
    assert again.returncode == 1
    assert again.stdout.startswith("autospec: ")
    assert again.stdout.count("\n") == 1


def test_a_reader_that_ends_early_is_no_mistake(tmp_path):
    read, write = os.pipe()
    os.close(read)  # as head does when it has its lines
    command = [sys.executable, "-m", "autospec", "init", "analysis"]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
    assert (tmp_path / "analysis/config.yaml").is_file()


def test_what_a_stage_used_is_written_beside_its_output(study, tmp_path):
    file = tmp_path / "deep" / "used.json"
    write_resources(str(file), 1.23456, 2.0, {"host": "here"})
    record = json.loads(file.read_text())
    assert (record["wall_seconds"], record["cpu_seconds"], record["host"]) == (1.23, 2.0, "here")
    assert 20 < record["peak_memory_mib"] < 100_000
    used = json.loads(study.run("judge").with_name("judge.json").read_text())
    assert used["wall_seconds"] > 0
    assert used["cpu_seconds"] > 0
    assert used["host"]


def test_init_starts_an_analysis_with_a_valid_config_and_never_overwrites_one(capsys, tmp_path):
    folder = tmp_path / "new" / "analysis"
    assert main(["init", str(folder)]) == 0
    assert f"snakemake --directory {folder}" in capsys.readouterr().out
    assert load_config(folder / "config.yaml").title == "My analysis"
    (folder / "config.yaml").write_text("mine")
    assert "exists already" in complaint(capsys, "init", str(folder))
    assert (folder / "config.yaml").read_text() == "mine"
    assert "is a file: give the name of a folder" in complaint(capsys, "init", str(folder / "config.yaml"))


def test_schema_writes_what_is_committed(capsys, tmp_path):
    assert main(["schema", "--root", str(tmp_path)]) == 0
    assert "docs/configuration.md" in capsys.readouterr().out
    assert (tmp_path / "workflow/schemas/config.schema.json").is_file()
