"""A training that is killed, runs out of disk, or is given more epochs goes on as if nothing had happened."""

import copy
import errno
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from autospec import open_trajectories, specs
from autospec.datasets.labelled import open_labelled, write_labelled
from autospec.errors import UserError
from autospec.training import Frequency, checkpoints, train_run
from autospec.training import snapshots as snapshots_module
from autospec.training import stage as stage_module
from tests.conftest import ROOT, run_command


def settings_of(study, run: str, **training) -> dict:
    """Settings of one of the study's runs: each update recorded, some of its training's replaced."""
    settings = copy.deepcopy(specs.run_settings(study.config, "small", run))
    settings["training"].update({"epochs": 70, "snapshots": 6, **training})
    settings["introspection"]["every"] = 1
    return settings


def train(study, settings: dict, folder: Path, name: str = "x", every: int = 10**6, work: str = "work", code="code"):
    """Train; return the bytes of the trajectories and of the weights."""
    output, weights = folder / f"{name}.zarr.zip", folder / f"{name}.weights.pt"
    train_run(
        settings,
        code,
        str(study.dataset),
        str(output),
        str(folder / work),
        "cpu",
        str(weights),
        Frequency(updates=every),
    )
    return output.read_bytes(), weights.read_bytes()


@pytest.mark.parametrize(
    ("run", "training"),
    [
        ("judge", {}),
        ("coder", {"microbatch": 7}),
        ("judge", {"batch": 5, "epochs": 17, "optimizer": "sgd", "precision": "bfloat16"}),
    ],
    ids=["full batch", "micro-batches", "mini-batches in bfloat16"],
)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(study, tmp_path, run, training):
    seed = random.randrange(10**6)
    print("seed of the kills:", seed)
    job = {
        "settings": settings_of(study, run, **training),
        "dataset": str(study.dataset),
        "folder": str(tmp_path),
        "seed": seed,
        "every": 2 + seed % 3,
    }
    done = run_command(sys.executable, "-m", "tests.training.killed", json.dumps(job), folder=ROOT, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.splitlines()[-1]) >= 1, done.stdout
    for ending in ("zarr.zip", "weights.pt"):
        killed, undisturbed = (tmp_path / f"{name}.{ending}" for name in ("killed", "undisturbed"))
        assert killed.read_bytes() == undisturbed.read_bytes(), (ending, seed)
    assert open_trajectories(tmp_path / "killed.zarr.zip").sizes["step"] >= 64


@pytest.mark.parametrize("batch", ["full", 8])
def test_more_epochs_go_on_from_the_last_and_give_what_they_would_have_given_at_once(study, tmp_path, batch, capfd):
    settings = settings_of(study, "judge", batch=batch)
    train(study, settings_of(study, "judge", epochs=20, batch=batch), tmp_path)
    train(study, settings_of(study, "judge", epochs=33, batch=batch), tmp_path)
    in_an_epoch = 1 if batch == "full" else 3
    assert f"going on from update {20 * in_an_epoch} of {33 * in_an_epoch}" in capfd.readouterr().err
    continued = train(study, settings, tmp_path)
    assert continued == train(study, settings, tmp_path, name="at_once", work="other")


def test_fewer_epochs_begin_again(study, tmp_path, capfd):
    train(study, settings_of(study, "judge", epochs=40), tmp_path)
    capfd.readouterr()
    fewer = train(study, settings_of(study, "judge", epochs=30), tmp_path)
    assert "going on" not in capfd.readouterr().err
    assert fewer == train(study, settings_of(study, "judge", epochs=30), tmp_path, name="at_once", work="other")


@pytest.mark.parametrize("change", ["settings", "code", "data"])
def test_a_checkpoint_of_something_else_is_not_gone_on_from_and_is_removed_at_the_end(study, tmp_path, change, capfd):
    train(study, settings_of(study, "judge"), tmp_path)
    (before,) = (tmp_path / "work/small/judge").iterdir()
    settings = settings_of(study, "judge", **({"learning_rate": 0.02} if change == "settings" else {}))
    if change == "data":
        other = copy.copy(study)
        other.dataset = tmp_path / "other.zarr.zip"
        write_labelled(open_labelled(study.dataset).assign_attrs(note="another"), other.dataset)
        study = other
    train(study, settings, tmp_path, code="other" if change == "code" else "code")
    assert "going on" not in capfd.readouterr().err
    (after,) = (tmp_path / "work/small/judge").iterdir()
    assert after != before


def broken_off(study, tmp_path, at: int) -> dict:
    """Break a training off at an update, with a checkpoint after every second."""
    settings = settings_of(study, "judge")
    original = stage_module._Run._update

    def update(run, watcher):
        if run.done == at:
            raise KeyboardInterrupt
        return original(run, watcher)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module._Run, "_update", update)
        with pytest.raises(KeyboardInterrupt):
            train(study, settings, tmp_path, every=2)
    return settings


def test_going_on_elsewhere_says_so_and_records_it(study, tmp_path, monkeypatch, capfd):
    settings = broken_off(study, tmp_path, 31)
    assert not list(tmp_path.glob("x.*"))
    elsewhere = {"device": "cpu", "threads": 64, "processor": "abacus"}
    monkeypatch.setattr(stage_module, "environment", lambda device: elsewhere)
    train(study, settings, tmp_path)
    said = capfd.readouterr().err
    assert "goes on on cpu (64 threads, abacus): the results are equal to rounding, not to the last bit" in said
    (entry,) = open_trajectories(tmp_path / "x.zarr.zip").attrs["elsewhere"]
    assert entry["update"] == 30
    assert entry["now"] == elsewhere
    assert entry["before"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("where", ["checkpoint", "weights", "store"])
def test_a_full_disk_loses_nothing(study, tmp_path, monkeypatch, where):
    expected = train(study, settings_of(study, "judge"), tmp_path, name="expected", work="other")
    settings = broken_off(study, tmp_path, 31)
    (folder,) = (tmp_path / "work/small/judge").iterdir()
    checkpoint = (folder / "checkpoint.pt").read_bytes()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "store":
            patch.setattr("zarr.Array.__setitem__", full)
        elif where == "checkpoint":
            patch.setattr(snapshots_module.os, "fsync", full)
        else:
            patch.setattr(stage_module, "write_snapshots", full)
        with pytest.raises(UserError, match=r"small/judge: the disk is full at update \d+, in .*: make room and start"):
            train(study, settings, tmp_path, every=2 if where == "checkpoint" else 10**6)
    if where != "weights":
        assert (folder / "checkpoint.pt").read_bytes() == checkpoint
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    assert not (tmp_path / "x.zarr.zip").exists()
    assert train(study, settings, tmp_path) == expected


def test_a_disk_that_is_really_full_gives_one_sentence(study, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the same place."""
    settings = settings_of(study, "coder")
    spec = json.dumps({"code": "code", "settings": settings})
    command = (
        f"trap '' XFSZ; ulimit -f 8; exec {sys.executable} -m autospec train --spec '{spec}' --dataset {study.dataset} "
        f"--work {tmp_path}/work --device cpu --output {tmp_path}/x.zarr.zip --weights {tmp_path}/x.pt "
        "--checkpoint-updates 3"
    )
    done = run_command("bash", "-c", command, folder=ROOT)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    assert done.stdout.count("autospec: ") == 1, done.stdout
    assert "checkpoint.pt" not in {path.name for path in tmp_path.rglob("*")}
    assert not list(tmp_path.glob("x.*"))


def test_a_checkpoint_that_cannot_be_read_is_begun_anew_and_says_so(study, tmp_path, capfd):
    expected = train(study, settings_of(study, "judge"), tmp_path, name="expected", work="other")
    settings = broken_off(study, tmp_path, 31)
    (folder,) = (tmp_path / "work/small/judge").iterdir()
    (folder / "checkpoint.pt").write_bytes(b"torn")
    assert train(study, settings, tmp_path) == expected
    assert "checkpoint.pt cannot be read" in capfd.readouterr().err


def test_a_checkpoint_holds_tensors_and_plain_values_alone(study, tmp_path):
    broken_off(study, tmp_path, 31)
    (folder,) = (tmp_path / "work/small/judge").iterdir()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["updates"] == 30
    assert set(state["trainer"]) == {"model", "optimizer", "scaler", "random", "microbatches"}
    assert len(state["curves"]["loss"]) == len(state["update_seconds"]) == 30


def test_checkpoints_come_by_minutes_or_by_updates(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    by_minutes = checkpoints.Checkpoints(tmp_path, Frequency(minutes=0.5))
    by_updates = checkpoints.Checkpoints(tmp_path, Frequency(minutes=0.5, updates=4))
    assert not by_minutes.due(4)
    assert [by_updates.due(updates) for updates in (3, 4, 6, 8)] == [False, True, False, True]
    now[0] += 30
    assert by_minutes.due(1)
    assert not by_updates.due(5)
    by_minutes.write({"updates": 1})
    assert not by_minutes.due(2)
