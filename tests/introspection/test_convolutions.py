"""Convolutions: patches as the true left factor, and the share of each position in space."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autospec.introspection import gathering
from autospec.introspection.shares import Shares
from autospec.introspection.sorting import Sorting

from .families import CONVOLUTIONS, LABELS, Calls, N, convolution, normal, problem, weighted
from .oracle import (
    Problem,
    assert_exact,
    assert_shares,
    captures,
    error,
    members,
    record,
    share_by_copies,
    spectrum,
    svdvals,
)

TABLE = members(LABELS, N)


def patches_2d(layer, x):
    """What the kernel sees at each position, by torch.nn.functional.unfold; shape (items, positions, inputs x kernel)."""
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    elif layer.padding == "same":
        x, padding = F.pad(x, [1, 1, 1, 1]), 0
    else:
        padding = layer.padding
    return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).mT


UNFOLDED = [name for name in CONVOLUTIONS if name.startswith("Conv2d, ") and "checkpointed" not in name]


@pytest.mark.parametrize("case", UNFOLDED)
def test_the_unfolded_activation_is_torchs_own_unfolding(case):
    made = CONVOLUTIONS[case]()
    layer = made.model[0]
    (use,) = captures(made)["0.weight"]
    patches = patches_2d(layer, made.x).double()
    tree = record(made, activation="unfolded")
    node = tree["layers/0.weight"]
    assert ("alignment" in node) == (layer.groups == 1)
    for group, member in TABLE.items():
        inside = torch.from_numpy(member)
        a, share = patches[inside].flatten(0, 1), use.share(member)
        d = use.adjoint(member)
        if layer.groups == 1:
            torch.testing.assert_close(d.T @ a, share)
        for statistic, matrix in (("gradient", share), ("activation", a), ("adjoint", d)):
            recorded = spectrum(tree, "0.weight", statistic, group)
            assert len(recorded) == min(*matrix.shape, *share.shape)
            assert error(recorded, svdvals(matrix)) < 1e-6, (group, statistic)
        if layer.groups == 1:
            count = min(share.shape)
            largest = (svdvals(a)[:count] * svdvals(d)[:count]).sum()
            expected = svdvals(share).sum() / largest
            assert float(node.alignment.sel(group=group)[0]) == pytest.approx(expected, rel=1e-5)
            assert 0 < expected <= 1


@pytest.mark.parametrize("dimensions", [1, 3])
def test_the_unfolded_activation_has_a_row_for_each_output_position(dimensions):
    made = convolution(dimensions, stride=2, padding=1)
    tree = record(made, activation="unfolded", singular_values="all")
    x, layer = F.pad(made.x.double(), [1, 1] * dimensions), made.model[0]
    for axis in range(2, 2 + dimensions):
        x = x.unfold(axis, 3, 2)
    a = x.movedim(1, 1 + dimensions).reshape(-1, 4 * 3**dimensions)
    (use,) = captures(made)["0.weight"]
    torch.testing.assert_close(use.adjoint(TABLE["all"]).T @ a, use.share(TABLE["all"]))
    assert error(spectrum(tree, "0.weight", "activation"), svdvals(a)) < 1e-6
    assert len(spectrum(tree, "0.weight", "activation")) == layer.weight[0].numel()


def test_without_the_true_factors_there_is_no_alignment():
    # the adjoint's rows of a transposed convolution are no patches: with them the ratio may exceed 1
    for options in ({}, {"transposed": True}):
        for activation in ("channels", "unfolded"):
            node = record(convolution(1, **options), activation=activation)["layers/0.weight"]
            assert ("alignment" in node) == (activation == "unfolded" and not options)


@pytest.mark.parametrize("case", ["1-D network", "2-D network", "Conv1d, twice", "Conv2d, checkpointed"])
def test_unfolding_changes_the_activation_alone(case):
    made = CONVOLUTIONS[case]()
    plain, unfolded = record(made), record(made, activation="unfolded")
    assert_exact(unfolded, made, TABLE, ["gradient", "adjoint"])
    for name in plain["layers"].children:
        layer = made.model.get_submodule(name.removesuffix(".weight"))
        same = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d) or layer.weight[0, 0].numel() == 1
        before, after = (tree[f"layers/{name}/activation"].values for tree in (plain, unfolded))
        assert np.allclose(before, after, equal_nan=True) == same


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_large_items_are_not_sorted_and_give_the_same_shares(case, monkeypatch):
    monkeypatch.setattr(gathering, "LARGE_ITEM", 0)
    runs = []
    monkeypatch.setattr(Sorting, "as_they_lie", classmethod(spied(Sorting.as_they_lie.__func__, runs)))
    made = CONVOLUTIONS[case]()
    tree = record(made, statistics=["gradient"], per_position="space")
    assert_exact(tree, made, TABLE, ["gradient"])
    assert any(sorting is not None and len(sorting.keys) > len(set(sorting.keys)) for sorting in runs)
    sorted_first = record(made, per_position="space")
    for name, node in tree["layers"].children.items():
        expected = sorted_first[f"layers/{name}"]
        np.testing.assert_allclose(node["gradient"], expected["gradient"], rtol=0, atol=1e-6 * node["gradient"].max())
        if "gradient_by_position" in node:
            found, other = node["gradient_by_position"], expected["gradient_by_position"]
            np.testing.assert_allclose(found, other, rtol=0, atol=1e-6 * other.max())


def spied(as_they_lie, found):
    def function(*args):
        found.append(as_they_lie(*args))
        return found[-1]

    return function


def shares_of_positions(made, layer, member):
    """Share of each output position: the gradient of the sum over that position alone, given Delta."""
    (use,) = captures(made)["0.weight"]
    weight = layer.weight.detach().double().requires_grad_()
    y = torch.func.functional_call(layer.double(), {"weight": weight}, (made.x.double(),))
    layer.float()
    inside = torch.from_numpy(member).reshape([-1] + [1] * (y.ndim - 1))
    products = (y * use.delta.double() * inside).sum((0, 1)).flatten()
    gradients = [torch.autograd.grad(p, weight, retain_graph=True)[0].reshape(len(weight), -1) for p in products]
    return torch.stack(gradients)


SPATIAL = {
    "1-D": (1, {"stride": 2, "padding": 1}),
    "1-D, groups": (1, {"groups": 2, "padding": "same"}),
    "1-D, circular": (1, {"padding": 1, "padding_mode": "circular", "dilation": 2}),
    "2-D": (2, {"stride": 2, "padding": (0, 1)}),
    "2-D, depthwise": (2, {"groups": 4, "out_channels": 8}),
    "3-D": (3, {"stride": 2, "dilation": 1}),
}


@pytest.mark.parametrize("case", SPATIAL)
def test_the_share_of_a_position_in_space_is_that_of_its_patch(case):
    dimensions, options = SPATIAL[case]
    made = convolution(dimensions, **options)
    tree = record(made, per_position="space")
    recorded = tree["layers/0.weight/gradient_by_position"]
    for group in ("all", "b"):
        shares = shares_of_positions(made, made.model[0], TABLE[group])
        expected = torch.linalg.svdvals(shares).numpy()
        found = recorded.sel(group=group).values[0]
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * expected.max())
        torch.testing.assert_close(shares.sum(0), share_by_copies(made, TABLE[group])["0.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 2}], ids=str)
def test_a_transposed_convolution_has_the_positions_of_its_input(options):
    made = convolution(1, transposed=True, **options)
    (use,) = captures(made)["0.weight"]
    found = record(made, per_position="space")["layers/0.weight/gradient_by_position"].sel(group="a").values[0]
    layer, inside = made.model[0].double(), torch.from_numpy(TABLE["a"]).reshape(-1, 1, 1)
    expected = []
    for position in range(made.x.shape[2]):
        x = torch.zeros_like(made.x).double()
        x[:, :, position] = made.x[:, :, position]
        weight = layer.weight.detach().requires_grad_()
        y = torch.func.functional_call(layer, {"weight": weight}, (x,))
        (share,) = torch.autograd.grad((y * use.delta.double() * inside).sum(), weight)
        expected.append(svdvals(share.reshape(len(weight), -1)))
    np.testing.assert_allclose(found, np.array(expected), rtol=0, atol=1e-6 * np.max(expected))


def test_positions_in_space_are_recorded_on_request_alone():
    made = convolution(1)
    assert "gradient_by_position" not in record(made, per_position=True)["layers/0.weight"]
    assert "gradient_by_position" not in record(made)["layers/0.weight"]


@pytest.mark.parametrize("time_major", [False, True], ids=["sample by sample", "time by time"])
def test_images_of_many_times_flattened_before_the_layer_are_given_to_their_samples(time_major):
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(2, 3, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = x.transpose(0, 1) if time_major else x
            hidden = torch.tanh(self.conv(x.reshape(-1, *x.shape[2:]))).mean(2)
            return self.head(hidden.unflatten(0, x.shape[:2]).mean(0 if time_major else 1))

    times = 4
    rows = torch.arange(N).repeat(times) if time_major else torch.arange(N).repeat_interleave(times)
    made = problem(Flattened(), normal(N, times, 2, 7), {"conv": lambda _: rows})
    tree = record(made)
    assert_exact(tree, made, TABLE)
    for group, member in TABLE.items():
        for name, share in share_by_copies(made, member).items():
            assert error(spectrum(tree, name, "gradient", group), svdvals(share)) < 2e-5


def test_the_rank_is_bounded_by_the_bottleneck_and_by_the_positions_of_a_sample():
    model = nn.Sequential(nn.Conv1d(8, 2, 3), nn.Tanh(), nn.Conv1d(2, 8, 3, stride=4))
    made = problem(model, normal(N, 8, 9))
    made.labels = ["one", *["rest"] * (N - 1)]
    tree = record(made)
    assert tree["layers/0.weight"].rank_limit.values.tolist() == [2, 2, 2]
    # two output positions of one sample
    limit = tree["layers/2.weight"].rank_limit
    assert {str(g): int(limit.sel(group=g)) for g in limit.group.values} == {"all": 6, "one": 2, "rest": 6}
    values = spectrum(tree, "2.weight", "gradient", "one")
    assert (values[2:] < 1e-6 * values[0]).all()


def test_a_loss_that_sees_one_position_gives_it_the_whole_share():
    made = convolution(1)
    made.loss_of_output = lambda y: weighted(y[:, :, 3])
    tree = record(made, per_position="space")
    found = tree["layers/0.weight/gradient_by_position"].sel(group="c").values[0]
    assert (found[[0, 1, 2, 4, 5, 6]] == 0).all()
    whole = tree["layers/0.weight/gradient"].sel(group="c").values[0]
    np.testing.assert_allclose(found[3], whole, rtol=0, atol=1e-6 * whole[0])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_transposed_convolution_may_be_called_with_the_size_of_its_output(dimensions, groups):
    family = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    sizes = [10, 8, 7][:dimensions]  # by itself the layer makes 9, 7 and 7
    layer = family(4, 6, 3, stride=2, padding=1, groups=groups)
    made = problem(Calls(layer, lambda layer, x: layer(x, output_size=sizes)), normal(N, 4, *[5, 4, 4][:dimensions]))
    assert_shares({2e-5: record(made)}, made, TABLE)


WIDE = {
    "one position": lambda: (nn.Conv3d(24, 64, 3, padding=1), (1, 1, 1)),
    "padded, strided": lambda: (nn.Conv2d(24, 64, 3, stride=2, padding=1), (3, 2)),
    "dilated, reflected": lambda: (nn.Conv1d(24, 64, 3, dilation=2, padding=2, padding_mode="reflect"), (4,)),
    "asymmetric": lambda: (nn.Conv2d(24, 64, (2, 3), padding="same"), (1, 2)),
    "transposed": lambda: (nn.ConvTranspose2d(64, 24, 3, stride=2, padding=1, output_padding=1), (2, 1)),
    "grouped": lambda: (nn.Conv2d(64, 64, 3, padding=1, groups=2), (1, 1)),
    "of one": lambda: (nn.Conv1d(64, 64, 1), (2,)),
}


@pytest.mark.parametrize("case", WIDE)
def test_a_convolution_of_few_positions_and_many_channels_is_a_product_of_its_patches(case, monkeypatch):
    torch.manual_seed(0)
    layer, positions = WIDE[case]()
    model = nn.Sequential(nn.Conv1d(3, layer.in_channels, 1), nn.Tanh(), nn.Unflatten(2, positions), layer, nn.Tanh())
    made = Problem(model, torch.randn(8, 3, int(np.prod(positions))), weighted, list("abbabbab"))
    formed = []
    original = Shares._form
    monkeypatch.setattr(Shares, "_form", lambda shares: formed.append(shares.shape) or original(shares))
    tree = record(made)
    assert_exact(tree, made, members(made.labels, 8))
    assert (tuple(layer.weight.flatten(1).shape) in formed) == (case == "grouped")


def test_a_convolution_of_few_positions_counts_each_of_its_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Conv1d(3, 64, 1), nn.Conv1d(64, 64, 3, padding=1)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    made = Problem(Twice(), torch.randn(8, 3, 2), weighted, list("abbabbab"))
    assert_exact(record(made), made, members(made.labels, 8))
    long = Problem(made.model, torch.randn(8, 3, 5), weighted, made.labels)  # the second use is no longer of few rows
    assert_exact(record(long), long, members(made.labels, 8))


def test_patches_that_cancel_are_summed_in_float64_where_they_take_more_than_the_images():
    torch.manual_seed(0)
    pairs, channels = 20, 512
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    some, weights = torch.randn(pairs, 1, channels, 2, 2), torch.randn(pairs, 1, channels, 2, 2)
    x = torch.cat([some, some, 1e-4 * torch.randn(pairs, 3, channels, 2, 2)], 1).flatten(0, 1)
    sign = torch.tensor([1, -1 - 1e-4, 1, 1, 1]).view(1, 5, 1, 1, 1)
    weights = (weights * sign).flatten(0, 1)  # in every five the first two cancel but for a ten-thousandth
    labels = list("abbab") * pairs
    made = Problem(layer, x, lambda output: (output * weights.to(output.dtype)).sum(), labels)
    tree = record(made, statistics=["gradient"], singular_values=4)
    exact = copy.deepcopy(layer).double()
    made.loss_of_output(exact(x.double())).backward()
    expected = svdvals(exact.weight.grad.flatten(1))
    assert error(spectrum(tree, "weight", "gradient"), expected[:4]) < 1e-6
