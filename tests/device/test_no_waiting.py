"""Nothing in a recorded step waits for a GPU, and a GPU waits for no more than it must.

What is allowed to wait are the probe and the audit of the first step, the guard of every 64th, and the decompositions
that are put off.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autospec
from autospec.introspection import capture, spectra
from autospec.introspection.measure import STEPS_TOGETHER

from .simulated import NAME, Operations, moved, refusing_to_wait, waits

N = 24
LABELS = ["a", "b", "b", "c"] * 6


class Reader(nn.Module):
    """A recurrent layer and a classifier."""

    def __init__(self, layer):
        super().__init__()
        width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        self.read, self.decide = layer, nn.Linear(width, 2)

    def forward(self, x):
        return self.decide(self.read(x)[0].mean(1))


class Loop(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Words(nn.Module):
    """A lookup."""

    def __init__(self, vocabulary, **options):
        super().__init__()
        self.table, self.decide = nn.Embedding(vocabulary, 5, **options), nn.Linear(5, 2)

    def forward(self, x):
        return self.decide(self.table(x).mean(1))


class Own(nn.Module):
    """Weights of its own: positions, a product, and one of a weight that is computed."""

    def __init__(self):
        super().__init__()
        self.positions, self.first = nn.Parameter(torch.ones(6, 7)), nn.Parameter(torch.ones(7, 5))
        self.second = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))

    def forward(self, x):
        return self.second(torch.tanh((x + self.positions) @ self.first))


class Joined(nn.Module):
    """Learned tokens and projected positions, a matrix for each part, and dropout of what all samples share."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Parameter(torch.ones(2, 7)), nn.Parameter(torch.ones(8, 7))
        self.place, self.drop = nn.Linear(7, 7), nn.Dropout(0.1)
        self.parts = nn.Parameter(torch.ones(8, 7, 4))

    def forward(self, x):
        joined = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1) + self.drop(self.place(self.positions))
        return torch.einsum("bpi,pio->bpo", torch.tanh(joined), self.parts)


SERIES = (N, 6, 7)
MODELS = {
    "MLP of many rows": (lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(inplace=True), nn.Linear(5, 7)), (N, 7)),
    "MLP of few rows": (lambda: nn.Sequential(nn.Linear(70, 40), nn.Tanh(), nn.Linear(40, 70)), (N, 70)),
    "MLP of data that stay the same": (lambda: nn.Sequential(nn.Linear(70, 8), nn.ReLU(), nn.Linear(8, 70)), (N, 70)),
    "MLP over time": (lambda: nn.Sequential(nn.Linear(7, 50), nn.BatchNorm1d(6), nn.Linear(50, 7)), SERIES),
    "a wide layer": (lambda: nn.Linear(600, 600), (N, 20, 600)),
    "1D CNN": (lambda: nn.Sequential(nn.Conv1d(6, 5, 3, padding=1), nn.ReLU(), nn.Conv1d(5, 3, 3, stride=2)), SERIES),
    "3D CNN": (lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.ConvTranspose3d(4, 2, 3)), (N, 1, 5, 6, 5)),
    "convolutions of few rows": (
        lambda: nn.Sequential(nn.Conv2d(60, 70, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(70, 60, 3, stride=2)),
        (N, 60, 2, 1),
    ),
    "RNN": (lambda: Reader(nn.RNN(7, 4, batch_first=True)), SERIES),
    "GRU": (lambda: Reader(nn.GRU(7, 4, 2, batch_first=True, bidirectional=True)), SERIES),
    "LSTM": (lambda: Reader(nn.LSTM(7, 4, batch_first=True)), SERIES),
    "LSTM with projection": (lambda: Reader(nn.LSTM(7, 4, 2, batch_first=True, proj_size=3)), SERIES),
    "LSTMCell": (lambda: Loop(nn.LSTMCell(7, 4)), SERIES),
    "GRUCell": (lambda: Loop(nn.GRUCell(7, 4)), SERIES),
    "weights of its own": (Own, SERIES),
    "tokens and parts": (Joined, SERIES),
    "Embedding, few words": (lambda: Words(9), (N, 6)),
    "Embedding, many words": (lambda: Words(900), (N, 6)),
}


def take(steps, model, x, watcher):
    """Train for some steps."""
    for _ in range(steps):
        model.zero_grad()
        model(x).square().mean().backward()
        watcher.step()


def on_the_device(name):
    """A model and its batch."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    x = torch.randint(9, shape) if "Embedding" in name else torch.randn(shape)
    return moved(make()), x.to(NAME)


@pytest.mark.parametrize("name", MODELS)
def test_a_recorded_step_waits_for_nothing(name):
    model, x = on_the_device(name)
    groups = {"letter": LABELS, "half": ["x", "y"] * 12}
    with autospec.watch(model, groups, quiet=True) as watcher:
        take(1, model, x, watcher)
        with refusing_to_wait():
            take(STEPS_TOGETHER - 1, model, x, watcher)
        before = waits()
        take(1, model, x, watcher)
        assert waits() > before  # all of them are decomposed
        with refusing_to_wait():
            take(STEPS_TOGETHER - 1, model, x, watcher)
    for layer in watcher.trajectories["layers"].children.values():
        assert layer.sizes["step"] == 2 * STEPS_TOGETHER
        assert bool(layer["gradient"].isel(index=0).notnull().all())


@pytest.mark.parametrize("case", ["linear", "1D CNN", "3D CNN", "LSTM"])
def test_a_step_asks_no_more_of_the_device_for_more_rows(case):
    """What is cut into pieces for a processor's cache would keep a GPU waiting for its orders."""
    layer, shape = {
        "linear": (nn.Linear(100, 120), (N, 1, 100)),
        "1D CNN": (nn.Conv1d(100, 120, 3), (N, 100, 1)),
        "3D CNN": (nn.Conv3d(4, 8, 3), (N, 4, 6, 6, 1)),
        "LSTM": (Reader(nn.LSTM(100, 30, batch_first=True)), (1, 8, 100)),
    }[case]
    model, counts = moved(nn.Sequential(layer, nn.Tanh())), []
    for longer in (144, 288):
        lengthened = {"linear": [1, longer, 1], "LSTM": [longer, 1, 1]}.get(case, [1] * (len(shape) - 1) + [longer])
        x = torch.randn(shape).repeat(lengthened).to(NAME)
        labels = LABELS * (len(x) // N)
        with autospec.watch(model, labels, quiet=True) as watcher:
            take(2, model, x, watcher)
            with Operations() as operations:
                take(1, model, x, watcher)
        counts.append(operations.count)
    assert counts[0] == counts[1]


FURTHER = [
    {"statistics": ["gradient"]},
    {"statistics": ["gradient", "contrast", "cosine"]},
    {"singular_values": "all"},
    {"per_position": True},
    {"activation": "unfolded"},
    {"audit": 2},
]


@pytest.mark.parametrize("options", FURTHER, ids=str)
@pytest.mark.parametrize("name", ["MLP of few rows", "MLP over time", "1D CNN"])
def test_less_and_more_than_all_three_wait_for_nothing(name, options):
    model, x = on_the_device(name)
    without = [] if "per_position" in options else [None]  # which needs samples
    for labels in (LABELS, *without):
        with autospec.watch(model, labels, quiet=True, **options) as watcher:
            take(1, model, x, watcher)
            with refusing_to_wait():
                take(1, model, x, watcher)


def test_labels_of_a_new_batch_bring_a_table_of_rows_and_nothing_else():
    model, x = on_the_device("MLP of many rows")
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        take(1, model, x, watcher)
        with refusing_to_wait():
            for shift in range(1, 4):
                watcher.set_groups([*LABELS[shift:], *LABELS[:shift]])
                take(1, model, x, watcher)


@pytest.mark.parametrize("waiting", ["a choice by a number", "a number read", "a table brought"])
def test_waiting_is_noticed(waiting, monkeypatch):
    model, x = on_the_device("MLP of few rows")
    if waiting == "a choice by a number":
        monkeypatch.setattr(torch.Tensor, "is_cpu", True)
        monkeypatch.setattr(spectra, "numpy_has_one_thread", lambda: False)
    elif waiting == "a number read":
        monkeypatch.setattr(capture, "_checksum", lambda tensor: tensor.sum().item())
    else:
        monkeypatch.setattr(capture, "_checksum", lambda tensor: (tensor + torch.zeros(70).to(NAME)) is None)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        take(1, model, x, watcher)
        with refusing_to_wait(), pytest.raises(RuntimeError, match="waits for the device"):
            take(1, model, x, watcher)
