"""The same on a GPU: exact, and the training unchanged."""

import copy

import pytest
import torch
from torch import nn

import autospec

from .families import EVERYTHING, FAMILIES
from .oracle import train_watched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these need an NVIDIA GPU"),
]
LABELS = ["a", "b", "b", "c"] * 32


def train(watched: bool):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    x = torch.rand(128, 40, device="cuda")
    model = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 40)).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    watcher = autospec.watch(model, LABELS) if watched else None
    if watcher:
        watcher.__enter__()
    first = []
    for step in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x).backward()
        if step == 0:
            first = [p.grad.double().cpu() for p in model.parameters() if p.ndim == 2]
        if watcher:
            watcher.step()
        optimizer.step()
    if watcher:
        watcher.__exit__(None, None, None)
    return model, first, watcher and watcher.trajectories


def test_training_is_bitwise_unchanged():
    plain, watched = train(False)[0], train(True)[0]
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_spectra_are_those_of_the_gradient():
    _, gradients, tree = train(True)
    for name, gradient in zip(("0.weight", "2.weight"), gradients, strict=True):
        exact = torch.linalg.svdvals(gradient)
        recorded = torch.from_numpy(tree[f"layers/{name}/gradient"].sel(step=0, group="all").values).double()
        assert float((recorded - exact).abs().max() / exact[0]) < 1e-6
    assert tree.attrs["audit"]["largest_error"] < 1e-6


# CUDA's kernel keeps to itself which units it drops between the levels of one recurrent layer.
CASES = [name for name in FAMILIES if not (name.startswith(("RNN", "GRU", "LSTM")) and "dropout" in name)]


def train_family(made, options=None):
    """Train a copy; return its weights, and the watcher."""
    model = copy.deepcopy(made.model).cuda()
    watcher = train_watched(made, model, made.x.cuda(), options)
    return list(model.parameters()), watcher


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_exact_and_its_training_unchanged(case, monkeypatch):
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(backend, "allow_tf32", False)
    torch.manual_seed(0)
    made = FAMILIES[case]()
    (first, _), (second, _) = train_family(made), train_family(made)
    weights, watcher = train_family(made, EVERYTHING)
    if all(map(torch.equal, first, second)):  # sums of some kernels depend on which thread comes first
        assert all(map(torch.equal, weights, first))
    audit = watcher.trajectories.attrs["audit"]
    assert audit["largest_error"] < 1e-6
    assert audit["outside"] == {}
