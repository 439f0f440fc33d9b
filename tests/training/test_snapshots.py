"""Weights at some updates: which are kept, and that a network can be built from them again."""

import copy

import numpy as np
import pytest
import torch

from autospec import specs
from autospec.datasets.labelled import open_labelled, write_labelled
from autospec.errors import UserError
from autospec.paths import result
from autospec.training import open_snapshots, snapshot_updates, train_run
from autospec.training.snapshots import growing_updates, kept_updates, save


@pytest.mark.parametrize("count", [1, 2, 3, 6, 20, 100])
@pytest.mark.parametrize("updates", [1, 2, 7, 100, 1000, 4321])
def test_a_number_of_snapshots_goes_from_first_to_last_and_is_dense_at_the_start(count, updates):
    found = snapshot_updates(count, updates)
    assert len(found) == min(count, updates)
    assert found[-1] == updates - 1
    assert found == sorted(set(found))
    if count > 1:
        assert found[0] == 0
    gaps = np.diff(found)
    if count >= 6 and updates >= 10 * count:
        assert gaps[0] <= max(3, updates / 500)
        assert gaps[:2].mean() < gaps[-2:].mean() / 4


def test_a_longer_training_has_kept_what_it_needs_wherever_it_was_continued():
    for early, late in [(12, 60), (12, 100), (70, 100), (100, 1000), (999, 1001)]:
        kept = set(kept_updates(20, early)) | {update for update in kept_updates(20, late) if update >= early}
        assert set(snapshot_updates(20, late)) <= kept
        assert growing_updates(20, late)[: len(growing_updates(20, early))] == growing_updates(20, early)


def test_a_list_is_kept_as_far_as_the_training_goes():
    assert snapshot_updates([50, 0, 3], 10) == [0, 3]
    with pytest.raises(UserError, match=r"training\.snapshots begins at 50, but the 10 updates"):
        snapshot_updates([50, 60], 10)


def test_equal_content_gives_equal_bytes_whatever_objects_it_is_made_of(tmp_path):
    def content(joined: bool) -> dict:
        name = "".join(["wei", "ght"]) if joined else "weight"
        view = torch.arange(12.0).reshape(3, 4)[:, ::2] if joined else torch.arange(12.0).reshape(3, 4)[:, ::2].clone()
        return {"a": {name: view}, "b": {"weight": torch.zeros(2)}, "steps": (1, 2) if joined else [1, 2]}

    for number, joined in enumerate([True, False]):
        save(content(joined), tmp_path / f"{number}.pt")
    assert (tmp_path / "0.pt").read_bytes() == (tmp_path / "1.pt").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0.pt", "1.pt"]


def test_the_network_of_a_snapshot_is_built_again_with_its_samples(study):
    path = study.folder / result("weights", experiment="small", run="judge")
    content = torch.load(path, weights_only=True)
    assert set(content) == {"format", "updates", "final", "spec", "data", "held_out", "rng"}
    kept = open_snapshots(path)
    prepared = kept.rebuild(str(study.dataset), 4)
    assert prepared.settings == specs.run_settings(study.config, "small", "judge")
    assert len(prepared.training) == 19
    assert len({*prepared.training.ids, *kept.held_out}) == 24
    for name, value in prepared.model.state_dict().items():
        assert torch.equal(value, content["updates"][4][name])
    assert not torch.equal(kept.weights(4)["encoder.0.weight"], kept.weights()["encoder.0.weight"])
    fresh = prepared.with_initial_weights()
    assert torch.equal(fresh.model.state_dict()["encoder.0.weight"], kept.weights(0)["encoder.0.weight"])


def test_weights_and_data_that_do_not_belong_together_are_refused(study, tmp_path):
    path = study.folder / result("weights", experiment="small", run="judge")
    kept = open_snapshots(path)
    with pytest.raises(UserError, match=r"no weights were kept before update 99: choose one of \[0, 1, 2"):
        kept.weights(99)
    other = tmp_path / "other.zarr.zip"
    samples = open_labelled(study.dataset)
    write_labelled(samples.assign(x=samples["x"] * 2), other)
    with pytest.raises(UserError, match="is not what small/judge was trained on"):
        kept.rebuild(str(other), 0)
    with pytest.raises(UserError, match="there are no weights at"):
        open_snapshots(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pt cannot be read"):
        open_snapshots(tmp_path / "text.pt")
    save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds no weights that autospec train wrote"):
        open_snapshots(tmp_path / "other.pt")
    save({"format": 7}, tmp_path / "seven.pt")
    with pytest.raises(
        UserError, match=r"seven\.pt was written by another version of autospec: train that network again"
    ):
        open_snapshots(tmp_path / "seven.pt")


def test_only_as_many_as_wanted_are_written(study, tmp_path):
    settings = copy.deepcopy(specs.run_settings(study.config, "small", "judge"))
    settings["training"].update(epochs=40, snapshots=5)
    arguments = [
        str(study.dataset),
        str(tmp_path / "x.zarr.zip"),
        str(tmp_path / "work"),
        "cpu",
        str(tmp_path / "x.pt"),
    ]
    train_run(settings, "code", *arguments)
    assert list(open_snapshots(tmp_path / "x.pt").steps) == snapshot_updates(5, 40)


def test_a_snapshot_after_the_last_update_of_mini_batches_is_refused(study, tmp_path):
    settings = copy.deepcopy(specs.run_settings(study.config, "small", "judge"))
    settings["training"].update(epochs=2, batch=8, snapshots=[0, 500])
    paths = [str(tmp_path / name) for name in ("x.zarr.zip", "work")]
    with pytest.raises(
        UserError, match=r"has no update 500, which training\.snapshots names: its \d+ updates are numbered"
    ):
        train_run(settings, "code", str(study.dataset), *paths, "cpu", str(tmp_path / "x.pt"))
