"""Shares that nearly cancel, as near a stationary point, are exact without the processor looking at them."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn

import autospec
from autospec.introspection.shares import SMALL

from .simulated import NAME, moved, refusing_to_wait, without_float64

N = 24
LABELS = ["a", "b", "b", "c"] * (N // 4)
LEFT = 1e-4
"""What is left of a gradient when the two halves of each group have been added."""


# Products of so many rows and weights that the processor forms them in float32, and again in float64 where they cancel; and
# groups of few rows, whose shares are not formed.
MODELS = {
    "many rows": (lambda: nn.Linear(64, 64), (N, 40, 64)),
    "few rows": (lambda: nn.Linear(60, 70), (N, 60)),
    "few rows of a group, many of the batch": (lambda: nn.Linear(40, 16), (N, 40)),
    "convolution": (lambda: nn.Conv2d(16, 32, 3), (N, 16, 12, 12)),
    "convolution of few positions": (lambda: nn.Conv2d(64, 64, 3), (N, 64, 4, 4)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(16, 32, 3, stride=2), (N, 16, 12, 12)),
    "grouped convolution": (lambda: nn.Conv2d(32, 64, 3, groups=8), (N, 32, 12, 12)),
    "three dimensions": (lambda: nn.Conv3d(8, 16, 3), (N, 8, 9, 8, 7)),
    "weight-normed": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), (N, 40, 64)),
}


def halves(*shape):
    """The same tensor for both halves of the batch."""
    half = torch.randn(shape[0] // 2, *shape[1:])
    return torch.cat([half, half])


def gradients(model, x, weights):
    model.zero_grad()
    output = model(x)
    (output * weights.to(output)).sum().backward()


@pytest.mark.parametrize("limited", [False, True], ids=["float64", "no float64"])
@pytest.mark.parametrize("case", MODELS)
def test_what_nearly_cancels_is_exact(case, limited):
    torch.manual_seed(0)
    make, shape = MODELS[case]
    model = make()
    x = halves(*shape)
    assert "few rows" in case or x.numel() // x.shape[1 if x.ndim == 4 else -1] * model.weight.numel() > SMALL
    weights = halves(*model(x).shape)
    weights[N // 2 :] *= -(1 + LEFT)
    exact = copy.deepcopy(model).double()
    expected = {}
    for group in ("all", "a", "b", "c"):
        member = torch.tensor([group in ("all", label) for label in LABELS])
        gradients(exact, x.double(), weights.double() * member.view(-1, *[1] * (weights.ndim - 1)))
        expected[group] = {
            name: torch.linalg.svdvals(p.grad.flatten(1)).numpy()
            for name, p in exact.named_parameters()
            if p.ndim > 1 and p.numel() > len(p)  # not a column of norms
        }
    there, x, weights = moved(model), x.to(NAME), weights.to(NAME)
    waiting = contextlib.nullcontext if limited else refusing_to_wait
    with (
        without_float64() if limited else contextlib.nullcontext(),
        autospec.watch(there, LABELS, statistics=["gradient"], quiet=True) as watcher,
    ):
        gradients(there, x, weights)
        watcher.step()
        with waiting():
            gradients(there, x, weights)
            watcher.step()
    for group, of_group in expected.items():
        for name, values in of_group.items():
            recorded = watcher.trajectories[f"layers/{name}/gradient"].sel(group=group, step=1).dropna("index").values
            assert np.abs(recorded - values[: len(recorded)]).max() < 1e-6 * values[0], (name, group)
