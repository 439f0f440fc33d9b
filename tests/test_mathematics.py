"""The counterexample to the paper's Eq. 4, and what holds instead, on recorded spectra."""

import numpy as np
import torch
from torch import nn

import autospec


def test_the_gradients_singular_values_are_no_products():
    activation = np.array([[1.0], [0.0]])
    adjoint = np.array([[0.0], [1.0]])
    product = np.linalg.svd(activation, compute_uv=False) * np.linalg.svd(adjoint, compute_uv=False)
    assert product == [1.0]
    assert np.linalg.svd(adjoint.T @ activation, compute_uv=False) == [0.0]


def test_products_of_recorded_singular_values_bound_the_gradients():
    torch.manual_seed(0)
    x, labels = torch.randn(30, 12), ["a", "b", "b"] * 10
    model = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with autospec.watch(model, groups=labels) as watcher:
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x).backward()
            watcher.step()
            optimizer.step()
    for node in watcher.trajectories["layers"].children.values():
        spectra = {name: node[name].values.astype(float) for name in ("gradient", "activation", "adjoint")}
        left = np.cumsum(np.log(spectra["gradient"]), axis=-1)
        right = np.cumsum(np.log(spectra["activation"] * spectra["adjoint"]), axis=-1)
        assert (left <= right + 1e-4).all()
        assert (left < right - 0.1).any(), "equality, as in Eq. 4, would be a coincidence"
