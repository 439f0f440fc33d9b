"""A mistake gives one sentence that says what, where and what to do."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import autospec
from autospec.errors import UserError
from autospec.introspection import WatchError
from autospec.introspection.schedule import make_schedule

N = 6
LABELS = list("aabbcc")


def model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def one_step(network, labels, x=None, **options):
    with autospec.watch(network, labels, **options) as watcher:
        network(torch.randn(N, 4) if x is None else x).square().sum().backward()
        watcher.step()


UNUSED = pd.Series(LABELS).astype(pd.CategoricalDtype(["a", "b", "c", "d"]))

# What is given, and words that the message must hold.
MISTAKES = {
    "too few labels": (model, LABELS[:-1], {}, ["5 labels", "size 5", "(6, 4)", "one label for each sample"]),
    "too many labels": (model, [*LABELS, "a"], {}, ["7 labels", "(6, 4)"]),
    "as many labels as features": (model, LABELS[:4], {}, ["samples"]),
    "a label named all": (model, [*LABELS[:-1], "all"], {}, ["'all'", "whole batch", "rename"]),
    "an unused category": (model, UNUSED, {}, ["'d'", "no member", "remove_unused_categories"]),
    "no label at all": (model, [None] * N, {}, ["every label", "missing"]),
    "groupings of different lengths": (model, {"x": LABELS, "y": LABELS[:-1]}, {}, ["different lengths", "'y': 5"]),
    "crossing an unknown grouping": (model, {"x": LABELS}, {"crossed": [("x", "z")]}, ["'z'", "no such grouping"]),
    "no matrix": (Nothing, LABELS, {}, ["Nothing", "no matrix parameter"]),
    "a convolution": (lambda: nn.Sequential(nn.Conv1d(1, 2, 3)), LABELS, {}, ["'0.weight' (Conv1d)", "unknown='skip'"]),
    "only a convolution, skipped": (
        lambda: nn.Sequential(nn.Conv1d(1, 2, 3)),
        LABELS,
        {"unknown": "skip"},
        ["no matrix parameter that can be watched"],
    ),
    "a Linear with its own forward pass": (lambda: OwnForward(4, 3), LABELS, {}, ["'weight' (OwnForward)"]),
    "attention": (lambda: nn.MultiheadAttention(4, 2), LABELS, {}, ["'in_proj_weight' (MultiheadAttention)"]),
    "a complex parameter": (lambda: nn.Linear(4, 3, dtype=torch.complex64), LABELS, {}, ["'weight' is complex"]),
    "a pattern without a match": (model, LABELS, {"layers": ["0.*", "5.*"]}, ["'5.*'", "no such matrix"]),
    "a bias selected": (model, LABELS, {"layers": ["0.bias"]}, ["'0.bias'", "no such matrix"]),
    "layers as one string": (model, LABELS, {"layers": "0.weight"}, ["'0.weight'", "list"]),
    "every zero": (model, LABELS, {"every": 0}, ["every=0", "at least 1"]),
    "every negative": (model, LABELS, {"every": -2}, ["every=-2"]),
    "every a fraction": (model, LABELS, {"every": 1.5}, ["every=1.5", "whole number"]),
    "every true": (model, LABELS, {"every": True}, ["every=True"]),
    "every and steps": (model, LABELS, {"every": 2, "steps": [1]}, ["every=", "steps=", "not both"]),
    "no steps": (model, LABELS, {"steps": []}, ["steps=", "at least one"]),
    "a negative step": (model, LABELS, {"steps": [-1]}, ["negative"]),
    "an unknown statistic": (model, LABELS, {"statistics": ["weights"]}, ["weights", "'gradient'"]),
    "statistics as one string": (model, LABELS, {"statistics": "gradient"}, ["'gradient'", "list"]),
    "no statistic": (model, LABELS, {"statistics": []}, ["one or more"]),
    "no singular value": (model, LABELS, {"singular_values": 0}, ["singular_values=0", "from 1"]),
    "an empty list of singular values": (model, LABELS, {"singular_values": []}, ["singular_values=[]"]),
    "singular values in words": (model, LABELS, {"singular_values": "some"}, ["'some'", "'all'"]),
    "singular values that no layer has": (model, LABELS, {"singular_values": [9]}, ["[9]", "'0.weight'", "only 3"]),
    "unknown misspelt": (model, LABELS, {"unknown": "ignore"}, ["'ignore'", "'refuse'", "'skip'"]),
    "audit zero": (model, LABELS, {"audit": 0}, ["audit=0"]),
    "rows of an unknown layer": (model, LABELS, {"rows": {"7.weight": [0]}}, ["'7.weight'", "not a watched"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_sentence_with_what_where_and_what_to_do(mistake):
    make, labels, options, words = MISTAKES[mistake]
    with pytest.raises(WatchError) as raised:
        one_step(make(), labels, **options)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message


def test_integer_inputs_are_refused_with_the_way_out():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(x.float())

    with pytest.raises(WatchError, match="no floating-point input"):
        one_step(Counts(), LABELS, torch.ones(N, 4, dtype=torch.int64))


def test_step_without_backward_is_refused():
    network = model()
    with autospec.watch(network, LABELS) as watcher:
        with pytest.raises(WatchError, match=r"step 0.*after loss\.backward\(\)"):
            watcher.step()
        network(torch.randn(N, 4)).sum().backward()
        watcher.step()
        network(torch.randn(N, 4))
        with pytest.raises(WatchError, match="step 1"):
            watcher.step()


def test_step_outside_the_block_is_refused():
    watcher = autospec.watch(model(), LABELS)
    with pytest.raises(WatchError, match=r"outside the watch\(\) block"):
        watcher.step()
    with watcher:
        pass
    with pytest.raises(WatchError, match=r"outside the watch\(\) block"):
        watcher.step()


def test_a_second_watcher_on_the_same_model_is_refused_until_the_first_has_left():
    network = model()
    with autospec.watch(network, LABELS):
        with pytest.raises(WatchError, match="already being watched"), autospec.watch(network, LABELS):
            pass
        with autospec.watch(model(), LABELS):
            pass
    one_step(network, LABELS)


def test_an_unknown_label_in_set_groups_is_refused_by_name():
    with autospec.watch(model(), {"x": LABELS}) as watcher:
        with pytest.raises(WatchError, match=r"'z' was not among the groups.*\['a', 'b', 'c'\]"):
            watcher.set_groups({"x": ["a", "z"]})
        with pytest.raises(WatchError, match=r"\['y'\].*\['x'\].*same groupings"):
            watcher.set_groups({"y": ["a", "b"]})


def test_groups_that_come_after_steps_without_groups_are_refused():
    network = model()
    with autospec.watch(network) as watcher:
        network(torch.randn(N, 4)).sum().backward()
        watcher.step()
        with pytest.raises(WatchError, match=r"after steps without groups.*watch\(groups="):
            watcher.set_groups(LABELS)


def test_calling_a_part_of_the_watched_model_is_refused():
    network = model()
    with autospec.watch(network, LABELS):
        loss = network[0](torch.randn(N, 4)).sum()
        network(torch.randn(N, 4))
        with pytest.raises(WatchError, match=r"'0\.weight' was used outside of a call of the watched model"):
            loss.backward()


def test_a_gradient_from_an_evaluation_pass_of_another_size_is_refused():
    network = model().eval()
    with autospec.watch(network, LABELS):
        loss = network(torch.randn(N - 1, 4)).sum()
        with pytest.raises(WatchError, match="6 labels"):
            loss.backward()


@pytest.mark.parametrize("name", ["x.zarr", "x.zarr.zip"])
def test_a_store_that_exists_is_refused_and_left_as_it_is(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=rf"{name} exists already: choose another name"):
        autospec.watch(model(), LABELS, store=tmp_path / name)
    assert (tmp_path / name).read_text() == "precious"


def test_attributes_that_a_store_cannot_hold_are_refused_before_the_training(tmp_path):
    with pytest.raises(WatchError, match=r"attributes= holds what a store cannot hold .*PosixPath"):
        autospec.watch(model(), LABELS, store=tmp_path / "x.zarr", attributes={"where": tmp_path})
    assert not (tmp_path / "x.zarr").exists()


def test_a_store_in_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="absent is not a folder: create it"):
        autospec.watch(model(), LABELS, store=tmp_path / "absent" / "x.zarr")


def test_a_schedule_never_says_anything_but_yes_or_no():
    assert make_schedule(steps=lambda step: step % 2)(3) is True
    assert make_schedule(every=np.int64(3))(6)


def test_a_step_that_is_never_called_is_noticed():
    model = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match=r"step\(\) was never called"), autospec.watch(model, ["a", "b", "a", "b"]):
        model(torch.randn(4, 3)).sum().backward()


def test_a_number_for_each_sample_is_no_grouping():
    with pytest.warns(UserWarning, match="a group of its own"):
        autospec.watch(nn.Linear(3, 2), torch.linspace(20, 60, 40))


def test_a_table_of_labels_is_refused():
    with pytest.raises(WatchError, match="more than one label for a sample"):
        autospec.watch(nn.Linear(3, 2), torch.zeros(4, 2))
