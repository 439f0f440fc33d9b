"""Recorded spectra against the definitions, run literally in float64."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autospec
from autospec.introspection.factors import Product
from autospec.introspection.pending import Share, share_grams
from autospec.introspection.spectra import singular_values

from .oracle import (
    Problem,
    assert_exact,
    error,
    factors,
    members,
    record,
    sample_second,
    share_by_copies,
    spectrum,
    svdvals,
)

N = 23
LABELS = ["a", "b", "b", "c"] * 6
LABELS = LABELS[:N]


def mean_square(output):
    """A generic loss: no symmetry, no constant part."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (weights * (output - 0.3).square()).mean()


class Twice(nn.Module):
    """A layer called twice in one forward pass."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Tied(nn.Module):
    """One parameter in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Residual(nn.Module):
    """Nested blocks, keyword input and a branch."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(input=x)


class Checkpointed(nn.Module):
    """The activations of a block are computed again during the backward pass."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(7, 6), nn.Tanh()), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False))


def autoencoder():
    return nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 12))


def classifier():
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def cross_entropy(output):
    return F.cross_entropy(output, torch.arange(N) % 3)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


SMOOTH = {
    "autoencoder": lambda: Problem(autoencoder(), normal(N, 12), mean_square, LABELS),
    "classifier": lambda: Problem(classifier(), normal(N, 12), cross_entropy, LABELS),
    "one layer": lambda: Problem(nn.Linear(4, 3), normal(N, 4), mean_square, LABELS),
    "as many features as samples": lambda: Problem(nn.Linear(N, 3), normal(N, N), mean_square, LABELS),
    "sample, time, feature": lambda: Problem(autoencoder(), normal(N, 4, 12), mean_square, LABELS),
    "time, sample, feature": lambda: Problem(autoencoder(), normal(4, N, 12), mean_square, LABELS, sample_second),
    "four dimensions": lambda: Problem(autoencoder(), normal(N, 2, 3, 12), mean_square, LABELS),
    "called twice": lambda: Problem(Twice(), normal(N, 6), mean_square, LABELS),
    "tied weights": lambda: Problem(Tied(), normal(N, 6), mean_square, LABELS),
    "residual": lambda: Problem(Residual(), normal(N, 7), mean_square, LABELS),
    "checkpointed": lambda: Problem(Checkpointed(), normal(N, 7), mean_square, LABELS),
    "no bias": lambda: Problem(
        nn.Sequential(nn.Linear(9, 4, bias=False), nn.Tanh(), nn.Linear(4, 9, bias=False)),
        normal(N, 9),
        mean_square,
        LABELS,
    ),
    "batch normalisation": lambda: Problem(
        nn.Sequential(nn.Linear(9, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)), normal(N, 9), mean_square, LABELS
    ),
    "layer normalisation": lambda: Problem(
        nn.Sequential(nn.Linear(9, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)), normal(N, 9), mean_square, LABELS
    ),
    "dropout": lambda: Problem(
        nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 4)), normal(N, 9), mean_square, LABELS
    ),
    "several groupings": lambda: Problem(
        autoencoder(), normal(N, 12), mean_square, {"diagnosis": LABELS, "sex": [i % 2 for i in range(N)]}
    ),
    "missing labels": lambda: Problem(
        autoencoder(), normal(N, 12), mean_square, [None, float("nan"), "x", "y", "x"] * 4 + ["x", "y", None]
    ),
    "numbers as labels": lambda: Problem(autoencoder(), normal(N, 12), mean_square, torch.arange(N) // 8),
    "one sample a group": lambda: Problem(autoencoder(), normal(N, 12), mean_square, np.arange(N)),
    "no groups": lambda: Problem(autoencoder(), normal(N, 12), mean_square, None),
}
KINKED = {
    "in-place ReLU": lambda: Problem(
        nn.Sequential(nn.Linear(9, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)), normal(N, 9), mean_square, LABELS
    ),
    "in-place dropout": lambda: Problem(
        nn.Sequential(nn.Linear(9, 6), nn.Dropout(0.4, inplace=True), nn.Linear(6, 4)),
        normal(N, 9),
        mean_square,
        LABELS,
    ),
}


def table_of(problem):
    labels = problem.labels
    return members(labels.tolist() if hasattr(labels, "tolist") else labels, N)


@pytest.mark.parametrize("case", SMOOTH | KINKED)
def test_spectra_are_those_of_the_rows_of_the_very_step(case):
    problem = (SMOOTH | KINKED)[case]()
    table = table_of(problem)
    tree = record(problem)
    assert set(tree.group.values) == set(table)
    assert_exact(tree, problem, table)


@pytest.mark.parametrize("case", SMOOTH)
def test_gradient_spectra_are_those_of_weights_copied_for_the_group(case):
    problem = SMOOTH[case]()
    tree = record(problem)
    for group, member in table_of(problem).items():
        for layer, share in share_by_copies(problem, member).items():
            recorded = spectrum(tree, layer, "gradient", group)
            assert len(recorded) == min(share.shape)
            assert error(recorded, svdvals(share)) < 2e-5, (layer, group)


@pytest.mark.parametrize("case", SMOOTH)
def test_the_two_oracles_agree_so_rows_and_copies_mean_the_same(case):
    problem = SMOOTH[case]()
    rows = factors(problem)
    for member in table_of(problem).values():
        for layer, share in share_by_copies(problem, member).items():
            a, d, samples = rows[layer]
            chosen = torch.from_numpy(member)[samples]
            assert (d[chosen].T @ a[chosen] - share).norm() < 2e-5 * share.norm()


def test_batch_normalisation_makes_the_share_differ_from_the_gradient_of_the_groups_own_loss():
    problem = SMOOTH["batch normalisation"]()
    member = members(LABELS, N)["b"]
    share = share_by_copies(problem, member)["0.weight"]
    alone = copy.deepcopy(problem.model).double()
    output = alone(problem.x[torch.from_numpy(member)].double())
    weights = torch.linspace(0.5, 1.5, N * 4, dtype=torch.float64).reshape(N, 4)[torch.from_numpy(member)]
    ((weights * (output - 0.3).square()).sum() / (N * 4)).backward()
    difference = (alone[0].weight.grad - share).norm() / share.norm()
    assert difference > 0.02
    recorded = spectrum(record(problem), "0.weight", "gradient", "b")
    assert error(recorded, svdvals(share)) < 2e-5
    assert error(recorded, svdvals(alone[0].weight.grad)) > 1e-3


@pytest.mark.parametrize("pattern", ["first.weight", "second.weight"])
def test_a_tied_weight_has_the_rows_of_all_its_uses_under_whichever_name_it_was_selected(pattern):
    problem = Problem(Tied(), normal(N, 6), mean_square, LABELS)
    tree = record(problem, layers=[pattern])
    assert tree["layers"].children.keys() == {"first.weight"}
    assert tree["layers/first.weight"].attrs["also"] == ["second.weight"]
    expected = svdvals(share_by_copies(problem, members(LABELS, N)["a"])["first.weight"])
    assert error(spectrum(tree, "first.weight", "gradient", "a"), expected) < 2e-5
    assert tree.attrs["audit"]["outside"] == {}


def test_frozen_layers_are_recorded_as_nan_and_the_others_as_always():
    problem = SMOOTH["autoencoder"]()
    problem.model[0].weight.requires_grad_(False)
    tree = record(problem)
    for statistic in ("gradient", "activation", "adjoint", "gradient_noise_floor"):
        assert tree[f"layers/0.weight/{statistic}"].isnull().all()
    a, d, _ = factors(problem)["2.weight"]
    assert error(spectrum(tree, "2.weight", "gradient"), svdvals(d.T @ a)) < 1e-6


def test_a_layer_is_recorded_from_the_step_at_which_it_is_unfrozen():
    problem = SMOOTH["autoencoder"]()
    with autospec.watch(problem.model, LABELS) as watcher:
        for trainable in (False, True):
            problem.model[0].requires_grad_(trainable)
            problem.model.zero_grad()
            problem.loss().backward()
            watcher.step()
    recorded = watcher.trajectories["layers/0.weight/gradient"].sel(group="c")
    assert recorded[0].isnull().all()
    expected = svdvals(share_by_copies(problem, members(LABELS, N)["c"])["0.weight"])
    assert error(recorded.values[1], expected) < 2e-5


def test_every_step_of_a_training_is_exact():
    problem = SMOOTH["classifier"]()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.05)
    before = []
    with autospec.watch(problem.model, LABELS) as watcher:
        for _ in range(4):
            before.append(copy.deepcopy(problem.model))
            optimizer.zero_grad()
            problem.loss().backward()
            watcher.step()
            optimizer.step()
    tree = watcher.trajectories
    for step, model in enumerate(before):
        problem.model = model
        assert_exact(tree.isel(step=[step]), problem, members(LABELS, N))
    assert not np.allclose(tree["layers/0.weight/gradient"][0], tree["layers/0.weight/gradient"][3], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_group_is_exact_relative_to_the_batch(dtype):
    x = normal(N, 12).to(dtype)
    x[:3] *= 1e-7
    model = autoencoder().to(dtype)
    problem = Problem(model, x, lambda y: (y.square() * (x.abs() + 1e-9)).mean(), ["small"] * 3 + ["large"] * 20)
    assert_exact(record(problem), problem, members(problem.labels, N))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    width=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    positions=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_shares_of_disjoint_groups_sum_to_the_gradient(sizes, width, positions, seed):
    torch.manual_seed(seed)
    weight = torch.randn(*width, requires_grad=True)
    activation = torch.randn(sum(sizes) * positions, width[1])
    output = activation @ weight.T
    adjoint, gradient = torch.autograd.grad(torch.tanh(output).square().sum(), [output, weight])
    counts = [size * positions for size in sizes]
    shares = [Share(weight.shape) for _ in counts]
    for _ in range(2):  # as two micro-batches of the same samples would
        for share, a, d in zip(shares, activation.detach().split(counts), adjoint.split(counts), strict=True):
            share.add(Product(a, d))
    matrices = [share.matrix() for share in shares]
    largest = max(float(matrix.abs().max()) for matrix in matrices)
    assert torch.allclose(torch.stack(matrices).sum(0), 2 * gradient, rtol=0, atol=1e-5 * largest)
    groups = [[share] for share in shares] + [shares]
    for cells, found in zip(groups, singular_values(share_grams(groups)), strict=True):
        exact = torch.linalg.svdvals(torch.stack([cell.matrix().double() for cell in cells]).sum(0))
        padded = torch.nn.functional.pad(found, (0, max(0, len(exact) - len(found))))
        assert torch.allclose(padded[: len(exact)], exact, rtol=0, atol=1e-6 * float(exact[0]))


@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=4, max_size=20).filter(lambda v: any(v)),
    widths=st.lists(st.integers(1, 8), min_size=2, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_labels_and_widths_are_exact(labels, widths, seed):
    torch.manual_seed(seed)
    layers = [module for pair in pairwise(widths) for module in (nn.Linear(*pair), nn.Tanh())]
    problem = Problem(nn.Sequential(*layers), torch.randn(len(labels), widths[0]), mean_square, labels)
    tree = record(problem, batch_dim=0)
    assert_exact(tree, problem, members(labels, len(labels)))
    assert tree.attrs["audit"]["outside"] == {}


def test_a_diverged_group_spares_another_of_the_same_size():
    torch.manual_seed(0)
    shares = [Share((20, 30)) for _ in range(2)]
    for share in shares:
        share.add(Product(torch.randn(5, 30), torch.randn(5, 20)))
    shares[0].products[0].adjoint[2, 3] = float("nan")
    diverged, fine = singular_values(share_grams([[share] for share in shares]))
    assert diverged.isnan().all()
    exact = torch.linalg.svdvals(shares[1].matrix().double())[:5]
    assert torch.allclose(fine, exact, rtol=0, atol=1e-6 * float(exact[0]))
