"""A mistake gives one sentence that says what, where and what to do."""

import copy
import functools
import types
import warnings

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


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.prototypes = nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        return torch.cdist(x, self.prototypes)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.EmbeddingBag(4, 3)

    def forward(self, x):
        return self.inner(x.abs().long() // 9)


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def replaced_forward():
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)
    return layer


class Linear(nn.Module):
    """As torch_geometric and timm have one."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return x @ self.weight.T


class OwnConvolution(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.index_select(0, x.argmax(1)[:3] // 9), bias)


class Noisy(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, torch.normal(self.weight, 0.1), self.bias)


class OwnLSTM(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0] * 2


class OwnMatrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2, 3, 3))
        self.table = nn.Parameter(torch.ones(N, 4))

    def forward(self, x):
        hidden = torch.cdist(x, self.table)[:, :4] @ self.first
        return torch.einsum("ni,nj,oij->no", hidden, hidden, self.second)


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
    "distances": (
        Distances,
        LABELS,
        {},
        ["'prototypes' in cdist()", "products and convolutions of data", "layers=['!prototypes']"],
    ),
    "only a bilinear form, skipped": (
        lambda: nn.Sequential(nn.Bilinear(4, 4, 3)),
        LABELS,
        {"unknown": "skip"},
        ["no matrix parameter that can be watched"],
    ),
    "labels as one string": (model, "SZ", {}, ["groups='SZ'", "one label for each sample"]),
    "a single number as labels": (model, torch.tensor(1), {}, ["groups=tensor(1)", "one label for each sample"]),
    "a table as labels": (
        model,
        pd.DataFrame({"diagnosis": LABELS, "sex": LABELS}),
        {},
        ["['diagnosis', 'sex']", "groups=table['...']"],
    ),
    "two groups of one name": (model, {"x": ["1", "y=1"] * 3, "x=y": ["1"] * 6}, {}, ["'x=y=1'", "rename"]),
    "two pairs of groups of one name": (
        model,
        ["a", "b - c", "a - b", "c", "c", "a"],
        {"statistics": ["gradient", "cosine"]},
        ["cosine", "'a - b - c'", "rename"],
    ),
    "a convolution with its own product": (
        lambda: OwnConvolution(N, 3, 1),
        LABELS,
        {},
        ["Rows of 'weight' are given to samples", "which sample gets which cannot be told", "layers="],
    ),
    "a Linear with its own forward pass, skipped": (
        lambda: OwnForward(4, 3),
        LABELS,
        {"unknown": "skip"},
        ["no rule for 'weight' (OwnForward, an nn.Linear with a forward pass of its own)"],
    ),
    "a Linear whose forward pass was replaced, skipped": (
        replaced_forward,
        LABELS,
        {"unknown": "skip"},
        ["no rule for 'weight' (Linear with a forward pass of its own)"],
    ),
    "a class that is called Linear, too, skipped": (
        lambda: Linear(4, 3),
        LABELS,
        {"unknown": "skip"},
        ["no matrix parameter that can be watched", f"no rule for 'weight' ({__name__}.Linear)"],
    ),
    "everything left out": (model, LABELS, {"layers": ["!*"]}, ["no matrix parameter that can be watched"]),
    "a pattern without a match left out": (model, LABELS, {"layers": ["!5.*"]}, ["'5.*'", "no such matrix"]),
    "matrices of the model's own": (
        OwnMatrices,
        LABELS,
        {},
        ["'table' in cdist()", "'second' in einsum()", "layers=['!table', '!second']"],
    ),
    "matrices of the model's own, without groups": (
        OwnMatrices,
        None,
        {},
        ["'table' in cdist()", "'second' in einsum()"],
    ),
    "an LSTM with its own forward pass": (
        lambda: OwnLSTM(4, 3),
        LABELS,
        {},
        ["'weight_ih_l0' in lstm()", "'weight_hh_l0' in lstm()"],
    ),
    "a bag of embeddings": (Bag, LABELS, {}, ["'inner.weight' in embedding_bag()"]),
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
    "a mask of steps": (model, LABELS, {"steps": np.arange(4) % 2 == 0}, ["steps=", "numpy.flatnonzero(mask)"]),
    "half a step": (model, LABELS, {"steps": [1.5]}, ["steps=[1.5]", "whole"]),
    "steps in words": (model, LABELS, {"steps": "037"}, ["steps='037'", "function"]),
    "one step": (model, LABELS, {"steps": 5}, ["steps=5", "at least one"]),
    "an unknown statistic": (model, LABELS, {"statistics": ["weights"]}, ["weights", "'gradient'"]),
    "statistics as one string": (model, LABELS, {"statistics": "gradient"}, ["'gradient'", "list"]),
    "no statistic": (model, LABELS, {"statistics": []}, ["one or more"]),
    "no singular value": (model, LABELS, {"singular_values": 0}, ["singular_values=0", "from 1"]),
    "an empty list of singular values": (model, LABELS, {"singular_values": []}, ["singular_values=[]"]),
    "singular values in words": (model, LABELS, {"singular_values": "some"}, ["'some'", "'all'"]),
    "singular values that no layer has": (model, LABELS, {"singular_values": [9]}, ["[9]", "'0.weight'", "only 3"]),
    "unknown misspelt": (model, LABELS, {"unknown": "ignore"}, ["'ignore'", "'refuse'", "'skip'"]),
    "audit zero": (model, LABELS, {"audit": 0}, ["audit=0"]),
    "an unknown solver": (model, LABELS, {"solver": "fast"}, ["solver='fast'", "'exact'", "'tracked'"]),
    "an unknown kind of positions": (model, LABELS, {"per_position": "time"}, ["per_position='time'", "'space'"]),
    "positions without groups": (
        model,
        None,
        {"per_position": True},
        ["per_position= needs groups=", "each sample a label"],
    ),
    "an unknown activation": (model, LABELS, {"activation": "patches"}, ["'patches'", "'channels'", "'unfolded'"]),
    "no angles": (model, LABELS, {"angles": 0}, ["angles=0", "at least 1"]),
    "half an angle": (model, LABELS, {"angles": 2.5}, ["angles=2.5", "whole number"]),
    "a budget of nothing": (model, LABELS, {"budget": 0}, ["budget=0", "positive", "0.1"]),
    "a negative budget": (model, LABELS, {"budget": -0.1}, ["budget=-0.1", "positive"]),
    "a budget in words": (model, LABELS, {"budget": "10 %"}, ["budget='10 %'"]),
    "a budget that is no number": (model, LABELS, {"budget": float("nan")}, ["budget=nan"]),
    "a budget that is true": (model, LABELS, {"budget": True}, ["budget=True"]),
    "budget and every": (model, LABELS, {"budget": 0.1, "every": 2}, ["budget=", "every=", "steps="]),
    "budget and steps": (model, LABELS, {"budget": 0.1, "steps": [1]}, ["budget=", "steps="]),
    "valid without groups": (model, None, {"valid": np.ones((N, 2))}, ["valid=", "groups="]),
    "valid for another batch": (model, LABELS, {"valid": np.ones((N - 1, 2))}, ["(5, 2)", "6 samples"]),
    "valid without positions": (model, LABELS, {"valid": np.ones(N)}, ["(6,)", "each position"]),
    "valid in three dimensions": (model, LABELS, {"valid": np.ones((N, 2, 4))}, ["(6, 2, 4)"]),
    "valid for positions that no layer has": (model, LABELS, {"valid": np.ones((N, 3))}, ["3 positions", "no watched"]),
    "nothing valid": (model, LABELS, {"valid": np.zeros((N, 1))}, ["valid=", "no row"]),
    "a weight of two parts, skipped": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        LABELS,
        {"unknown": "skip"},
        ["no rule for '0.parametrizations.weight.original1' (ParametrizationList)"],
    ),
    "a weight that is drawn anew": (
        lambda: Noisy(4, 3),
        LABELS,
        {},
        ["draws parts of 'weight' at random", "layers=['!weight']"],
    ),
    "a layer without a shape yet": (lambda: nn.Sequential(nn.LazyLinear(3)), LABELS, {}, ["LazyLinear '0'", "once"]),
    "a batch_dim that is no number": (model, LABELS, {"batch_dim": "first"}, ["batch_dim='first'"]),
    "a batch_dim that is a fraction": (model, LABELS, {"batch_dim": 0.5}, ["batch_dim=0.5"]),
    "crossing in one string": (model, {"x": LABELS, "y": LABELS}, {"crossed": "xy"}, ["crossed=", "list"]),
    "crossing one with itself": (model, {"x": LABELS, "y": LABELS}, {"crossed": [("x", "x")]}, ["crossed", "'x'"]),
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


def test_names_that_would_meet_in_a_pair_are_no_matter_where_groups_are_not_compared():
    one_step(model(), ["a", "b - c", "a - b", "c", "c", "a"], quiet=True)


def test_integer_inputs_are_refused_with_the_way_out():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(x.float())

    with pytest.raises(
        WatchError,
        match=r"hold the 6 samples in whole numbers alone.*nn\.Embedding alone.*floating-point input, or rows=",
    ):
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


def steps_of(network, watcher, x):
    network.zero_grad()
    network(x).square().sum().backward()
    watcher.step()


@pytest.mark.parametrize("size", [N - 1, N + 2, 2 * N])
def test_a_batch_of_another_size_than_the_labels_is_refused_at_its_forward_pass(size):
    network = model()
    with autospec.watch(network, LABELS, quiet=True) as watcher:
        steps_of(network, watcher, torch.randn(N, 4))
        with pytest.raises(WatchError, match=rf"6 labels.*\({size}, 4\).*one label for each sample"):
            network(torch.randn(size, 4))
        watcher.set_groups([*LABELS, *LABELS][:size])
        steps_of(network, watcher, torch.randn(size, 4))
    assert watcher.trajectories.group_size.sel(group="all").values.tolist() == [N, size]


def test_labels_of_another_length_than_the_batch_are_refused():
    network = model()
    with autospec.watch(network, LABELS, quiet=True) as watcher:
        steps_of(network, watcher, torch.randn(N, 4))
        watcher.set_groups(LABELS[:-1])
        with pytest.raises(WatchError, match=r"5 labels.*\(6, 4\)"):
            network(torch.randn(N, 4))


@pytest.mark.parametrize("layers", [None, ["0.weight"]])
def test_a_layer_added_inside_the_block_is_told_of_at_its_end_where_all_are_watched(layers):
    network = model()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with autospec.watch(network, LABELS, quiet=True, layers=layers) as watcher:
            steps_of(network, watcher, torch.randn(N, 4))
            network.append(nn.Linear(network[-1].out_features, 2))
            steps_of(network, watcher, torch.randn(N, 4))
    new = [str(each.message) for each in said]
    assert len(new) == (layers is None)
    assert all(
        f"['{len(network) - 1}.weight'] came to the model, or began to learn, within the block and were not recorded"
        in text
        for text in new
    )


RENEWED = {
    "Linear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "1.weight"),
    "LSTM": (lambda: nn.LSTM(4, 3), "weight_hh_l0"),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), "self_attn.out_proj.weight"),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(9, 4)), "0.weight"),
}


def renewed_problem(case):
    network, name = RENEWED[case][0](), RENEWED[case][1]
    x = torch.randint(9, (5, N)) if case == "Embedding" else torch.randn(5, N, 4)
    module, _, key = name.rpartition(".")
    return network, x, network.get_submodule(module), name, key


@pytest.mark.parametrize("case", RENEWED)
def test_a_parameter_replaced_inside_the_block_is_noticed_at_the_next_forward_pass(case):
    network, x, module, name, key = renewed_problem(case)
    with autospec.watch(network, LABELS, quiet=True) as watcher:
        output = network(x)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        watcher.step()
        setattr(module, key, nn.Parameter(getattr(module, key).detach().clone()))
        with pytest.raises(WatchError, match=rf"'{name}' was replaced by another parameter inside the watch\(\) block"):
            network(x)


@pytest.mark.parametrize("path", ["1", "2", "2.0"])
def test_a_module_replaced_inside_the_block_is_noticed_at_the_next_forward_pass(path):
    network, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), torch.randn(N, 4)
    with autospec.watch(network, LABELS, quiet=True) as watcher:
        network(x).square().sum().backward()
        watcher.step()
        above, _, child = path.rpartition(".")
        setattr(network.get_submodule(above), child, copy.deepcopy(network.get_submodule(path)))
        with pytest.raises(WatchError, match=rf"'{path}' was replaced by another module inside the watch\(\) block"):
            network(x)


@pytest.mark.parametrize("case", RENEWED)
def test_a_model_moved_to_another_device_inside_the_block_is_noticed_at_the_next_forward_pass(case):
    network, x, *_ = renewed_problem(case)
    with autospec.watch(network, LABELS, quiet=True) as watcher:
        output = network(x)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        watcher.step()
        network.to("meta")
        with pytest.raises(
            WatchError, match=r"(moved from cpu to meta|replaced by another parameter) inside the watch"
        ):
            network(x.to("meta"))


def test_a_parametrization_can_be_skipped_and_the_rest_is_watched():
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    with autospec.watch(network, LABELS, unknown="skip", quiet=True) as watcher:
        steps_of(network, watcher, torch.randn(N, 4))
    assert list(watcher.trajectories["layers"].children) == ["1.weight"]


@pytest.mark.parametrize("family", [nn.LSTM, nn.GRUCell])
def test_a_weight_of_a_recurrent_layer_changed_between_forward_and_backward_is_refused(family):
    network = family(4, 3)
    x = torch.randn(N, 4) if family is nn.GRUCell else torch.randn(5, N, 4)
    with autospec.watch(network, LABELS, quiet=True):
        output = network(x)
        weight = next(network.parameters())
        with torch.no_grad():
            weight.mul_(2)
        # torch itself refuses some of these
        with pytest.raises((WatchError, RuntimeError), match="modified"):
            (output[0] if isinstance(output, tuple) else output).square().sum().backward()


@pytest.mark.parametrize("layer", ["convolution", "recurrent", "attention"])
def test_an_input_changed_in_place_before_the_backward_pass_is_refused(layer):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = {
                "convolution": nn.Conv1d(5, 3, 2),
                "recurrent": nn.RNN(4, 3, batch_first=True),
                "attention": nn.MultiheadAttention(4, 2, batch_first=True),
            }[layer]

        def forward(self, x):
            hidden = self.first(x).detach()
            output = self.second(*[hidden] * 3) if layer == "attention" else self.second(hidden)
            hidden.mul_(2)
            return output if isinstance(output, torch.Tensor) else output[0]

    network = Changing()
    with (
        autospec.watch(network, LABELS, layers=["second.*"]),
        pytest.raises((WatchError, RuntimeError), match="modified"),
    ):
        network(torch.randn(N, 5, 4)).square().sum().backward()


def test_a_nested_model_is_called_as_a_whole_and_not_in_parts():
    network = nn.Sequential(nn.LSTM(4, 3, batch_first=True))
    with autospec.watch(network, LABELS):
        loss = network[0](torch.randn(N, 5, 4))[0].sum()
        with pytest.raises(WatchError, match=r"'0\.weight_ih_l0' was used outside of a call of the watched model"):
            loss.backward()


@pytest.mark.parametrize("labelled", [[0, 1], [0], [], [0, 1, 2, 3, 4, 5]], ids=str)
def test_a_batch_for_which_set_groups_was_forgotten_is_noticed_once(labelled):
    network = model()
    with autospec.watch(network, LABELS, quiet=True) as watcher, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            if step in labelled:
                watcher.set_groups(LABELS)
            steps_of(network, watcher, torch.randn(N, 4))
    said = [str(each.message) for each in caught]
    if labelled == [0, 1]:
        assert len(said) == 1
        assert "not for step 2" in said[0]
        assert caught[0].filename == __file__
    else:
        assert said == []


WRAPPERS = {
    "torch.compile": lambda layer: torch.compile(layer.forward, backend="eager"),
    "functools.wraps": lambda layer: functools.wraps(layer.forward)(lambda *args: type(layer).forward(layer, *args)),
    "a method": lambda layer: types.MethodType(type(layer).forward, layer),
}


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_forward_pass_that_is_wrapped_is_the_layers_own(how):
    network = model()
    network[0].forward = WRAPPERS[how](network[0])
    one_step(network, LABELS, quiet=True)
