"""Kernels of grouped convolutions, summed over few positions at a time, against float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import autospec
from autospec.introspection import kernel_gradients
from autospec.introspection.convolutions import Convolution
from autospec.introspection.shares import Shares
from autospec.introspection.workspace import Workspace

from .oracle import members


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "depthwise, 1-D": (nn.Conv1d(12, 24, 3, padding=1, groups=12), (60, 140)),
    "depthwise, 2-D": (nn.Conv2d(16, 16, 3, padding=1, groups=16), (12, 28, 28)),
    "depthwise, 3-D": (nn.Conv3d(4, 4, 3, padding=1, groups=4), (3, 9, 14, 13)),
    "of channels, as in EEGNet": (nn.Conv2d(8, 16, (22, 1), groups=8), (20, 22, 250)),
    "many positions": (nn.Conv1d(6, 6, 9, padding=4, groups=3), (3, 5003)),
    "many positions, in the second dimension": (
        nn.Conv2d(4, 8, (2, 5), stride=(1, 3), dilation=(1, 2), groups=2),
        (3, 3, 4000),
    ),
    "many positions, stride, dilation": (nn.Conv2d(4, 4, 3, stride=2, dilation=3, padding=2, groups=4), (3, 71, 90)),
    "large kernel": (nn.Conv1d(64, 256, 3, groups=2, padding="same"), (30, 50)),
    "large kernel, many positions": (nn.Conv1d(64, 256, 3, groups=2), (3, 2000)),
    "one position": (nn.Conv1d(90, 360, 1, groups=90), (700, 1)),
    "padding alone is seen": (nn.Conv1d(8, 8, 1, stride=5, padding=2, groups=2), (6, 1)),
    "circular": (nn.Conv1d(4, 4, 3, padding=2, padding_mode="circular", groups=2), (9, 300)),
    "transposed": (nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1, groups=4), (20, 300)),
    "transposed, output padding": (
        nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
        (5, 40, 41),
    ),
    "transposed, output padding beyond the stride": (
        nn.ConvTranspose1d(4, 4, 3, stride=2, dilation=4, output_padding=3, groups=2),
        (5, 2000),
    ),
}


def factors_of(layer, activation, adjoint):
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
    padding = layer.padding
    if padding == "same":
        padding = tuple(size // 2 for size in layer.kernel_size)
    margins = None
    if layer.padding_mode == "circular":
        padding, margins = (0,), (tuple(layer._reversed_padding_repeated_twice), "circular")
    geometry = tuple(layer.weight.shape), layer.stride, padding, layer.dilation, layer.groups, transposed
    return Convolution(activation, adjoint, *geometry, layer.output_padding, margins)


@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["terms of either sign", "terms that agree"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("drawn", [2**24, 2**12], ids=["as large as images", "smaller than images"])
def test_sums_over_few_positions_keep_their_digits_and_know_their_rounding(case, mean, drawn, monkeypatch):
    monkeypatch.setattr(kernel_gradients, "LARGEST_DRAWN", drawn)
    kernel_gradients.summation.cache_clear()
    layer, (items, *space) = CASES[case]
    x = draw(items, layer.in_channels, *space) + mean
    adjoint = draw(*layer(x).shape, seed=1) + mean
    factors = factors_of(layer, x, adjoint)
    counts = [items // 3, items - items // 3]
    totals = [torch.zeros(len(layer.weight), layer.weight[0].numel(), dtype=torch.float64) for _ in counts]
    assert factors.in_pieces
    roundings = factors.add_pieces(counts, totals, Workspace())
    exact = copy.deepcopy(layer).double()
    for part, total, rounding in zip(factors.split(counts), totals, roundings, strict=True):
        output = exact(part.activation.double())
        (right,) = torch.autograd.grad((output * part.adjoint.double()).sum(), exact.weight)
        error = float((total - right.reshape(total.shape)).norm())
        assert error <= float(rounding) ** 0.5
        assert error <= 6e-7 * float(right.norm())
        if not mean:  # and the estimate is no more than what sums over a thousand positions allow
            walk = float(part.converted(torch.square).in_float64().share().sum()) ** 0.5
            assert float(rounding) ** 0.5 <= 10 * torch.finfo(torch.float32).eps * walk


NORMED = nn.utils.parametrizations.weight_norm
LAYERS = {
    "grouped": (lambda: nn.Conv1d(24, 24, 3, padding=1, groups=4, bias=False), (24, 60)),
    "depthwise": (lambda: nn.Conv1d(24, 48, 5, padding=2, groups=24, bias=False), (24, 60)),
    "transposed": (lambda: nn.ConvTranspose1d(24, 24, 3, padding=1, groups=6, bias=False), (24, 60)),
    "regions": (lambda: nn.Conv1d(24, 48, 1, groups=12, bias=False), (24, 1)),
    "three dimensions": (lambda: nn.Conv3d(4, 8, 3, bias=False), (4, 9, 8, 9)),
    "two dimensions": (lambda: nn.Conv2d(4, 8, 3, bias=False), (4, 20, 20)),
    "linear": (lambda: nn.Linear(60, 70, bias=False), (30, 60)),
    "weight-normed, grouped": (lambda: NORMED(nn.Conv1d(24, 24, 3, padding=1, groups=4, bias=False)), (24, 60)),
    "weight-normed, linear": (lambda: NORMED(nn.Linear(60, 70, bias=False)), (30, 60)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("within", [True, False], ids=["within groups", "between groups"])
@pytest.mark.parametrize("kept", [True, False], ids=["factors kept", "factors too large to be kept"])
def test_near_a_stationary_point_every_kind_of_share_keeps_to_the_bar(kind, within, kept, monkeypatch):
    """Samples oppose each other, and what is left of their shares is a thousandth of them."""
    if not kept:
        monkeypatch.setattr("autospec.introspection.shares.LARGEST_KEPT", 0)
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    half = draw(50, *shape)
    x = torch.cat([half, half + 1e-3 * draw(50, *shape, seed=1)])
    factor = torch.randn(50, *layer(x).shape[1:])
    factor = torch.cat([factor, -factor])
    order = torch.arange(100) if not within else torch.arange(100).reshape(2, 50).T.flatten()
    x, factor, labels = x[order], factor[order], ["a"] * 50 + ["b"] * 50
    with autospec.watch(layer, labels, statistics=("gradient",), audit=1, quiet=True) as watcher:
        (layer(x) * factor).sum().backward()
        watcher.step()
    exact = copy.deepcopy(layer).double()
    tree = watcher.trajectories
    for group, member in members(labels, 100).items():
        inside = torch.from_numpy(member)
        exact.zero_grad()
        (exact(x[inside].double()) * factor[inside].double()).sum().backward()
        for name, parameter in exact.named_parameters():
            if f"layers/{name}" not in tree:
                continue
            right = torch.linalg.svdvals(parameter.grad.flatten(1)).numpy()
            recorded = tree[f"layers/{name}/gradient"].sel(group=group).values[0][: len(right)]
            assert np.abs(recorded - right).max() / right[0] < 1e-6, (group, name)
    assert tree.attrs["audit"]["outside"] == {}
    assert tree.attrs["audit"]["largest_error"] < 1e-6


def test_how_sums_are_formed_goes_by_no_default_of_torch_and_draws_from_no_generator_of_its():
    kernel = kernel_gradients.Kernel((8, 4, 3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1)
    found = []
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "meta")):
        kernel_gradients.summation.cache_clear()
        before = torch.get_rng_state()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                found.append(kernel_gradients.summation((20, 20, 20), (20, 20, 20), kernel))
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv3d(16, 16, 3, padding=1), (2, 16, 40, 40, 40)),
        (nn.Conv2d(32, 32, 3, padding=1, groups=32), (64, 32, 32, 32)),
        (nn.Conv2d(64, 64, 3, padding=1, groups=4), (32, 64, 28, 28)),
    ],
    ids=["three dimensions", "depthwise", "grouped"],
)
def test_gradients_without_any_structure_are_not_taken_for_ones_that_cancel(layer, shape, monkeypatch):
    """What is formed again in float64 takes ten times as long."""
    monkeypatch.setattr("autospec.introspection.shares.LARGEST_KEPT", 0)
    found, original = [], Shares._unresolved
    monkeypatch.setattr(Shares, "_unresolved", lambda *rest: found.append(original(*rest)) or found[-1])
    model, labels = nn.Sequential(layer), ["a", "b"] * (shape[0] // 2)
    with autospec.watch(model, labels, statistics=("gradient",), quiet=True) as watcher:
        output = model(draw(*shape))
        (output * draw(*output.shape, seed=1)).sum().backward()
        watcher.step()
    assert found == [[]]
