"""Rank bounds of the architecture hold for recorded spectra, and are reached."""

import pytest
import torch
from torch import nn

import autospec
from autospec.introspection import WatchError, rank_bound

N, T = 3, 7


class Recurrent(nn.Module):
    """An LSTM-free recurrent network whose loss sees the last ``window`` steps' graph alone."""

    def __init__(self, window=None):
        super().__init__()
        self.rnn, self.window = nn.RNN(20, 24, batch_first=True), window

    def forward(self, x):
        if self.window is None:
            return self.rnn(x)[0][:, -1]
        with torch.no_grad():
            state = self.rnn(x[:, : -self.window])[1]
        return self.rnn(x[:, -self.window :], state)[0][:, -1]


def rank(tree, name, group="all"):
    """Recorded singular values above the noise floor."""
    node = tree[f"layers/{name}"]
    values = node["gradient"].sel(group=group).values[0]
    return int((values > 10 * node["gradient_noise_floor"].sel(group=group).values[0]).sum())


def record(model, x, labels):
    with autospec.watch(model, labels, quiet=True, batch_dim=0) as watcher:
        torch.tanh(model(x)).sum().backward()
        watcher.step()
    return watcher.trajectories


CASES = {
    "linear": (lambda: nn.Linear(20, 30), (N, 20), "weight", {}),
    "linear, tokens": (lambda: nn.Linear(20, 30), (N, T, 20), "weight", {"positions": T}),
    "recurrent, input": (Recurrent, (N, T, 20), "rnn.weight_ih_l0", {"positions": T}),
    "recurrent, hidden": (Recurrent, (N, T, 20), "rnn.weight_hh_l0", {"positions": T, "initial_state": False}),
    "recurrent, hidden, truncated": (lambda: Recurrent(2), (N, T, 20), "rnn.weight_hh_l0", {"positions": 2}),
    "recurrent, truncated": (lambda: Recurrent(2), (N, T, 20), "rnn.weight_ih_l0", {"positions": 2}),
    "convolution": (lambda: nn.Conv1d(20, 30, 3), (N, 20, 5), "weight", {"positions": 5}),
    "convolution, stride": (lambda: nn.Conv1d(20, 30, 3, stride=2), (N, 20, 7), "weight", {"positions": (7,)}),
    "convolution in 2-D": (
        lambda: nn.Conv2d(12, 25, 3, stride=2, padding=1, dilation=2),
        (N, 12, 6, 5),
        "weight",
        {"positions": (6, 5)},
    ),
    "convolution in groups": (lambda: nn.Conv1d(20, 30, 3, groups=2), (N, 20, 5), "weight", {"positions": 5}),
    "transposed convolution": (lambda: nn.ConvTranspose1d(20, 30, 3), (N, 20, 4), "weight", {"positions": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_reached_and_holds_for_each_group(case):
    make, shape, name, given = CASES[case]
    torch.manual_seed(0)
    model, x = make(), torch.randn(*shape)
    module = getattr(model, name.split(".")[0]) if "." in name else model
    tree = record(model, x, ["a", "b", "b"])
    for group, samples in (("all", 3), ("a", 1), ("b", 2)):
        assert rank(tree, name, group) == rank_bound(module, name.split(".")[-1], samples=samples, **given), group


def test_a_bottleneck_without_activation_function_bounds_the_layers_around_it():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 18), nn.Linear(18, 4), nn.Linear(4, 30))
    tree = record(model, torch.randn(50, 20), ["a"] * 50)
    assert rank(tree, "0.weight") == rank_bound(model[0], samples=50, adjoint_rank=4) == 4
    assert rank(tree, "2.weight") == rank_bound(model[2], samples=50, activation_rank=4) == 4


def test_the_matrix_itself_is_a_bound():
    assert rank_bound(nn.Conv3d(2, 5, 3, groups=1), samples=100, positions=(9, 9, 9)) == 5
    assert rank_bound(nn.Embedding(9, 4), samples=100) == 4
    assert rank_bound(nn.GRUCell(50, 30), "weight_hh", samples=2, positions=3, initial_state=False) == 4
    assert rank_bound(nn.MultiheadAttention(8, 2), "out_proj.weight", samples=1, positions=5) == 5


@pytest.mark.parametrize(
    ("module", "parameter", "given", "message"),
    [
        (nn.ReLU(), "weight", {}, "no matrix 'weight'"),
        (nn.Linear(3, 3), "bias", {}, "no matrix 'bias'"),
        (nn.Conv2d(1, 1, 3), "weight", {"positions": 5}, "give the 2 sizes"),
        (nn.Conv1d(1, 1, 5), "weight", {"positions": 3}, "does not fit"),
        (nn.Linear(3, 3), "weight", {"samples": -1}, "samples=-1: give whole numbers of at least 1"),
        (nn.Linear(3, 3), "weight", {"samples": 2.5}, "samples=2.5"),
        (nn.Linear(3, 3), "weight", {"positions": 0}, "positions=0"),
    ],
)
def test_what_has_no_bound_is_refused(module, parameter, given, message):
    with pytest.raises(WatchError, match=message):
        rank_bound(module, parameter, **{"samples": 1, **given})
