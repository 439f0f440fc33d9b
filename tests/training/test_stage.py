"""The training stage: equal to a plain PyTorch loop, whole or absent, and honest about what went wrong."""

import copy
import json
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from autospec import open_trajectories, specs
from autospec.datasets.labelled import open_labelled
from autospec.errors import UserError
from autospec.paths import result
from autospec.training import chosen_device, open_snapshots, train_run
from autospec.training import progress as progress_module
from autospec.training.loop import Trainer
from autospec.training.progress import Clock, Progress


def settings_of(study, run: str, **changes) -> dict:
    """Settings of one of the study's runs, with some of its training's replaced."""
    settings = copy.deepcopy(specs.run_settings(study.config, "small", run))
    settings["training"].update(changes)
    return settings


def plain_network(run: str, features: int) -> nn.Sequential:
    """The study's networks, written by hand."""
    if run == "judge":
        return nn.Sequential(nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, 3))
    return nn.Sequential(
        *(nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()),
        *(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, features)),
    )


def weights(study, run: str):
    """The weights that one of the study's runs has kept."""
    return open_snapshots(study.folder / result("weights", experiment="small", run=run))


def samples_of(study, run: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and class numbers of the samples that a run was trained on."""
    dataset = open_labelled(study.dataset)
    chosen = ~np.isin(dataset["id"].values.astype(object), weights(study, run).held_out)
    x = torch.tensor(dataset["x"].values[chosen]).flatten(1)
    return x, torch.tensor([["0", "1", "3"].index(label) for label in dataset["target"].values[chosen]])


@pytest.mark.parametrize("run", ["coder", "judge"])
def test_the_loss_is_bitwise_that_of_a_plain_loop(study, run):
    x, target = samples_of(study, run)
    assert len(x) == 19
    torch.manual_seed(0)
    model = plain_network(run, x.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses, accuracies = [], []
    for _ in range(12):
        optimizer.zero_grad()
        output = model(x)
        loss = nn.functional.mse_loss(output, x) if run == "coder" else nn.functional.cross_entropy(output, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        accuracies.append((output.argmax(1) == target).sum().item() / len(x))
    recorded = open_trajectories(study.run(run))["training"]
    assert recorded["loss"].values.tolist() == losses
    assert losses[-1] < losses[0]
    if run == "judge":
        assert recorded["accuracy"].values.tolist() == accuracies
    else:
        assert "accuracy" not in recorded
        variance = (x.double() - x.double().mean(0)).square().mean().item()
        np.testing.assert_allclose(recorded["explained"], 1 - np.array(losses) / variance, rtol=1e-12)


@pytest.mark.parametrize("run", ["coder", "judge"])
def test_the_final_weights_and_those_at_each_update_are_bitwise_a_plain_loops(study, run):
    x, target = samples_of(study, run)
    torch.manual_seed(0)
    model = plain_network(run, x.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    kept = weights(study, run)
    assert kept.steps == tuple(range(12))
    for step in kept.steps:
        for plain, ours in zip(model.state_dict().values(), kept.weights(step).values(), strict=True):
            assert torch.equal(plain, ours)
        optimizer.zero_grad()
        output = model(x)
        loss = nn.functional.mse_loss(output, x) if run == "coder" else nn.functional.cross_entropy(output, target)
        loss.backward()
        optimizer.step()
    for plain, ours in zip(model.state_dict().values(), kept.weights().values(), strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("run", ["coder", "judge"])
def test_the_first_gradients_are_those_of_float64(study, run):
    x, target = samples_of(study, run)
    torch.manual_seed(0)
    model = plain_network(run, x.shape[1]).double()
    names = open_trajectories(study.run(run)).attrs["layers"]
    matrices = [value for value in model.parameters() if value.ndim == 2]
    assert len(names) == len(matrices)
    tree = open_trajectories(study.run(run))
    for number, group in enumerate(["0", "1", "3"]):
        output = model(x.double())
        members = target == number
        # The part of the mean loss that the group's samples contribute: its gradient is the group's share.
        if run == "coder":
            part = ((output - x.double())[members] ** 2).sum() / x.numel()
        else:
            part = nn.functional.cross_entropy(output[members], target[members], reduction="sum") / len(x)
        for name, share in zip(names, torch.autograd.grad(part, matrices), strict=True):
            expected = torch.linalg.svdvals(share).numpy()
            recorded = tree[f"layers/{name}/gradient"].sel(step=0, group=group).values
            np.testing.assert_allclose(recorded, expected, rtol=0, atol=2e-5 * expected[0])


def test_two_trainings_give_the_same_bytes_and_another_seed_gives_others(study, tmp_path):
    made = []
    for number, seed in enumerate([0, 0, 1]):
        output = tmp_path / f"{number}.zarr.zip"
        settings = settings_of(study, "judge", seed=seed)
        train_run(settings, "code", str(study.dataset), str(output), str(tmp_path / f"work-{number}"), "cpu")
        made.append(output.read_bytes())
    assert made[0] == made[1] != made[2]


def test_the_store_says_where_it_came_from_and_holds_no_time_or_place(study):
    tree = open_trajectories(study.run("judge"))
    assert tree.attrs["settings"] == specs.run_settings(study.config, "small", "judge")
    assert tree.attrs["versions"]["torch"] == torch.__version__
    assert tree.attrs["dataset"]["kind"] == "mnist"
    with zipfile.ZipFile(study.run("judge")) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.namelist() == sorted(archive.namelist())
        assert not any(str(study.folder).encode() in archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize("every", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_what_was_recorded(study, tmp_path, every):
    settings = settings_of(study, "coder", learning_rate=1e30)
    settings["introspection"]["every"] = every
    output = tmp_path / "results" / "x.zarr.zip"
    with pytest.raises(UserError, match=r"no longer finite at update 1: lower learning_rate \(1e\+30\)"):
        train_run(settings, "code", str(study.dataset), str(output), str(tmp_path / "work"), "cpu")
    assert not output.parent.exists() or not list(output.parent.iterdir())
    (store,) = (tmp_path / "work" / "small" / "coder").glob("*/trajectories.zarr")
    kept = open_trajectories(store)
    assert kept["step"].values[0] == 0
    assert np.isfinite(kept["layers/encoder.0.weight/gradient"].sel(step=0, group="all").values).all()
    assert np.isfinite(kept["training/loss"].values).tolist() == [True, False]
    with pytest.raises(UserError, match="no longer finite at update 1"):  # and again, not from a spoiled checkpoint
        train_run(settings, "code", str(study.dataset), str(output), str(tmp_path / "work"), "cpu")


def test_weights_that_the_last_update_has_spoiled_are_no_result(study, tmp_path, monkeypatch):
    def spoil(trainer):
        trainer.model.encoder[0].weight.data[0, 0] = torch.inf

    monkeypatch.setattr(Trainer, "step", spoil)
    settings = settings_of(study, "coder", epochs=1)
    for _ in range(2):
        with pytest.raises(UserError, match="no longer finite at update 1"):
            train_run(settings, "code", str(study.dataset), str(tmp_path / "x.zarr.zip"), str(tmp_path / "work"), "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps", "abacus"):
        with pytest.raises(
            UserError, match=rf"the device '{name}' is not available here: choose one of \['auto', 'cpu'\]"
        ):
            chosen_device(name)
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("auto") == torch.device("cuda")


def test_the_file_beside_the_results_says_where_the_time_went(study):
    record = json.loads((study.folder / result("run_resources", experiment="small", run="judge")).read_text())
    assert set(record["seconds"]) == {"start_up", "training", "introspection", "evaluation", "input_output"}
    assert all(seconds >= 0 for seconds in record["seconds"].values())
    assert sum(record["seconds"].values()) <= record["wall_seconds"] + 0.05
    spread = record["seconds_per_update"]
    assert 0 < spread["5 %"] <= spread["median"] <= spread["95 %"]
    each = record["seconds_of_each_update"]
    assert len(each) == 12
    assert np.median(each) == pytest.approx(spread["median"], abs=1e-6)
    assert 0.5 * record["seconds"]["training"] < sum(each) < record["wall_seconds"]
    assert (record["updates"], record["sessions"], record["device"]) == (12, 1, "cpu")


def test_time_within_a_block_counts_once(monkeypatch):
    ticks = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(ticks))
    clock = Clock()
    with clock.measure("outer"), clock.measure("inner"):
        pass
    assert clock.seconds == {"outer": 7.0, "inner": 3.0}


def test_a_grouping_that_is_not_there_is_refused(study, tmp_path):
    settings = {**settings_of(study, "judge"), "groupings": ["sex"]}
    with pytest.raises(UserError, match="no grouping 'sex'"):
        train_run(settings, "code", str(study.dataset), str(tmp_path / "x.zarr.zip"), str(tmp_path / "work"), "cpu")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_a_line_now_and_then_and_always_the_last(capsys, monkeypatch):
    clock = iter([100.0, 101.0, 106.0, 107.0, 107.5])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    progress = Progress("small/judge", 4)
    for done, loss in enumerate([4.0, 3.0, 2.0, 1.0]):
        progress.show(done, f"loss {loss:g}")
    assert capsys.readouterr().err.splitlines() == [
        "small/judge: update 2 of 4, loss 3, 6 s left",
        "small/judge: update 4 of 4, loss 1, 0 s left",
    ]
