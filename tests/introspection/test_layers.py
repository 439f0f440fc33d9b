"""Every layer family in every form: shares by the definition, factors of the very step, training unchanged."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import autospec

from .families import (
    CONVOLUTIONS,
    EMBEDDINGS,
    EVERYTHING,
    FAMILIES,
    LABELS,
    LINEAR,
    Bert,
    Calls,
    N,
    T,
    Words,
    convolutional_network,
    normal,
    problem,
    weighted,
    whole_numbers,
)
from .oracle import assert_exact, assert_shares, error, members, record, spectrum, svdvals

TABLE = members(LABELS, N)


@pytest.mark.parametrize("case", FAMILIES)
def test_gradient_spectra_are_those_of_weights_copied_for_the_group(case):
    made = FAMILIES[case]()
    double = copy.deepcopy(made)
    double.model.double()
    tree, fine = record(made), record(double)
    assert tree.attrs["audit"]["outside"] == {}
    assert tree.attrs["audit"]["largest_error"] < 1e-6
    # in double precision there is nothing but the rounding of the record
    assert_shares({2e-5: tree, 1e-7: fine}, made, TABLE)


@pytest.mark.parametrize("case", LINEAR | CONVOLUTIONS | EMBEDDINGS)
def test_spectra_are_those_of_the_rows_of_the_very_step(case):
    made = (LINEAR | CONVOLUTIONS | EMBEDDINGS)[case]()
    assert_exact(record(made), made, TABLE)


def train(made, watcher=None):
    """Train a copy from the same seed; return all that could change."""
    model = copy.deepcopy(made.model)
    sparse = any(getattr(module, "sparse", False) for module in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if sparse else torch.optim.Adam(model.parameters(), 0.01)
    torch.manual_seed(5)
    with watcher(model) if watcher else nullcontext() as watching:
        for _ in range(3):
            optimizer.zero_grad()
            loss = made.loss_of_output(model(made.x))
            loss.backward()
            if watching:
                watching.step()
            optimizer.step()
    state = [loss, *model.state_dict().values(), torch.get_rng_state()]
    for values in optimizer.state_dict()["state"].values():
        state += list(values.values())
    return [*state, *(p.grad.to_dense() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("case", FAMILIES)
def test_training_is_bitwise_unchanged(case):
    made = FAMILIES[case]()
    plain = train(made)
    watched = train(made, lambda model: autospec.watch(model, LABELS, quiet=True, **EVERYTHING))
    assert len(plain) == len(watched)
    for before, after in zip(plain, watched, strict=True):
        assert torch.equal(before, after)


def test_a_training_that_draws_one_number_more_differs_so_the_comparison_can_fail():
    def disturbed(_):
        torch.rand(1)
        return nullcontext()

    made = FAMILIES["LSTM, dropout"]()
    pairs = zip(train(made), train(made, disturbed), strict=True)
    assert not all(torch.equal(before, after) for before, after in pairs)


IN_PARTS = {
    "convolutions": lambda: (convolutional_network(2), normal(N, 2, 6, 6)),
    "embeddings": lambda: (Words("row", types=True, padding_idx=0), whole_numbers(20, N, T)),
    "BERT": lambda: (Bert(), whole_numbers(20, N, T)),
    "LSTM": lambda: (Calls(nn.LSTM(4, 5, 2, batch_first=True), lambda layer, x: layer(x)[0]), normal(N, T, 4)),
    "LSTMCell": lambda: (Calls(nn.LSTMCell(4, 5), lambda cell, x: cell(x[:, 1], cell(x[:, 0]))[0]), normal(N, T, 4)),
}


@pytest.mark.parametrize("case", IN_PARTS)
def test_micro_batches_accumulate_to_the_full_batch(case):
    model, x = IN_PARTS[case]()
    model.eval()  # batch normalisation and dropout make another made of a part
    weights = torch.linspace(1, 2, N).unsqueeze(1)
    trees = []
    for parts in ([torch.arange(N)], torch.arange(N).split([3, 8, 1])):
        with autospec.watch(model, LABELS, quiet=True, per_position=True) as watcher:
            model.zero_grad()
            for rows in parts:
                watcher.set_groups([LABELS[i] for i in rows])
                ((model(x[rows]).flatten(1) - 0.3).square() * weights[rows]).sum().backward()
            watcher.step()
        trees.append(watcher.trajectories)
    full, accumulated = trees
    for layer in full["layers"].children:
        for name, variable in full[f"layers/{layer}"].data_vars.items():
            if "index" in variable.dims:
                scale = variable.max("index").values[..., None]
                difference = np.abs(accumulated[f"layers/{layer}/{name}"].values - variable.values)
                assert np.array_equal(np.isnan(difference), np.isnan(variable))
                assert (np.nan_to_num(difference) <= 2e-6 * scale).all(), (layer, name)
    assert accumulated.attrs["audit"]["outside"] == {}


@pytest.mark.parametrize("case", ["2-D network", "LSTM, bidirectional", "Encoder", "Embedding, positions", "GRUCell"])
def test_frozen_weights_are_nan_and_the_others_as_always(case):
    made = FAMILIES[case]()
    full = record(made)
    frozen, *others = full["layers"].children
    made.model.get_parameter(frozen).requires_grad_(False)
    tree = record(made)
    assert tree[f"layers/{frozen}/gradient"].isnull().all()
    for layer in others:
        np.testing.assert_array_equal(tree[f"layers/{layer}/gradient"], full[f"layers/{layer}/gradient"])


LONG = ["Linear, 3-D", "2-D network", "Embedding, token types", "LSTM, bidirectional", "GRUCell", "BERT"]


@pytest.mark.parametrize("case", LONG)
def test_every_step_of_a_training_is_that_of_a_watcher_of_its_own_and_may_be_read_at_any_time(case):
    made = FAMILIES[case]()
    made.model.eval()  # so that two passes of one step are the same
    optimizer = torch.optim.Adam(made.model.parameters(), lr=0.01)
    read, alone = [], []
    with autospec.watch(made.model, LABELS, quiet=True) as watcher:
        for step in range(20):
            twin = copy.copy(made)
            twin.model = copy.deepcopy(made.model)
            optimizer.zero_grad()
            made.loss().backward()
            watcher.step()
            optimizer.step()
            if step in (0, 2, 15, 16, 19):
                alone.append(record(twin))
            if step in (2, 17):
                read.append(watcher.trajectories)
    tree = watcher.trajectories
    assert [len(earlier.step) for earlier in read] == [3, 18]
    for layer in tree["layers"].children:
        for statistic in ("gradient", "activation", "adjoint"):
            path = f"layers/{layer}/{statistic}"
            found = tree[path].sel(step=[0, 2, 15, 16, 19]).values
            expected = np.concatenate([one[path].values for one in alone])
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.nanmax(expected))
            for earlier in read:
                assert np.array_equal(earlier[path], tree[path][: len(earlier.step)], equal_nan=True)


@pytest.mark.parametrize("case", ["Linear, batch norm", "1-D network", "LSTM, packed, unsorted", "Encoder"])
def test_several_groupings_and_their_crossing_are_exact_at_once(case):
    made = FAMILIES[case]()
    labels = {"diagnosis": ["SZ", "HC", None] * 4, "sex": ["F", "F", "M", "M"] * 3}
    made.labels = labels
    table = members(labels, N)
    for diagnosis in ("HC", "SZ"):
        for sex in "FM":
            table[f"diagnosis={diagnosis} & sex={sex}"] = table[f"diagnosis={diagnosis}"] & table[f"sex={sex}"]
    tree = record(made, crossed=[("diagnosis", "sex")])
    assert set(tree.group.values) == set(table)
    assert_shares({2e-5: tree}, made, table)
    assert tree.group_size.values.tolist() == [[int(table[str(group)].sum()) for group in tree.group.values]]


def test_recurrent_layers_with_one_weight_have_the_share_of_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LSTM(4, 4), nn.LSTM(4, 4)
            self.second.weight_hh_l0 = self.first.weight_hh_l0

        def forward(self, x):
            return torch.tanh(self.second(self.first(x)[0])[0])

    made = problem(Shared(), normal(T, N, 4), {"first": (1, (1, 1)), "second": (1, (1, 1))})
    tree = record(made)
    assert tree["layers/first.weight_hh_l0"].attrs["also"] == ["second.weight_hh_l0"]
    assert len(tree["layers"].children) == 3
    assert_shares({2e-5: tree}, made, TABLE)


def weight_norm_by_hooks(module, name):
    with torch.no_grad():  # torch cannot copy a weight that belongs to a graph
        return nn.utils.weight_norm(module, name)


def in_a_loop(cell, x):
    state, outputs = None, []
    for values in x.unbind(1):
        state = cell(values, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, 1)


DERIVED = {
    "orthogonal": parametrizations.orthogonal,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm by hooks": weight_norm_by_hooks,
    "spectral_norm": parametrizations.spectral_norm,
}
PARTLY_DERIVED = {
    "LSTM": (lambda: Calls(nn.LSTM(4, 4, batch_first=True), lambda layer, x: layer(x)[0]), "layer", "weight_hh_l0"),
    "GRU": (
        lambda: Calls(nn.GRU(4, 3, 2, bidirectional=True, batch_first=True), lambda layer, x: layer(x)[0]),
        "layer",
        "weight_ih_l1_reverse",
    ),
    "RNN": (lambda: Calls(nn.RNN(4, 4, batch_first=True), lambda layer, x: layer(x)[0]), "layer", "weight_hh_l0"),
    "LSTMCell": (lambda: Calls(nn.LSTMCell(4, 5), in_a_loop), "layer", "weight_hh"),
    "GRUCell": (lambda: Calls(nn.GRUCell(4, 5, bias=False), in_a_loop), "layer", "weight_ih"),
    "attention": (
        lambda: Calls(nn.MultiheadAttention(4, 2, batch_first=True), lambda layer, x: torch.tanh(layer(x, x, x)[0])),
        "layer",
        "in_proj_weight",
    ),
    "attention, output": (
        lambda: Calls(nn.MultiheadAttention(4, 2, batch_first=True), lambda layer, x: torch.tanh(layer(x, x, x)[0])),
        "layer.out_proj",
        "weight",
    ),
}


@pytest.mark.parametrize("kind", DERIVED)
@pytest.mark.parametrize("case", PARTLY_DERIVED)
def test_weights_that_are_computed_from_others_can_be_left_out_and_the_rest_of_the_layer_is_exact(case, kind):
    make, place, name = PARTLY_DERIVED[case]
    made = problem(make(), normal(N, T, 4))
    DERIVED[kind](made.model.get_submodule(place), name)
    plain = train(made)
    watched = train(made, lambda model: autospec.watch(model, LABELS, unknown="skip", quiet=True))
    assert all(map(torch.equal, plain, watched))
    with autospec.watch(made.model, LABELS, unknown="skip", quiet=True) as watcher:
        output = made.model(made.x)
        weighted(output).backward(retain_graph=True)
        watcher.step()
    tree = watcher.trajectories
    assert f"{place}.{name}" not in tree["layers"].children
    weights = {layer: made.model.get_parameter(layer) for layer in tree["layers"].children}
    # Nothing couples the samples here, so that a group's share is the gradient by way of its samples' outputs.
    for group, member in TABLE.items():
        chosen = torch.where(torch.from_numpy(member).reshape(-1, 1, 1), output, output.detach())
        shares = torch.autograd.grad(weighted(chosen), list(weights.values()), retain_graph=True)
        for layer, share in zip(weights, shares, strict=True):
            assert error(spectrum(tree, layer, "gradient", group), svdvals(share)) < 5e-6
