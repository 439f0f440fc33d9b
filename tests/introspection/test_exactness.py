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
    "in-place ReLU, 3-D": lambda: Problem(
        nn.Sequential(nn.Linear(9, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.ReLU(inplace=True)),
        normal(N, 3, 9),
        mean_square,
        LABELS,
    ),
    "in-place dropout, 3-D": lambda: Problem(
        nn.Sequential(nn.Linear(9, 6), nn.Dropout(0.4, inplace=True), nn.Linear(6, 4)),
        normal(N, 3, 9),
        mean_square,
        LABELS,
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


class Prescribed(nn.Module):
    """A product whose adjoint is what the batch says: the last columns of x."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x):
        return self.inner(x[..., : self.inner.in_features])


def prescribed_steps(model, x, labels, parts=1, **options):
    """Record a step whose adjoint is prescribed; the batch comes in parts."""
    with autospec.watch(model, labels, quiet=True, **options) as watcher:
        for rows in torch.arange(len(x)).chunk(parts):
            if parts > 1:
                watcher.set_groups([labels[i] for i in rows])
            (model(x[rows]) * x[rows][..., model.inner.in_features :]).sum().backward()
        watcher.step()
    return watcher.trajectories


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    width=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    positions=st.integers(1, 3),
    parts=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_few_rows_or_many_in_one_batch_or_several_are_exact(sizes, width, positions, parts, seed):
    torch.manual_seed(seed)
    labels = [str(group) for group, size in enumerate(sizes) for _ in range(size)]
    x = torch.randn(len(labels), positions, sum(width))
    tree = prescribed_steps(Prescribed(*width), x, labels, parts, batch_dim=0)
    for group, member in members(labels, len(labels)).items():
        a, d = (rows.double().flatten(0, 1) for rows in x[torch.from_numpy(member)].split(width, -1))
        for statistic, matrix in (("gradient", d.T @ a), ("activation", a), ("adjoint", d)):
            recorded = spectrum(tree, "inner.weight", statistic, group)
            assert len(recorded) == min(*matrix.shape, *width)
            assert error(recorded, svdvals(matrix)) < 1e-6, (group, statistic)
    assert tree.attrs["audit"]["outside"] == {}


@pytest.mark.parametrize(
    ("rows", "width"), [(10, (1, 1)), (200, (1, 1)), (10, (12, 20)), (200, (12, 20)), (1000, (60, 50))], ids=str
)
def test_shares_that_nearly_cancel_as_near_a_stationary_point_are_exact(rows, width):
    a, d = normal(rows, width[0]), torch.randn(rows, width[1])
    x = torch.cat([torch.cat([a, d], 1), torch.cat([a, -d + 0.05 * torch.randn_like(d)], 1)])
    labels = ["a"] * rows + ["b"] * rows
    tree = prescribed_steps(Prescribed(*width), x, labels)
    a, d = x.double().split(width, -1)
    expected = svdvals(d.T @ a)
    assert expected[0] < 0.2 * svdvals(d[:rows].T @ a[:rows])[0]
    assert error(spectrum(tree, "inner.weight", "gradient"), expected) < 1e-6


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
    x = normal(10, 50)
    x[2, 33] = float("nan")
    labels = ["diverged"] * 5 + ["fine"] * 5
    with pytest.warns(UserWarning, match="not finite"):
        tree = prescribed_steps(Prescribed(30, 20), x, labels)
    assert tree["layers/inner.weight/gradient"].sel(group=["all", "diverged"]).isnull().all()
    a, d = x[5:].double().split((30, 20), -1)
    recorded = spectrum(tree, "inner.weight", "gradient", "fine")
    assert len(recorded) == 20
    assert error(recorded, svdvals(d.T @ a)) < 1e-6
