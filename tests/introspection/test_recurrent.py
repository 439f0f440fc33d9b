"""Recurrent layers against networks unrolled by hand: factors of the gates, and the share of each time step."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import autospec

from .families import (
    LABELS,
    LENGTHS,
    LSTM_OPTIONS,
    RECURRENT_OPTIONS,
    N,
    Recurrent,
    Stepwise,
    T,
    normal,
    problem,
    recurrent,
    weighted,
)
from .oracle import CopyOfEachStep, Rows, error, members, record, recurrent_step, spectrum, svdvals, unrolled

TABLE = members(LABELS, N)
DROPOUT = {"dropout": {"num_layers": 3, "dropout": 0.4, "bidirectional": True}}
LAYERS = {
    f"{family.__name__}, {name}": (family, options)
    for family in (nn.RNN, nn.GRU, nn.LSTM)
    for name, options in (RECURRENT_OPTIONS | DROPOUT | (LSTM_OPTIONS if family is nn.LSTM else {})).items()
} | {
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "lengths": LENGTHS}),
}
CELLS = {
    "RNNCell": lambda: nn.RNNCell(4, 5),
    "RNNCell, relu": lambda: nn.RNNCell(4, 5, nonlinearity="relu", bias=False),
    "GRUCell": lambda: nn.GRUCell(4, 5),
    "LSTMCell": lambda: nn.LSTMCell(4, 5),
}


def make(case):
    """A problem, and the module in it that holds the weights."""
    if case in LAYERS:
        family, options = LAYERS[case]
        made = recurrent(family, **options)
        return made, "layer"
    return problem(Stepwise(CELLS[case](), states=True), normal(N, T, 4)), "cell"


def unroll(made, affine_of):
    """Run the problem in float64 with its layer unrolled; return the loss and the affine maps."""
    twin = copy.deepcopy(made)
    model = twin.model.double()
    if isinstance(model, Recurrent):
        affine = affine_of(model.layer, model.lengths)

        def run(x):
            first = model.layer.batch_first
            states = model.states()
            output, last = unrolled(model.layer, x.transpose(0, 1) if first else x, states, model.lengths, affine)
            return (output.transpose(0, 1) if first else output), last

        model.run = run
        return twin.loss(), affine
    cell = model.cell
    affine = affine_of(cell, None)
    mode = {nn.GRUCell: "GRU", nn.LSTMCell: "LSTM"}.get(type(cell)) or f"RNN_{cell.nonlinearity.upper()}"
    steps = iter(range(T))

    def forward(x, state):
        h, c = state if isinstance(state, tuple) else (state, state)
        h, c = recurrent_step(mode, cell, "", next(steps), x, h, c, affine)
        return (h, c) if mode == "LSTM" else h

    cell.forward = forward
    return twin.loss(), affine


@pytest.mark.parametrize("case", [*LAYERS, *CELLS])
def test_the_unrolled_network_is_the_same_network(case):
    made, _ = make(case)
    loss, _ = unroll(made, Rows)
    assert loss.item() == pytest.approx(made.loss(copy.deepcopy(made.model).double()).item(), rel=1e-10)


@pytest.mark.parametrize("case", [*LAYERS, *CELLS])
def test_factors_are_what_enters_each_gate_and_the_derivative_at_its_affine_map(case):
    made, layer = make(case)
    double = copy.deepcopy(made)
    double.model.double()
    loss, rows = unroll(made, Rows)
    loss.backward()
    for tolerance, tree in ((2e-5, record(made)), (1e-7, record(double))):
        assert set(tree["layers"].children) == {f"{layer}.{name}" for name in rows.uses}
        for name in rows.uses:
            node = tree[f"layers/{layer}.{name}"]
            for group, member in TABLE.items():
                a, d = rows.factors(name, member)
                assert int(node.rank_limit.sel(group=group)) == min(len(a), *node.attrs["shape"])
                for statistic, matrix in (("gradient", d.T @ a), ("activation", a), ("adjoint", d)):
                    recorded = spectrum(tree, f"{layer}.{name}", statistic, group)
                    assert len(recorded) == min(*matrix.shape, *node.attrs["shape"]), (name, group, statistic)
                    assert error(recorded, svdvals(matrix)) < tolerance, (name, group, statistic)


BY_POSITION = ["RNN, plain", "GRU, bidirectional", "LSTM, packed, unsorted", "LSTM, projection, packed", "RNN, relu"]


@pytest.mark.parametrize("case", [*BY_POSITION, *CELLS])
def test_the_share_of_a_time_step_is_the_gradient_of_its_own_copy_of_the_weight(case):
    made, layer = make(case)
    tree = record(made, per_position=True)
    for group, member in TABLE.items():
        loss, copies = unroll(made, lambda module, _, member=member: CopyOfEachStep(module, T, member))
        gradients = torch.autograd.grad(loss, list(copies.copies.values()))
        for name, gradient in zip(copies.copies, gradients, strict=True):
            recorded = tree[f"layers/{layer}.{name}/gradient_by_position"].sel(group=group)
            assert recorded.dims == ("step", "position", "index")
            assert recorded.position.values.tolist() == list(range(T))
            whole = svdvals(gradient.sum(0))
            assert error(spectrum(tree, f"{layer}.{name}", "gradient", group), whole) < 2e-5
            expected = torch.linalg.svdvals(gradient).numpy()
            np.testing.assert_allclose(recorded.values[0], expected, rtol=0, atol=2e-5 * expected.max())


def test_input_and_hidden_weights_are_entries_of_their_own():
    made = recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=2)
    names = {
        f"layer.weight_{kind}_l{level}{direction}"
        for kind in ("ih", "hh", "hr")
        for level in (0, 1)
        for direction in ("", "_reverse")
    }
    tree = record(made)
    assert set(tree["layers"].children) == names
    assert tree["layers/layer.weight_ih_l1"].attrs["shape"] == [20, 4]
    assert tree["layers/layer.weight_hh_l1"].attrs["shape"] == [20, 2]
    tree = record(made, layers=["layer.weight_hh*"])
    assert set(tree["layers"].children) == {name for name in names if "_hh_" in name}


class Truncated(nn.Module):
    """The states are detached every second step; the loss is that of the fourth."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        state, outputs = None, []
        for part in x.split(2):
            output, state = self.layer(part, state)
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
            outputs.append(output)
        return torch.tanh(outputs[1][1])


@pytest.mark.parametrize("family", [nn.RNN, nn.GRU, nn.LSTM])
def test_truncation_bounds_the_rank_of_a_sample_by_the_steps_it_leaves(family):
    made = problem(Truncated(family(9, 8)), normal(T, N, 9))
    made.labels = ["one", *["rest"] * (N - 1)]
    tree = record(made)
    for name in ("layer.weight_ih_l0", "layer.weight_hh_l0"):
        node = tree[f"layers/{name}"]
        assert node.rank_limit.sel(group=["one", "rest"]).values.tolist() == [2, min(node.attrs["shape"])]
        values = node["gradient"].sel(group="one").values[0]
        assert values[1] > 1e-4 * values[0]
        assert (values[2:] < 1e-6 * values[0]).all()


def packed_steps(model, batches):
    """Record one step for each set of lengths; return the tree."""
    x = normal(N, T, 4)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for lengths in batches:
            model.zero_grad()
            weighted(model(x, torch.tensor(lengths))).backward()
            watcher.step()
    return watcher.trajectories


class Packing(nn.Module):
    """Packs sequences of given lengths, in torch's order or in its own."""

    def __init__(self, layer, by_hand):
        super().__init__()
        self.layer, self.by_hand = layer, by_hand

    def forward(self, x, lengths):
        if not self.by_hand:
            return torch.tanh(self.layer(pack_padded_sequence(x, lengths, True, enforce_sorted=False))[1])
        order = lengths.argsort(descending=True)
        last = self.layer(pack_padded_sequence(x[order], lengths[order], True))[1]
        return torch.tanh(last[:, order.argsort()])


@pytest.mark.parametrize("by_hand", [False, True], ids=["sorted by torch", "sorted by hand"])
@pytest.mark.parametrize("family", [nn.RNN, nn.GRU])
def test_lengths_that_change_from_step_to_step_are_followed(family, by_hand):
    model = Packing(family(4, 5, batch_first=True), by_hand)
    other = LENGTHS[::-1]
    tree, alone = packed_steps(model, [LENGTHS, other, other]), packed_steps(model, [other])
    for name in tree["layers"].children:
        for statistic in ("gradient", "activation", "adjoint"):
            expected = alone[f"layers/{name}/{statistic}"].values[0]
            found = tree[f"layers/{name}/{statistic}"].values
            for step in (1, 2):
                np.testing.assert_allclose(found[step], expected, rtol=0, atol=1e-6 * np.nanmax(expected))
            assert np.nanmax(np.abs(found[0] - expected)) > 1e-2 * np.nanmax(expected)


class Trimming(nn.Module):
    """Packs sequences by lengths that it finds in the data itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        lengths = (x[..., 0] != 0).sum(1)
        return torch.tanh(self.layer(pack_padded_sequence(x, lengths, True, enforce_sorted=False))[1])


def test_the_same_lengths_in_another_order_are_followed_where_the_model_finds_them_itself():
    model, x = Trimming(nn.GRU(4, 5, batch_first=True)), normal(N, T, 4)
    first, second = (
        x * (torch.arange(T) < torch.tensor(lengths).unsqueeze(1)).unsqueeze(2) for lengths in (LENGTHS, LENGTHS[::-1])
    )
    trees = []
    for batches in ([first, second], [second]):
        with autospec.watch(model, LABELS, quiet=True) as watcher:
            for batch in batches:
                model.zero_grad()
                weighted(model(batch)).backward()
                watcher.step()
        trees.append(watcher.trajectories.isel(step=[-1]))
    for name in trees[0]["layers"].children:
        for statistic in ("gradient", "activation", "adjoint"):
            found, expected = (tree[f"layers/{name}/{statistic}"].values for tree in trees)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.nanmax(expected))
