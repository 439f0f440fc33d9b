"""Weights for each part of the data, and rows of weights that samples look up."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autospec.testing
from autospec.introspection import WatchError

from .oracle import Problem, error, members, record, spectrum, svdvals
from .own_weights import (
    INPUTS,
    LABELS,
    OUTPUTS,
    STATISTICS,
    N,
    T,
    assert_definition,
    assert_same_training,
    loss_by_sample,
    loss_of,
)

PARTS, PART = 5, 3  # regions, and numbers of each


class Parts(nn.Module):
    """Data of regions, of which each has weights of its own."""

    def __init__(self, use, *shape):
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape)), use
        self.first, self.head = nn.Linear(PART, PART), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.use(self.first(x), self.weight)))


# Data have the shape (samples, regions, numbers).
OF_PARTS = {
    "einsum": (lambda x, w: torch.einsum("bpi,pio->bpo", x, w), (PARTS, PART, 2)),
    "einsum, weights first": (lambda x, w: torch.einsum("poi,...pi->p...o", w, x).transpose(0, 1), (PARTS, 2, PART)),
    "einsum of a vector each": (
        lambda x, w: torch.einsum("bpi,pi->bp", x, w)[..., :4].unflatten(1, (2, 2)),
        (PARTS, PART),
    ),
    "bmm": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (PARTS, PART, 2)),
    "matmul": (lambda x, w: (x.unsqueeze(-2) @ w).squeeze(-2), (PARTS, PART, 2)),
    "matmul from the left": (lambda x, w: (w @ x.unsqueeze(-1)).squeeze(-1), (PARTS, 2, PART)),
    "the same data for all": (lambda x, w: (x.unsqueeze(1) @ w).sum(1), (4, PART, 2)),
    "normalised": (lambda x, w: torch.einsum("bpi,pio->bpo", x, w / w.norm(dim=1, keepdim=True)), (PARTS, PART, 2)),
    "in place afterwards": (lambda x, w: torch.einsum("bpi,pio->bpo", x, w).add_(1.0), (PARTS, PART, 2)),
}


@pytest.mark.parametrize("name", OF_PARTS)
def test_weights_for_each_part_of_the_data(name):
    torch.manual_seed(0)
    use, shape = OF_PARTS[name]
    model, x = Parts(use, *shape), torch.randn(N, PARTS, PART)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert set(tree["layers"].children) == {"weight", "first.weight", "head.weight"}
    assert_definition(tree, model, x)
    assert tree.attrs["audit"]["outside"] == {}
    assert_same_training(model, x)
    found = autospec.testing.check(model, x, LABELS, quiet=True)
    assert found.passed
    assert ("weight", "a") in found.errors


def test_rows_of_weights_for_each_part_are_those_of_a_grouped_convolution():
    torch.manual_seed(0)
    own, x = Parts(OF_PARTS["einsum"][0], PARTS, PART, 2), torch.randn(N, PARTS, PART)
    torchs = copy.deepcopy(own)
    torchs.weight = None
    torchs.grouped = nn.Conv1d(PARTS * PART, PARTS * 2, 1, groups=PARTS, bias=False)
    torchs.grouped.weight.data.copy_(own.weight.detach().transpose(1, 2).reshape(PARTS * 2, PART, 1))
    torchs.use = lambda x, _: torchs.grouped(x.flatten(1).unsqueeze(-1)).view(N, PARTS, 2)
    tree, expected = (record(Problem(model, x, loss_of, LABELS)) for model in (own, torchs))
    for statistic in ("activation", "adjoint"):
        for group in ("all", "a", "b"):
            wanted = spectrum(expected, "grouped.weight", statistic, group)
            assert error(spectrum(tree, "weight", statistic, group)[: len(wanted)], wanted) < 1e-6


def test_a_bilinear_layer_is_a_product_with_all_products_of_two():
    class Two(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.first, self.second = nn.Linear(INPUTS, 4), nn.Linear(INPUTS, 3)
            self.both = nn.Bilinear(4, 3, OUTPUTS) if own else nn.Linear(12, OUTPUTS)

        def forward(self, x):
            one, other = self.first(x), torch.tanh(self.second(x))
            if isinstance(self.both, nn.Bilinear):
                return self.both(one, other)
            return self.both((one.unsqueeze(-1) * other.unsqueeze(-2)).flatten(-2))

    torch.manual_seed(0)
    own, torchs, x = Two(True), Two(False), torch.randn(N, T, INPUTS)
    torchs.load_state_dict(
        {name: each.flatten(1) if each.ndim > 2 else each for name, each in own.state_dict().items()}
    )
    tree, expected = (record(Problem(model, x, loss_of, LABELS)) for model in (own, torchs))
    assert_definition(tree, own, x)
    assert_same_training(own, x)
    for statistic in STATISTICS:
        found, wanted = (spectrum(each, "both.weight", statistic, "a") for each in (tree, expected))
        assert error(found, wanted[: len(found)]) < 1e-6
    assert autospec.testing.check(own, x, LABELS, quiet=True).passed


class BySubject(nn.Module):
    """Weights that are looked up by the number of a subject or a site, of which several samples may be."""

    def __init__(self, use, *shape):
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape)), use
        self.first, self.head = nn.Linear(INPUTS, INPUTS), nn.Linear(2 if len(shape) > 2 else INPUTS, 3)

    def forward(self, x, subjects):
        return self.head(torch.tanh(self.use(self.first(x), self.weight, subjects)))


LOOKED_UP = {
    "its index": (lambda x, w, s: x + w[s].unsqueeze(1), (4, INPUTS)),
    "index_select": (lambda x, w, s: x * w.index_select(0, s).unsqueeze(1), (4, INPUTS)),
    "embedding": (lambda x, w, s: x + F.embedding(s, torch.sigmoid(w)).unsqueeze(1), (4, INPUTS)),
    "matrices": (lambda x, w, s: torch.bmm(x, w[s]), (4, INPUTS, 2)),
    "matrices, gathered": (
        lambda x, w, s: torch.einsum("bti,bio->bto", x, w.gather(0, s.view(-1, 1, 1).expand(-1, *w.shape[1:]))),
        (4, INPUTS, 2),
    ),
    "parts of a matrix": (lambda x, w, s: x @ w[s, :, 1:3], (4, INPUTS, 4)),
}


@pytest.mark.parametrize("name", [name for name in LOOKED_UP if name != "parts of a matrix"])
def test_weights_that_are_looked_up_by_samples_indices(name):
    torch.manual_seed(0)
    use, shape = LOOKED_UP[name]
    model, x, subjects = BySubject(use, *shape), torch.randn(N, T, INPUTS), torch.tensor([0, 1, 1, 3, 0, 2, 2, 1, 3])
    watched, twin = copy.deepcopy(model), copy.deepcopy(model).double()
    with autospec.watch(watched, LABELS, singular_values="all", quiet=True) as watcher:
        loss_of(watched(x, subjects)).backward()
        watcher.step()
    loss_of(model(x, subjects)).backward()
    assert torch.equal(model.weight.grad, watched.weight.grad)
    for group, member in members(LABELS, N).items():
        losses = loss_by_sample(twin(x.double(), subjects))[torch.from_numpy(member)].sum()
        (share,) = torch.autograd.grad(losses, twin.weight)
        found = spectrum(watcher.trajectories, "weight", "gradient", group)
        assert error(found, svdvals(share.reshape(4, -1))) < 1e-6
    assert autospec.testing.check(model, (x, subjects), LABELS, quiet=True).passed


COLUMNS = torch.stack([torch.randperm(INPUTS, generator=torch.Generator().manual_seed(i)) for i in range(N)])
NOT_ROWS = {
    "a padding index": lambda x, w, s: x + F.embedding(s, w, padding_idx=0).unsqueeze(1),
    "columns by an ellipsis": lambda x, w, s: x + w[s[:, None], COLUMNS, ...].unsqueeze(1),
}


@pytest.mark.parametrize("name", NOT_ROWS)
def test_lookups_that_do_not_give_whole_rows_are_refused_by_name(name):
    model, subjects = BySubject(NOT_ROWS[name], 4, INPUTS), torch.tensor([0, 1, 1, 3, 0, 2, 2, 1, 3])
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError, match=r"'weight' in \w+\(\)"):
        model(torch.randn(N, T, INPUTS), subjects)


BROADCAST = {
    "one part for all": (lambda x, w: torch.einsum("bpi,pio->bpo", x, w), (1, PART, 2)),
    "a vector with many matrices": (lambda x, w: (x.mean((0, 1)) @ w).mean(0) + x[..., :2], (4, PART, 2)),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_products_that_broadcast_are_refused_by_name(name):
    use, shape = BROADCAST[name]
    model = Parts(use, 2, *shape[1:])
    model.weight = nn.Parameter(torch.randn(shape)) if shape[0] > 1 else nn.Parameter(torch.randn(2, PART, 2))
    model.use = use if shape[0] > 1 else (lambda x, w: use(x, w[:1]) + use(x, w[1:]))
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError, match=r"'weight' in (einsum|matmul)\(\)"):
        model(torch.randn(N, PARTS, PART))


@pytest.mark.parametrize("count", [4, 3, 1])
def test_a_batch_of_another_size_has_the_rows_of_its_parts(count):
    """Matrices that were stacked are no tokens, though the batch has as many samples as they have rows."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList([nn.Parameter(torch.randn(4, 2)) for _ in range(3)])

        def forward(self, x):
            return torch.einsum("bpi,pio->bpo", x, torch.stack(list(self.parts)))

    torch.manual_seed(0)
    model, batches = Stacked(), [torch.randn(many, 3, 4) for many in (N, count)]
    labels = [LABELS, LABELS[:count]]
    with autospec.watch(model, ["a", "b"], statistics=STATISTICS, singular_values="all", quiet=True) as watcher:
        for x, groups in zip(batches, labels, strict=True):
            watcher.set_groups(groups)
            loss_of(model(x)).backward()
            watcher.step()
    found = watcher.trajectories["layers/parts.0/activation"].isel(step=1).sel(group="all").dropna("index").values
    assert error(found, svdvals(batches[1].flatten(1))) < 1e-6


def test_columns_that_are_looked_up_are_refused_by_name():
    use, shape = LOOKED_UP["parts of a matrix"]
    subjects = torch.tensor([0, 1, 1, 3, 0, 2, 2, 1, 3])
    model = BySubject(use, *shape)
    with (
        autospec.watch(model, LABELS, quiet=True),
        pytest.raises(WatchError, match=r"'weight' in __getitem__\(\).*layers=\['!weight'\]"),
    ):
        model(torch.randn(N, T, INPUTS), subjects)
