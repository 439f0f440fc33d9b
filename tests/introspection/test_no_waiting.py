"""Nothing in a recorded step waits for a GPU: steps run on tensors without values, so whatever asks for one fails.

Tensors on torch's "meta" device have shapes and no numbers.  They stand for a GPU's here, whose numbers the processor
can have only by waiting until the GPU has computed them; a copy to the device, which waits too, is noticed by a mode.
What is allowed to wait is replaced: the probe of the first step, its audit, the guard of every 64th, and the
decompositions that are put off.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import autospec
from autospec.introspection import capture, measure
from autospec.introspection.audit import Audit
from autospec.introspection.measure import Measurement
from autospec.introspection.rows import map_rows

N = 24
LABELS = ["a", "b", "b", "c"] * 6
DEVICE = torch.device("meta")
TOGETHER = 3


class Copies(TorchDispatchMode):
    """Refuses copies between the processor and the device, but for those that need not be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        if len({tensor.device for tensor in tensors if tensor.ndim}) > 1 and not kwargs.get("non_blocking"):
            raise AssertionError(f"{func} brings numbers from one device to the other")
        return result


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


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Let meta tensors pass for a GPU's, and let what may wait run on a copy on the processor, or not at all."""

    def traced(model, args, kwargs, *rest):
        twin = copy.deepcopy(model).to_empty(device="cpu")
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.data.fill_(1)
        return map_rows(twin, tuple(map(numbers_like, args)), kwargs, *rest)

    def numbers_like(argument):
        if argument.is_floating_point():
            return torch.ones_like(argument, device="cpu")
        return (torch.arange(argument.numel()) % 9).reshape(argument.shape)  # not the same words for every sample

    finished = []

    def finish(measurement):
        finished.append(len(measurement._open))
        measurement._open, measurement._open_bytes = [], 0
        return []

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device == DEVICE))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("autospec.introspection.rows.row_maps.map_rows", traced)
    monkeypatch.setattr(Audit, "due", lambda audit, recorded: False)
    monkeypatch.setattr(Audit, "guard_due", lambda audit, recorded: False)
    monkeypatch.setattr(Measurement, "finish", finish)
    monkeypatch.setattr(measure, "STEPS_TOGETHER", TOGETHER)
    return finished


def take(steps, model, x, watcher):
    """Train for some steps."""
    for _ in range(steps):
        model.zero_grad()
        model(x).square().mean().backward()
        watcher.step()


def on_the_device(name):
    make, shape = MODELS[name]
    with DEVICE:
        return make(), torch.zeros(shape, dtype=torch.long if "Embedding" in name else None)


@pytest.mark.parametrize("name", MODELS)
def test_a_recorded_step_waits_for_nothing(name, like_a_gpu):
    model, x = on_the_device(name)
    groups = {"letter": LABELS, "half": ["x", "y"] * 12}
    with autospec.watch(model, groups, quiet=True) as watcher:
        take(1, model, x, watcher)  # the probe, and tables of which row is whose
        with Copies():
            take(2 * TOGETHER, model, x, watcher)
    assert like_a_gpu == [TOGETHER, TOGETHER, 1]


@pytest.mark.parametrize("options", [{"statistics": ["gradient"]}, {"singular_values": "all"}, {"audit": 2}], ids=str)
def test_less_and_more_than_all_three_wait_for_nothing(options, like_a_gpu):
    model, x = on_the_device("MLP of few rows")
    for labels in (LABELS, None):
        with autospec.watch(model, labels, quiet=True, **options) as watcher:
            take(1, model, x, watcher)
            with Copies():
                take(TOGETHER - 1, model, x, watcher)


def test_labels_of_a_new_batch_bring_a_table_of_rows_and_nothing_else(like_a_gpu):
    model, x = on_the_device("MLP of many rows")
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        take(1, model, x, watcher)
        with Copies():
            for shift in range(1, TOGETHER):
                watcher.set_groups([*LABELS[shift:], *LABELS[:shift]])
                take(1, model, x, watcher)


@pytest.mark.parametrize("waiting", ["a choice by a number", "a number read", "a table brought"])
def test_the_way_for_processors_is_noticed_to_wait(waiting, like_a_gpu, monkeypatch):
    model, x = on_the_device("MLP of few rows")
    if waiting == "a choice by a number":
        monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    elif waiting == "a number read":
        monkeypatch.setattr(capture, "_checksum", lambda tensor: tensor.sum().item())
    else:
        monkeypatch.setattr(capture, "_checksum", lambda tensor: (tensor + torch.zeros(70).to(DEVICE)) is None)
    with autospec.watch(model, LABELS, quiet=True) as watcher, Copies(), pytest.raises((RuntimeError, AssertionError)):
        take(2, model, x, watcher)
