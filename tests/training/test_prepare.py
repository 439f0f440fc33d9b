"""Samples and labels as a training gets them."""

import copy
import random

import numpy as np
import pytest
import torch

from autospec import open_trajectories, specs
from autospec.datasets.freesurfer import make_features
from autospec.datasets.labelled import labelled, open_labelled, write_labelled
from autospec.errors import UserError
from autospec.introspection.generators import restore_random_state
from autospec.training import Frequency, prepare, train_run
from autospec.training import stage as stage_module
from autospec.training.prepare import groupings_of, standardised
from autospec.training.snapshots import open_snapshots

DIAGNOSIS = ["SZ", "HC", "SZ", "HC", "HC", "SZ", "HC", "HC", "SZ", "HC", "SZ", "HC"]
SEX = ["F", "M", "M", "F", "n/a", "F", "M", "F", "M", "", "F", "M"]


def people(
    tmp_path,
    kind: str = "timeseries",
    x: np.ndarray | None = None,
    subjects: list[str] | None = None,
    diagnosis: list[str] = DIAGNOSIS,
) -> str:
    """A data set of twelve people."""
    values = np.random.default_rng(0).normal(5, 3, size=(12, 6)) if x is None else x
    names = [f"sub-{number:02d}" for number in range(12)]
    dataset = labelled(values, ("region",), names, diagnosis, {"sex": SEX}, {"kind": kind})
    if subjects is not None:
        dataset = dataset.assign_coords(subject=("sample", np.array(subjects, dtype=np.dtypes.StringDType())))
    write_labelled(dataset, tmp_path / "people.zarr.zip")
    return str(tmp_path / "people.zarr.zip")


def settings_of(study, groupings: list[str], **changes) -> dict:
    """Settings of the study's classifier with other groupings."""
    settings = {**copy.deepcopy(specs.run_settings(study.config, "small", "judge")), "groupings": groupings}
    settings["training"].update(changes)
    return settings


@pytest.mark.parametrize(
    ("groupings", "groups"),
    [
        ([], ["all", "HC", "SZ"]),
        (["diagnosis"], ["all", "HC", "SZ"]),
        (["sex"], ["all", "F", "M"]),
        (["diagnosis", "sex"], ["all", "diagnosis=HC", "diagnosis=SZ", "sex=F", "sex=M"]),
        (
            ["diagnosis x sex"],
            [
                *("all", "diagnosis=HC", "diagnosis=SZ", "sex=F", "sex=M", "diagnosis=HC & sex=F"),
                *("diagnosis=HC & sex=M", "diagnosis=SZ & sex=F", "diagnosis=SZ & sex=M"),
            ],
        ),
    ],
)
def test_groupings_become_groups(study, tmp_path, groupings, groups):
    settings = settings_of(study, groupings, held_out=0.0)
    train_run(settings, "code", people(tmp_path), str(tmp_path / "x.zarr.zip"), str(tmp_path / "work"), "cpu")
    tree = open_trajectories(tmp_path / "x.zarr.zip")
    assert tree["group"].values.tolist() == groups
    sizes = dict(zip(groups, tree["group_size"].values[0].tolist(), strict=True))
    assert tree.attrs["training_samples"] == sizes
    assert sizes["all"] == 12  # whoever has no label counts there
    for name, size in sizes.items():
        wanted = [part.rpartition("=")[2] for part in name.split(" & ")]
        if name != "all":
            both = zip(DIAGNOSIS, SEX, strict=True)
            assert size == sum(set(wanted) <= {diagnosis, sex} for diagnosis, sex in both), name
    assert tree.attrs["performance"] == {"held_out": 0, "at_chance": None}
    assert not [name for name in tree["training"] if str(name).startswith("held_out")]


def test_a_label_that_is_not_known_belongs_to_no_group(study, tmp_path):
    prepared = prepare(settings_of(study, ["sex"], held_out=0.0), people(tmp_path), torch.device("cpu"))
    assert prepared.labels["sex"][4] is prepared.labels["sex"][9] is None
    assert prepared.groups([3, 4]) == ["F", None]


def test_only_what_is_trained_on_has_groups_and_whole_subjects_are_held_out(study, tmp_path):
    # Two scans each of the first four people; their diagnoses differ between scans only where the people do.
    subjects = ["a", "b", "a", "b", "c", "d", "c", "e", "d", "f", "g", "h"]
    dataset = people(tmp_path, subjects=subjects)
    prepared = prepare(settings_of(study, ["diagnosis"], held_out=0.4), dataset, torch.device("cpu"))
    assert not set(prepared.training.subjects) & set(prepared.held_out.subjects)
    assert len(set(prepared.held_out.subjects)) == 3
    assert len(prepared.training) + len(prepared.held_out) == 12
    rows = [int(name.removeprefix("sub-")) for name in prepared.training.ids]
    assert prepared.labels["diagnosis"] == [DIAGNOSIS[row] for row in rows]
    assert prepared.target.tolist() == [["HC", "SZ"].index(DIAGNOSIS[row]) for row in rows]


def test_volumes_are_standardised_on_the_training_samples_alone(study, tmp_path):
    raw = np.random.default_rng(1).normal(4000, 300, size=(12, 6))
    raw[:, 2] = 1234.5
    settings = settings_of(study, [], held_out=0.3)
    prepared = prepare(settings, people(tmp_path, "freesurfer", raw), torch.device("cpu"))
    training = prepared.x.double()
    varying = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(training.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(training.std(0, correction=0)[varying], 1, atol=1e-6)
    assert (training[:, 2] == 0).all()
    assert prepared.held_out.x.double().mean(0).abs().max() > 0.05
    # Another unit of the volumes is another affine map, which cancels.
    other = prepare(settings, people(tmp_path, "freesurfer", raw * 0.001 + 7), torch.device("cpu"))
    np.testing.assert_allclose(other.x, prepared.x, atol=2e-3)  # float32 keeps fewer digits of what has been shifted
    assert (
        torch.equal(prepare(settings, people(tmp_path, "maps", raw), torch.device("cpu")).x[0], prepared.x[0]) is False
    )


def test_the_line_from_heads_to_volumes_is_fitted_to_the_training_samples_alone(study, tmp_path):
    """From volumes to what the network sees, against least squares in mm^3 by numpy."""
    generator = np.random.default_rng(4)
    heads = generator.normal(1.5e6, 1.5e5, size=12)
    volumes = 1000 + heads[:, None] * generator.uniform(1e-3, 4e-3, size=6) + generator.normal(0, 150, size=(12, 6))
    volumes[10:] *= 3  # whoever is held out would bend a line through everybody
    names = [f"sub-{number:02d}" for number in range(12)]
    everybody = np.ones(12, dtype=bool)
    made = make_features(volumes, list("abcdef"), heads, names, "residual", everybody)
    dataset = labelled(
        made.x,
        ("region",),
        names,
        DIAGNOSIS,
        {"sex": SEX},
        {"kind": "freesurfer", "icv": "residual"},
        covariates={"intracranial_volume": list(heads)},
    )
    write_labelled(dataset, tmp_path / "volumes.zarr.zip")
    settings = settings_of(study, [], held_out=0.25)
    prepared = prepare(settings, str(tmp_path / "volumes.zarr.zip"), torch.device("cpu"))
    trained = np.isin(names, prepared.training.ids)
    assert 0 < (~trained).sum() < 12
    design = np.stack([np.ones(12), heads], axis=1)
    line = np.linalg.lstsq(design[trained], volumes[trained], rcond=None)[0]
    rest = volumes - design @ line
    expected = (rest - rest[trained].mean(0)) / rest[trained].std(0)
    np.testing.assert_allclose(prepared.training.x.numpy(), expected[trained], atol=1e-4)
    np.testing.assert_allclose(prepared.held_out.x.numpy(), expected[~trained], rtol=1e-4, atol=1e-4)
    # A line through everybody is another one.
    assert np.abs(made.x[~trained] - expected[~trained]).max() > 0.1


def test_scaling_is_that_of_the_training_rows():
    x = np.array([[1.0], [3.0], [100.0]], dtype=np.float32)
    np.testing.assert_allclose(standardised(x, np.array([True, True, False])), [[-1], [1], [98]])


@pytest.mark.parametrize(
    ("groupings", "x", "says"),
    [
        (["site"], None, "no grouping 'site'"),
        ([], "nan", "holds values that are not finite, first in 'sub-07': correct the data set"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(study, tmp_path, groupings, x, says):
    values = np.random.default_rng(0).normal(size=(12, 6))
    if x:
        values[7, 3] = np.nan
    dataset = people(tmp_path, x=values)
    with pytest.raises(UserError, match=says):
        train_run(
            settings_of(study, groupings), "code", dataset, str(tmp_path / "x.zarr.zip"), str(tmp_path / "work"), "cpu"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["people.zarr.zip"]


def test_more_groups_than_samples_are_refused(study, tmp_path):
    settings = settings_of(study, ["diagnosis x sex"], held_out=0.5)
    with pytest.raises(UserError, match="small/judge has 8 groups, but only 6 samples to train on: choose fewer"):
        prepare(settings, people(tmp_path), torch.device("cpu"))


def test_a_classifier_of_one_class_is_refused_and_an_autoencoder_is_not(study, tmp_path):
    dataset, settings = people(tmp_path, diagnosis=["SZ"] * 12), settings_of(study, [])
    with pytest.raises(UserError, match=r"small/judge is a classifier, but every sample of .* is 'SZ': give it data"):
        prepare(settings, dataset, torch.device("cpu"))
    prepare({**settings, "task": "autoencoder"}, dataset, torch.device("cpu"))


def test_crossings_are_read_from_their_names(tmp_path):
    labels, crossed = groupings_of(open_labelled(people(tmp_path)), ["diagnosis", "diagnosis x sex"])
    assert list(labels) == ["diagnosis", "sex"]
    assert crossed == [("diagnosis", "sex")]
    assert labels["diagnosis"] == DIAGNOSIS


NETWORK = """
import torch
from torch import nn


class Noisy(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.layer = nn.Linear(shape[0], classes)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        if self.training and len(x) != 12 and {wrong}:
            return self.layer(x)[:, :1]
        return self.layer(self.drop(x))
"""


def test_a_users_own_network_keeps_its_random_numbers(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noisy_network.py").write_text(NETWORK.format(wrong=False))
    settings = {**settings_of(study, []), "model": "noisy_network:Noisy"}
    dataset = people(tmp_path)
    train_run(settings, "code", dataset, str(tmp_path / "x.zarr.zip"), str(tmp_path / "work"), "cpu", "x.pt")
    kept = open_snapshots("x.pt")
    prepared = kept.rebuild(dataset, 5)
    losses = open_trajectories("x.zarr.zip")["training/loss"].values
    restore_random_state(kept.random_state(5), prepared.device)
    assert prepared.criterion(prepared.model(prepared.x), prepared.answer).item() == losses[5]
    assert prepared.criterion(prepared.model(prepared.x), prepared.answer).item() != losses[5]


DRAWING = """
import random

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.first, self.second = nn.Linear(shape[0], 6), nn.Linear(6, classes)
        with torch.no_grad():
            self.second.bias[0] += np.random.rand()

    def forward(self, x):
        if self.training and random.random() < 0.5:
            x = x * float(np.random.rand())
        return self.second(torch.tanh(self.first(x)))
"""


def test_a_network_that_draws_from_pythons_and_numpys_generators_trains_alike_each_time_and_after_an_interruption(
    study, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drawing_network.py").write_text(DRAWING)
    settings = {**settings_of(study, []), "model": "drawing_network:Net"}
    dataset = people(tmp_path)
    losses = []
    for name in ("once", "again", "interrupted"):
        random.seed(len(losses))
        arguments = (
            settings,
            "code",
            dataset,
            f"{name}.zarr.zip",
            f"work-{name}",
            "cpu",
            f"{name}.pt",
            Frequency(updates=2),
        )
        if name == "interrupted":
            update = stage_module._Run._update

            def broken_off(run, watcher, update=update):
                if run.done == 3:
                    raise KeyboardInterrupt
                return update(run, watcher)

            with monkeypatch.context() as patch:
                patch.setattr(stage_module._Run, "_update", broken_off)
                with pytest.raises(KeyboardInterrupt):
                    train_run(*arguments)
        train_run(*arguments)
        losses.append(open_trajectories(f"{name}.zarr.zip")["training/loss"].values)
    assert (losses[0] == losses[1]).all()
    assert (losses[0] == losses[2]).all()
    kept = open_snapshots("once.pt")
    prepared = kept.rebuild(dataset, 5)
    restore_random_state(kept.random_state(5), prepared.device)
    assert prepared.criterion(prepared.model(prepared.x), prepared.answer).item() == losses[0][5]


def test_a_users_own_network_that_returns_another_shape_in_training_is_refused(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong_network.py").write_text(NETWORK.format(wrong=True))
    settings = {**settings_of(study, []), "model": "wrong_network:Noisy"}
    with pytest.raises(UserError, match=r"'wrong_network:Noisy' of small/judge returns \(10, 1\) for 10 samples"):
        train_run(settings, "code", people(tmp_path), str(tmp_path / "x.zarr.zip"), str(tmp_path / "work"), "cpu")
