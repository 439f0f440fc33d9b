"""Embeddings: counts of indices, padding, tables that all samples share, and the tie to the output layer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import autospec
from autospec.introspection import WatchError

from .families import EMBEDDINGS, LABELS, LanguageModel, N, T, Words, normal, problem, weighted, whole_numbers
from .oracle import (
    assert_shares,
    captures,
    error,
    members,
    record,
    share_by_copies,
    shared_by,
    spectrum,
    svdvals,
    weights_after_training,
)

TABLE = members(LABELS, N)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_activation_holds_the_roots_of_counts_and_padding_does_not_count(padding, sparse):
    made = problem(nn.Embedding(8, 6, padding_idx=padding, sparse=sparse), whole_numbers(8, N, T))
    tree = record(made, singular_values="all")
    for group, member in TABLE.items():
        index = made.x[torch.from_numpy(member)].flatten()
        counts = np.bincount(index[index != (-1 if padding is None else padding)], minlength=8)
        recorded = spectrum(tree, "weight", "activation", group)
        np.testing.assert_allclose(recorded, np.sort(np.sqrt(counts))[::-1], rtol=1e-6)
        rows = int(counts.sum())
        assert int(tree["layers/weight"].rank_limit.sel(group=group)) == min(rows, 6)


def test_a_table_shared_by_the_batch_has_a_row_for_each_sample_and_position():
    made = EMBEDDINGS["Embedding, positions"]()
    tree = record(made)
    sizes = {group: member.sum() for group, member in TABLE.items()}
    for group in TABLE:
        recorded = spectrum(tree, "positions.weight", "activation", group)
        expected = np.sqrt([sizes[group]] * T + [0] * (len(recorded) - T))
        np.testing.assert_allclose(recorded, expected[: len(recorded)], rtol=1e-6)
    assert tree.attrs["audit"]["batch_dims"] == [0]


class Positions(nn.Module):
    """Floating-point input, and a table of positions that is added to it."""

    def __init__(self, places, dim=0):
        super().__init__()
        self.positions, self.inner, self.places = nn.Embedding(T + 1, 7), nn.Linear(7, 5), places

    def forward(self, x):
        return torch.tanh(self.inner(x + self.positions(self.places)))


SHARED = {
    "indices": (Positions(torch.arange(T)), (N, T, 7), 0),
    "one row of indices": (Positions(torch.arange(T).unsqueeze(0)), (N, T, 7), 0),
    "one column of indices, time first": (Positions(torch.arange(T).unsqueeze(1)), (T, N, 7), 1),
    "one index": (Positions(torch.tensor([2])), (N, 7), 0),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_shared_table_added_to_data_is_followed_to_each_sample(case):
    model, shape, dim = SHARED[case]
    where = {"positions": shared_by(N, dim) if len(shape) == 3 else lambda y: torch.arange(N), "inner": dim}
    made = problem(copy.deepcopy(model), normal(*shape), where)
    tree = record(made)
    assert tree.attrs["audit"]["outside"] == {}
    assert_shares({2e-5: tree}, made, TABLE)


@pytest.mark.parametrize("data", ["numbers", "indices"])
def test_a_table_of_as_many_positions_as_there_are_samples_is_shared(data):
    model = Positions(torch.arange(N))
    model.positions = nn.Embedding(N, 7)
    x = normal(N, N, 7)
    if data == "indices":
        model, x = nn.Sequential(nn.Embedding(20, 7), model), whole_numbers(20, N, N)
    prefix = "1." if data == "indices" else ""
    made = problem(model, x, {f"{prefix}positions": shared_by(N)})
    tree = record(made, batch_dim=0)
    assert_shares({2e-5: tree}, made, TABLE)


@pytest.mark.parametrize("how", ["layers", "frozen", "rows"])
def test_a_table_that_is_left_out_does_not_matter(how):
    class TimeFirst(Positions):
        def forward(self, x):
            return torch.tanh(self.inner(x + self.positions(self.places).unsqueeze(1)))

    made = problem(TimeFirst(torch.arange(T)), normal(T, N, 7), {"inner": 1})
    options = {"layers": {"layers": ["inner.*"]}, "rows": {"rows": {"positions.weight": [0] * T}}}.get(how, {})
    if how == "frozen":
        made.model.positions.requires_grad_(False)
    tree = record(made, **options)
    for group, member in TABLE.items():
        (use,) = captures(made)["inner.weight"]
        assert error(spectrum(tree, "inner.weight", "gradient", group), svdvals(use.share(member))) < 1e-6


def test_a_table_that_is_tied_to_the_output_has_the_share_of_both_uses_and_the_rows_of_each():
    made = problem(LanguageModel(), whole_numbers(20, N, T))
    tree = record(made, singular_values="all")
    assert set(tree["layers"].children) == {"words.weight", "inner.weight"}
    assert tree["layers/words.weight"].attrs["also"] == ["head.weight"]
    for group, member in TABLE.items():
        share = share_by_copies(made, member)["words.weight"]
        assert error(spectrum(tree, "words.weight", "gradient", group), svdvals(share)) < 2e-5
        lookup, product = captures(made)["words.weight"]
        for statistic in ("activation", "adjoint"):
            # one use has 20 columns and the other 6: the spectra stand side by side
            both = np.concatenate([svdvals(getattr(use, statistic)(member)) for use in (lookup, product)])
            recorded = spectrum(tree, "words.weight", statistic, group)
            assert error(recorded, np.sort(both)[::-1]) < 1e-6


class Tied(nn.Module):
    """A table that is the output layer, too: of all words, or of the first samples' alone."""

    def __init__(self, words, width, predicted):
        super().__init__()
        self.words, self.head, self.predicted = (
            nn.Embedding(words, width),
            nn.Linear(width, words, bias=False),
            predicted,
        )
        self.head.weight = self.words.weight

    def forward(self, x):
        hidden = torch.tanh(self.words(x))
        return torch.cat(
            [self.head(hidden[: self.predicted]).flatten(1).sum(1), hidden[self.predicted :].flatten(1).sum(1)]
        )


@pytest.mark.parametrize(
    "options", [{}, {"audit": 1}, {"statistics": ("gradient", "contrast", "cosine", "angles")}], ids=str
)
@pytest.mark.parametrize("predicted", [6, 2])
@pytest.mark.parametrize(("words", "width"), [(50, 20), (50, 40), (300, 100)])
def test_a_tied_table_of_few_rows_has_the_share_of_both_uses(words, width, predicted, options):
    torch.manual_seed(0)
    model, x, labels = Tied(words, width, predicted), whole_numbers(words, 6, 3), list("aabbab")
    with autospec.watch(model, labels, quiet=True, **options) as watcher:
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
            watcher.step()
    for group, member in members(labels, 6).items():
        twin = copy.deepcopy(model).double()
        output = twin(x)
        output[torch.from_numpy(member)].square().sum().backward()  # no sample's loss depends on another's
        expected = svdvals(twin.words.weight.grad)
        for step in range(2):
            recorded = spectrum(watcher.trajectories, "words.weight", "gradient", group, step)
            assert error(recorded, expected) < 2e-6, (group, step)


def test_a_tied_table_keeps_its_digits_where_the_lookups_cancel_the_products():
    class Both(Tied):
        def forward(self, x, index):
            return self.head(x), self.words(index)

    torch.manual_seed(0)
    model, x, index = Both(300, 40, 0), torch.randn(4, 60, 40), torch.arange(300).reshape(4, 75)
    product = torch.randn(4, 60, 300)
    share = product.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    lookup = (-0.9999 * share).float().reshape(4, 75, 40)
    with autospec.watch(model, statistics=("gradient",), quiet=True) as watcher:
        for _ in range(2):
            model.zero_grad()
            of_x, of_index = model(x, index)
            ((of_x * product).sum() + (of_index * lookup).sum()).backward()
            watcher.step()
    expected = svdvals(share + lookup.double().reshape(300, 40))
    for step in range(2):
        assert error(spectrum(watcher.trajectories, "words.weight", "gradient", "all", step), expected) < 1e-6


def test_a_word_that_comes_very_often_keeps_its_digits_in_a_tied_table():
    torch.manual_seed(0)
    model, x = Tied(50, 20, 2), torch.zeros(4, 5000, dtype=torch.int64)
    with autospec.watch(model, statistics=("gradient",), quiet=True) as watcher:
        for _ in range(2):
            model.zero_grad()
            output = model(x)
            output[2:].sum().backward()
            watcher.step()
    weight = model.words.weight.detach().double()[0]
    expected = 10000 * float((1 - weight.tanh() ** 2).norm())
    assert abs(spectrum(watcher.trajectories, "words.weight", "gradient", "all", 1)[0] / expected - 1) < 1e-6


def test_a_frozen_table_is_nan_and_the_rest_as_always():
    made = problem(nn.Sequential(nn.Embedding.from_pretrained(normal(9, 6)), nn.Linear(6, 4)), whole_numbers(9, N, T))
    tree = record(made)
    assert tree["layers/0.weight/gradient"].isnull().all()
    (use,) = captures(made)["1.weight"]
    assert error(spectrum(tree, "1.weight", "gradient", "b"), svdvals(use.share(TABLE["b"]))) < 1e-6


def test_a_table_with_a_largest_norm_is_watched_and_trains_as_without():
    trained = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(9, 6, max_norm=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        watcher = autospec.watch(model, LABELS, quiet=True) if watched else None
        with watcher or torch.enable_grad():
            for _ in range(3):
                optimizer.zero_grad()
                weighted(model(whole_numbers(9, N, T))).backward()
                if watcher:
                    watcher.step()
                optimizer.step()
        trained.append(model.weight)
    assert torch.equal(*trained)
    assert watcher.trajectories.attrs["audit"]["outside"] == {}


def test_a_table_whose_gradient_is_scaled_by_counts_is_refused_and_can_be_left_out():
    with pytest.raises(WatchError, match=r"scale_grad_by_freq=True .*no group shares: leave it out with layers="):
        record(problem(nn.Embedding(9, 6, scale_grad_by_freq=True), whole_numbers(9, N, T)))
    made = problem(
        Words("row", types=True, scale_grad_by_freq=True), whole_numbers(20, N, T), {"positions": shared_by(N)}
    )
    with pytest.raises(WatchError, match=r"'words\.weight' is .* scale_grad_by_freq=True"):
        record(made)
    others = ["positions.weight", "types.weight"]
    tree = record(made, layers=others)
    assert list(tree["layers"].children) == others
    shares = share_by_copies(made, TABLE["b"])
    for name in others:
        assert error(spectrum(tree, name, "gradient", "b"), svdvals(shares[name])) < 2e-5


def test_a_batch_of_other_indices_at_every_step_is_followed():
    model, batches = Words("row", types=True, padding_idx=0), torch.randint(0, 20, (3, N, T))
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for x in batches:
            model.zero_grad()
            weighted(model(x)).backward()
            watcher.step()
    for step, x in enumerate(batches):
        made = problem(model, x, {"positions": shared_by(N)})
        for name, share in share_by_copies(made, TABLE["b"]).items():
            recorded = spectrum(watcher.trajectories, name, "gradient", "b", step)
            assert error(recorded, svdvals(share)) < 2e-5


def test_padding_that_lies_elsewhere_at_each_step_leaves_nothing_behind():
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 2))
    kept = []
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(1, 9, (len(LABELS), 5), generator=generator)
            tokens = tokens * (torch.rand(tokens.shape, generator=generator) < 0.7)
            model(tokens).square().mean().backward()
            watcher.step()
            kept.append(len(watcher._gathering._sortings))
    assert len(set(kept[1:])) == 1


def test_a_table_that_reads_rows_at_some_steps_alone_has_all_its_values():
    """Tied to an output layer, it has rows of either kind at some steps: their spectra are of different lengths."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.back, self.read = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Linear(5, 4)
            self.back.weight = self.table.weight

        def forward(self, x, words=None):
            states = torch.tanh(self.read(x))
            return self.back(states if words is None else states + self.table(words))

    model, x, words = Sometimes(), normal(len(LABELS), 5), torch.randint(0, 9, (len(LABELS),))
    with autospec.watch(model, LABELS, singular_values="all", quiet=True) as watcher:
        for step in range(3):
            model.zero_grad()
            model(x, words if step == 1 else None).square().mean().backward()
            watcher.step()
    activation = watcher.trajectories["layers/table.weight/activation"].sel(group="all").values
    states = torch.tanh(model.read(x)).detach()
    counts = np.sort(torch.bincount(words, minlength=9).double().sqrt().numpy())[::-1][: len(LABELS)]
    assert activation.shape[1] >= 4 + len(counts)
    assert np.isnan(activation[[0, 2], 4:]).all()
    assert error(activation[0, :4], svdvals(states)) < 1e-6
    both = np.sort(np.concatenate([svdvals((states + model.table(words)).detach()), counts]))[::-1]
    assert error(activation[1, : len(both)], both) < 1e-6


class PositionsComputedOn(nn.Module):
    """A table of positions, of which something is computed before it is added to the samples' values."""

    def __init__(self, between):
        super().__init__()
        self.table, self.read, self.between = nn.Embedding(11, 6), nn.Linear(6, 6), between

    def forward(self, x):
        return torch.tanh(self.read(x + self.between(self.table(torch.arange(x.shape[1]).unsqueeze(0)))))


def trained_for_some_steps(between, watched, **options):
    torch.manual_seed(2)
    model, x = PositionsComputedOn(between()), torch.randn(len(LABELS), 11, 6)
    return weights_after_training(model, x, weighted, LABELS if watched else None, steps=4, lr=0.5, **options)


class OwnDropout(nn.Module):
    """Dropout that draws from a generator of its own, after a projection."""

    def __init__(self):
        super().__init__()
        self.inner, self.generator = nn.Linear(6, 6), torch.Generator().manual_seed(3)

    def forward(self, x):
        x = self.inner(x)
        return x * (torch.rand(x.shape, generator=self.generator) < 0.5)


BETWEEN = {
    "nothing": nn.Identity,
    "dropout": lambda: nn.Dropout(0.0),
    "layer norm": lambda: nn.LayerNorm(6),
    "projection": lambda: nn.Linear(6, 6),
    "activation": nn.Tanh,
    "a generator of its own": OwnDropout,
}


@pytest.mark.parametrize("case", BETWEEN)
def test_training_is_unchanged_whatever_is_computed_of_a_shared_table(case):
    """Spread over the samples before a layer, it would be computed once a sample, and summed in another order."""
    plain = trained_for_some_steps(BETWEEN[case], watched=False)
    watched = trained_for_some_steps(BETWEEN[case], watched=True)
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name
