"""Rows are traced to samples, or refused; they are never assumed."""

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import autospec
from autospec.introspection import WatchError
from autospec.introspection.rows.probe import code_words, decode

from .oracle import (
    Problem,
    assert_exact,
    assert_shares,
    error,
    factors,
    members,
    record,
    sample_second,
    shared_by,
    spectrum,
    svdvals,
)

N, T = 9, 5
LABELS = ["a", "b", "b"] * 3


def mean_square(output):
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (weights * (output - 0.3).square()).mean()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000))
def test_code_words_are_distinct_of_equal_weight_and_few(count):
    words = code_words(count)
    assert words.shape[1] == count
    assert len({column.tobytes() for column in words.T}) == count
    assert len(set(words.sum(0))) == 1
    assert len(words) <= math.ceil(math.log2(count)) + 3


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.data())
def test_the_union_of_two_code_words_decodes_as_a_mixture_and_nothing_as_no_sample(count, data):
    words = code_words(count)
    rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
    assert decode(words[:, rows], words).tolist() == rows
    one, other = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
    assert decode((words[:, one] | words[:, other])[:, None], words).tolist() == [-2]
    assert decode(np.zeros((len(words), 1), dtype=bool), words).tolist() == [-1]


class Reshaped(nn.Module):
    """Flattens (sample, time, feature) before the layer, sample by sample or time by time."""

    def __init__(self, time_major):
        super().__init__()
        self.inner, self.head, self.time_major = nn.Linear(6, 4), nn.Linear(4, 3), time_major

    def forward(self, x):
        x = x.transpose(0, 1) if self.time_major else x
        hidden = torch.tanh(self.inner(x.reshape(-1, 6)))
        hidden = hidden.reshape(*x.shape[:2], 4).mean(0 if self.time_major else 1)
        return self.head(hidden)


def flat(time_major):
    def samples(x):
        rows = torch.arange(N)
        return rows.repeat(T) if time_major else rows.repeat_interleave(T)

    return {"inner": samples}


def reshaped(time_major, assumed=None):
    x = torch.randn(N, T, 6)
    assumed = time_major if assumed is None else assumed
    return Problem(Reshaped(time_major), x, mean_square, LABELS, flat(assumed))


@pytest.mark.parametrize("time_major", [False, True])
def test_rows_flattened_before_the_layer_are_given_to_their_samples(time_major):
    problem = reshaped(time_major)
    assert_exact(record(problem), problem, members(LABELS, N))


@pytest.mark.parametrize("time_major", [False, True])
def test_rows_given_to_the_wrong_samples_would_still_sum_to_the_gradient(time_major):
    right, wrong = reshaped(time_major), reshaped(time_major, assumed=not time_major)
    wrong.model, wrong.x = right.model, right.x
    tree = record(right)
    a, d, assumed = factors(wrong)["inner.weight"]
    table = members(LABELS, N)
    shares = {group: d[mask].T @ a[mask] for group in "ab" for mask in [torch.from_numpy(table[group])[assumed]]}
    gradient = right.model.inner.weight.grad.double()
    assert torch.allclose(shares["a"] + shares["b"], gradient, atol=1e-6 * float(gradient.abs().max()))
    for group, share in shares.items():
        assert error(spectrum(tree, "inner.weight", "gradient", group), svdvals(share)) > 1e-2


class Pooled(nn.Module):
    """A layer on every position, then the mean over one dimension, then a layer on every sample."""

    def __init__(self, pooled):
        super().__init__()
        self.inner, self.head, self.pooled = nn.Linear(6, 4), nn.Linear(4, 3), pooled

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)).mean(self.pooled))


@pytest.mark.parametrize("sample_dim", [0, 1])
def test_as_many_times_as_samples_is_resolved_where_a_later_layer_tells(sample_dim):
    samples = {"inner": sample_second} if sample_dim else {}
    problem = Problem(Pooled(1 - sample_dim), torch.randn(N, N, 6), mean_square, LABELS, samples)
    tree = record(problem)
    assert tree.attrs["audit"]["batch_dims"] == [sample_dim]
    assert_exact(tree, problem, members(LABELS, N))


def test_as_many_times_as_samples_is_refused_where_nothing_tells_and_batch_dim_decides():
    x = torch.randn(N, N, 6)
    with pytest.raises(WatchError, match=r"more than one dimension .*\(0,\) or \(1,\).*batch_dim="):
        record(Problem(nn.Linear(6, 4), x, mean_square, LABELS))
    trees = []
    for batch_dim, samples in ((0, {}), (1, sample_second), (-2, sample_second), (-3, {})):
        problem = Problem(nn.Linear(6, 4), x, mean_square, LABELS, samples)
        trees.append(record(problem, batch_dim=batch_dim))
        assert_exact(trees[-1], problem, members(LABELS, N))
    with pytest.raises(WatchError, match=r"no input of the model has a dimension 2 of size 9"):
        record(Problem(nn.Linear(6, 4), x, mean_square, LABELS), batch_dim=2)


class Tokens(nn.Module):
    """Words and their places, which only the decision behind them brings together, or nothing."""

    def __init__(self, attends):
        super().__init__()
        self.words, self.places, self.inner = nn.Embedding(11, 6), nn.Embedding(N + 1, 6), nn.Linear(6, 6)
        self.attends, self.head = attends, nn.Linear(6, 2)

    def forward(self, index):
        states = self.words(index) + self.places(torch.arange(index.shape[1]))
        states = torch.tanh(self.inner(states))
        return self.head(states + states.mean(1, keepdim=True) if self.attends else states)


@pytest.mark.parametrize("attends", [True, False], ids=["attends", "alone"])
def test_as_many_tokens_as_samples_with_a_table_of_places(attends):
    model, generator = Tokens(attends), torch.Generator().manual_seed(0)
    square, wide = (torch.randint(0, 11, (N, tokens), generator=generator) for tokens in (N, N + 1))
    problem = Problem(model, square, mean_square, LABELS, {"places": shared_by(N)})
    # Places are counted, so they are no samples, and what meets them along one dimension has its samples along the other.
    assert_exact(record(problem), problem, members(LABELS, N))
    assert_exact(record(problem, batch_dim=0), problem, members(LABELS, N))
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for index in (wide, square):
            model.zero_grad()
            mean_square(model(index)).backward()
            watcher.step()
    assert_exact(watcher.trajectories.isel(step=slice(1, None)), problem, members(LABELS, N))


def test_a_batch_of_one_sample_decides_nothing_about_later_ones():
    model = nn.Linear(6, 4)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        watcher.set_groups(LABELS[:1])
        mean_square(model(torch.randn(1, 1, 6))).backward()
        watcher.set_groups(LABELS)
        with pytest.raises(WatchError, match="more than one dimension"):
            model(torch.randn(N, N, 6))
        watcher.step()


def test_rows_that_are_given_anew_hold_although_another_layer_is_traced():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(N, 6)
    orders = [np.arange(N), np.roll(np.arange(N), 1)]
    with autospec.watch(model, LABELS, rows={"1.weight": orders[0]}, statistics=["activation"], quiet=True) as watcher:
        for order in orders:
            watcher.set_groups(None, rows={"1.weight": order})
            model.zero_grad()
            mean_square(model(x)).backward()
            watcher.step()
    seen = model[0](x).detach()
    for step, order in enumerate(orders):
        rows = seen[torch.from_numpy(members(LABELS, N)["a"][order])]
        found = spectrum(watcher.trajectories, "1.weight", "activation", "a", step)
        assert error(found, svdvals(rows)[: len(found)]) < 1e-6


def test_series_of_many_lengths_are_each_traced_once(probes):
    model, lengths = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), range(1, 81)
    with autospec.watch(model, LABELS, quiet=True, statistics=["activation"]) as watcher:
        for length in [*lengths, *lengths]:
            model(torch.randn(N, length, 4)).sum().backward()
            watcher.step()
    assert len(probes) == len(lengths)


def test_numbers_of_a_schedule_do_not_have_the_rows_traced_anew(probes):
    class Annealed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x, weight, chosen):
            return self.inner(x * float(weight))[torch.from_numpy(chosen)]

    model, generator = Annealed(), np.random.default_rng(0)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for weight in np.linspace(0.5, 1, 4):
            model.zero_grad()
            mean_square(model(torch.randn(N, 6), weight, generator.permutation(N))).backward()
            watcher.step()
    assert len(probes) == 1


def test_as_many_features_as_samples_is_no_ambiguity():
    problem = Problem(nn.Linear(N, 4), torch.randn(N, N), mean_square, LABELS)
    tree = record(problem)
    assert tree.attrs["audit"]["batch_dims"] == [0]
    assert_exact(tree, problem, members(LABELS, N))


@pytest.mark.parametrize("features", [1, 5])
def test_a_batch_of_one_sample_is_watched(features):
    problem = Problem(nn.Linear(features, 3), torch.randn(1, features), mean_square, ["a"])
    assert_exact(record(problem), problem, members(["a"], 1))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        return self.head(hidden + hidden.mean(0))


class Constant(Mixing):
    def forward(self, x):
        return self.head(torch.ones(len(x), 4)) + self.inner(x).sum()


@pytest.mark.parametrize(
    ("model", "words"),
    [(Mixing, "'head' mix several samples.*batch_dim= or rows="), (Constant, "'head' belong to no sample.*rows=")],
)
def test_a_model_whose_rows_are_not_one_samples_is_refused(model, words):
    with pytest.raises(WatchError, match=words):
        record(Problem(model(), torch.randn(N, 6), mean_square, LABELS))


class Filled(nn.Module):
    """A learned vector stands in for one time of each sample."""

    def __init__(self):
        super().__init__()
        self.inner, self.token = nn.Linear(6, 4), nn.Parameter(torch.randn(6))

    def forward(self, x):
        chosen = torch.eye(*x.shape[:2], dtype=torch.bool).roll(1, 0)
        return self.inner(torch.where(chosen.unsqueeze(-1), self.token, x))


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_rows_that_depend_on_no_sample_go_to_the_sample_of_their_slice(batch_dim):
    problem = Problem(Filled(), torch.randn(N, N, 6), mean_square, LABELS, batch_dim)
    assert_exact(record(problem, batch_dim=batch_dim), problem, members(LABELS, N))


def test_rows_can_be_given_where_they_cannot_be_traced():
    problem = Problem(Mixing(), torch.randn(N, 6), mean_square, LABELS)
    tree = record(problem, rows={"head.weight": np.arange(N)})
    assert_exact(tree, problem, members(LABELS, N))


def test_given_rows_replace_what_the_probe_would_find():
    order = torch.randperm(N)
    problem = Problem(nn.Linear(6, 4), torch.randn(N, 6), mean_square, LABELS, lambda x: order)
    assert_exact(record(problem, rows={"weight": order}), problem, members(LABELS, N))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"weight": np.arange(N - 1)}, "received 9 rows, but 8 are known"),
        ({"weight": np.arange(N) + 1}, "names a sample that the batch does not have"),
        ({"heavy": np.arange(N)}, "'heavy', which is not a watched parameter"),
    ],
)
def test_wrong_rows_are_refused(rows, words):
    with pytest.raises(WatchError, match=words):
        record(Problem(nn.Linear(6, 4), torch.randn(N, 6), mean_square, LABELS), rows=rows)


class Functional(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.first, self.second, self.use = nn.Linear(6, 6), nn.Linear(6, 6), use

    def forward(self, x):
        return self.use(torch.tanh(self.second(torch.tanh(self.first(x)))), self.first.weight)


FUNCTIONAL_USES = {
    "distances": (torch.cdist, r"uses 'first\.weight' in cdist\(\), where it cannot be watched"),
    "its columns by an index": (lambda x, w: x @ w[:, x.argmax(1)], r"uses 'first\.weight' in __getitem__\(\)"),
    "beside data": (lambda x, w: torch.cat([x, w])[:N], r"uses 'first\.weight' in cat\(\)"),
    "a product times a number": (lambda x, w: torch.addmm(x, x, w, alpha=2), r"uses 'first\.weight' in addmm\(\)"),
    "of the batch": (lambda x, w: x @ (w * x.mean(0)), r"input of 'first' mix several samples"),
}


@pytest.mark.parametrize("use", FUNCTIONAL_USES)
def test_a_weight_used_outside_its_layer_is_refused_by_name(use):
    used, said = FUNCTIONAL_USES[use]
    model = Functional(used)
    with pytest.raises(WatchError, match=said):
        record(Problem(model, torch.randn(N, 6), mean_square, LABELS))
    tree = record(Problem(model, torch.randn(N, 6), mean_square, LABELS), layers=["second.*"])
    assert list(tree["layers"].children) == ["second.weight"]


def test_a_weight_used_nowhere_but_outside_its_layer_is_refused_by_name():
    model, x = Mixing(), torch.randn(N, 6)
    with autospec.watch(model):
        model(x)
        with pytest.raises(WatchError, match=r"gradient reached 'inner\.weight' that did not come through its layer"):
            (x @ model.inner.weight.T).sum().backward()


@pytest.mark.parametrize("detached", [lambda w: w.detach(), lambda w: w.data, lambda w: (3 * w.T).detach()])
def test_a_use_without_a_gradient_is_no_functional_use(detached):
    problem = Problem(Functional(lambda x, w: x @ detached(w)), torch.randn(N, 6), mean_square, LABELS)
    tree = record(problem)
    assert tree.attrs["audit"]["outside"] == {}
    assert_exact(tree, problem, members(LABELS, N))


def test_a_use_while_gradients_are_off_is_no_functional_use():
    def without(x, w):
        with torch.no_grad():
            moved = x @ (2 * w).T
        return x + moved

    problem = Problem(Functional(without), torch.randn(N, 6), mean_square, LABELS)
    tree = record(problem)
    assert tree.attrs["audit"]["outside"] == {}
    assert_exact(tree, problem, members(LABELS, N))


def test_all_weights_used_outside_their_layers_are_named_with_a_way_out_that_works():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.third(torch.tanh(torch.cdist(torch.cat([x, self.first.weight])[:N], self.second.weight)))

    problem = Problem(Both(), torch.randn(N, 6), mean_square, LABELS)
    with pytest.raises(WatchError) as refusal:
        record(problem)
    assert "'first.weight' in cat(), and 'second.weight' in cdist()" in str(refusal.value)
    (left_out,) = re.findall(r"layers=(\[.*\])", str(refusal.value))
    assert left_out == "['!first.weight', '!second.weight']"
    tree = record(problem, layers=["!first.weight", "!second.weight"])
    assert list(tree["layers"].children) == ["third.weight"]


def test_without_groups_a_use_that_cannot_be_watched_is_refused_by_name():
    problem = Problem(Functional(torch.cdist), torch.randn(N, 6), mean_square, None)
    with pytest.raises(WatchError, match=r"'first\.weight' in cdist\(\).*layers=\['!first\.weight'\]"):
        record(problem)


def test_a_number_that_is_made_of_a_weight_is_one_that_all_samples_meet():
    model, x = Functional(lambda x, w: x + 0.01 * w.square().sum()), torch.randn(N, 6)
    tree = record(Problem(model, x, mean_square, LABELS))
    assert tree.attrs["audit"]["outside"] == {}
    weights = torch.linspace(0.5, 1.5, N * 6, dtype=torch.float64).reshape(N, 6)
    for group, member in members(LABELS, N).items():
        twin = copy.deepcopy(model).double()
        losses = (weights * (twin(x.double()) - 0.3).square())[torch.from_numpy(member)].sum() / (N * 6)
        (share,) = torch.autograd.grad(losses, twin.first.weight)
        assert error(spectrum(tree, "first.weight", "gradient", group), svdvals(share)) < 1e-6


class Encoded(nn.Module):
    """A second input that is not one of the samples', but has a dimension of their number."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x, positions):
        return self.inner(x + positions)


def test_an_input_that_has_as_many_rows_as_there_are_samples_by_chance_does_not_decide():
    model, x, positions = Encoded(), torch.randn(N, N, 6), torch.randn(N, 6)
    with autospec.watch(model, LABELS), pytest.raises(WatchError, match="more than one dimension"):
        model(x, positions)
    for batch_dim, chosen in ((0, lambda t, rows: t[rows]), (1, lambda t, rows: t[:, rows])):
        with autospec.watch(model, LABELS, batch_dim=batch_dim) as watcher:
            mean_square(model(x, positions)).backward()
            watcher.step()
        rows = chosen(x + positions, members(LABELS, N)["a"]).reshape(-1, 6)
        assert error(spectrum(watcher.trajectories, "inner.weight", "activation", "a"), svdvals(rows)[:4]) < 1e-6


class Shuffled(nn.Module):
    """Does something to its batch in training mode."""

    def __init__(self, does):
        super().__init__()
        self.inner, self.head, self.does = nn.Linear(6, 4), nn.Linear(4, 3), does

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        return self.head(self.does(hidden) if self.training else hidden)


def mixed_up(x):
    return 0.7 * x + 0.3 * x[torch.randperm(len(x))]


@pytest.mark.parametrize("samples", [4, 40])
@pytest.mark.parametrize("does", [lambda x: x[torch.randperm(len(x))], lambda x: x.roll(1, 0), mixed_up])
def test_a_model_that_shuffles_or_mixes_its_batch_in_training_alone_is_refused(does, samples):
    labels = ["a", "b"] * (samples // 2)
    problem = Problem(Shuffled(does), torch.randn(samples, 6), mean_square, labels)
    with pytest.raises(WatchError, match="In training mode rows of the input of 'head' depend on other samples"):
        record(problem)
    assert np.isfinite(spectrum(record(problem, layers=["inner*"]), "inner.weight", "gradient", "a")).all()
    problem.model.eval()
    assert_exact(record(problem), problem, members(labels, samples))


def other_order_at_each_position(x):
    order = torch.stack([torch.randperm(len(x)) for _ in range(x.shape[1])], 1)
    return torch.gather(x, 0, order.unsqueeze(2).expand_as(x))


def turned_around(x):
    """Rows by position instead of by sample, for the layer alone that comes next."""
    return x.transpose(0, 1).reshape(x.shape)


@pytest.mark.parametrize("positions", [2, 4, 6, 15])
@pytest.mark.parametrize("does", [other_order_at_each_position, turned_around])
def test_a_model_that_moves_tokens_to_many_samples_in_training_alone_is_refused(does, positions):
    for seed in range(5):
        torch.manual_seed(seed)
        problem = Problem(Shuffled(does), torch.randn(12, positions, 6), mean_square, ["a", "b"] * 6)
        with pytest.raises(WatchError, match="In training mode rows of the input of 'head' depend on other samples"):
            record(problem)


def normalised_then_masked(x):
    return torch.where(torch.rand(*x.shape[:-1], 1) < 0.3, 0.0, normalised(x))


def normalised_by_site(x):
    return torch.cat([normalised(part) for part in x.split(4)])


def normalised_then_dropped(x):
    """As stochastic depth drops all of some samples."""
    return torch.where(torch.rand(len(x), *[1] * (x.ndim - 1)) < 0.3, 0.0, normalised(x))


@pytest.mark.parametrize("shape", [(12, 7, 6), (16, 3, 6), (8, 6), (16, 6)])
@pytest.mark.parametrize("does", [normalised_then_masked, normalised_by_site, normalised_then_dropped])
def test_statistics_that_do_not_reach_all_rows_are_no_mixing_in_training(does, shape):
    for seed in range(10):
        torch.manual_seed(seed)
        tree = record(Problem(Shuffled(does), torch.randn(*shape), mean_square, ["a", "b"] * (shape[0] // 2)))
        assert np.isfinite(spectrum(tree, "head.weight", "gradient", "a")).all()


def normalised(x):
    return (x - x.mean(0)) / x.std(0)


def dropped(x):
    return torch.where(torch.rand(len(x), 1) < 0.5, 0.0, x)


def filled(x):
    return torch.where(torch.rand(len(x), 1) < 0.5, x.mean(), x)


@pytest.mark.parametrize("does", [normalised, dropped, filled, nn.BatchNorm1d(4), nn.Dropout(0.5)])
def test_statistics_of_the_batch_and_dropout_are_no_mixing_in_training(does):
    labels = ["a", "b"] * 20
    tree = record(Problem(Shuffled(does), torch.randn(40, 6), mean_square, labels))
    assert np.isfinite(spectrum(tree, "head.weight", "gradient", "a")).all()


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("affine", [True, False])
def test_rows_are_followed_through_normalisation_that_keeps_no_running_statistics(affine, mode):
    norm = nn.BatchNorm1d(4, affine=affine, track_running_stats=False)
    model = nn.Sequential(nn.Linear(6, 4), norm, nn.Tanh(), nn.Linear(4, 3)).train(mode == "training")
    problem = Problem(model, torch.randn(N, 6), mean_square, LABELS)
    assert_shares({2e-5: record(problem)}, problem, members(LABELS, N))
    assert norm.running_mean is None


class Masked(nn.Module):
    """Puts a learned token in place of some of each sample's, drawn anew every time."""

    def __init__(self):
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.randn(6)), nn.Linear(6, 4)

    def forward(self, x):
        return self.inner(torch.where(torch.rand(*x.shape[:2], 1) < 0.6, self.token, x))


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_tokens_that_are_masked_at_random_go_to_the_sample_of_their_slice(batch_dim):
    x = torch.randn(N, T + 3, 6) if batch_dim == 0 else torch.randn(T + 3, N, 6)
    model, where = Masked(), members(LABELS, N)
    seen = []
    model.inner.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        mean_square(model(x)).backward()
        watcher.step()
    for group in "ab":
        rows = seen[-1].movedim(batch_dim, 0)[torch.from_numpy(where[group])].reshape(-1, 6)
        found = spectrum(watcher.trajectories, "inner.weight", "activation", group)
        assert error(found, svdvals(rows)[: len(found)]) < 1e-6


def test_one_number_that_rows_go_by_does_not_let_the_others_count(probes):
    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.heads = nn.Embedding(30, 6), nn.ModuleList([nn.Linear(6, 3) for _ in range(2)])

        def forward(self, tokens, task):
            return self.heads[int(task)](self.table(tokens).sum(1))

    model = Tasks()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for task in (1, 1, 1, 0, 0, 1):
            model.zero_grad()
            mean_square(model(torch.randint(30, (N, T)), torch.tensor(task))).backward()
            watcher.step()
    assert len(probes) == 2


def test_a_model_that_cannot_be_trained_on_nan_is_traced_in_evaluation_mode_alone():
    def refuses(x):
        if x.isnan().any():
            raise ValueError("not a number")
        return x

    problem = Problem(Shuffled(refuses), torch.randn(N, 6), mean_square, LABELS)
    assert_exact(record(problem), problem, members(LABELS, N))


class Experts(nn.Module):
    """Sends each sample to one of some layers, by what it contains."""

    def __init__(self, layers):
        super().__init__()
        self.experts = nn.ModuleList(layers)

    def chosen(self, x):
        return (x.flatten(1).sum(1) > 0).long() if len(x) % 2 else torch.ones(len(x), dtype=torch.int64)

    def forward(self, x):
        where = self.chosen(x)
        return sum(layer(x[where == i]).square().sum() for i, layer in enumerate(self.experts))


EXPERTS = {"linear": (nn.Linear, (6,)), "convolution": (nn.Conv1d, (6, 8))}


def experts(kind):
    layer, shape = EXPERTS[kind]
    options = (6, 4) if layer is nn.Linear else (6, 4, 3)
    return Experts([layer(*options) for _ in range(2)]), shape


@pytest.mark.parametrize("statistics", [["gradient"], ["gradient", "activation", "adjoint"]])
@pytest.mark.parametrize("kind", EXPERTS)
def test_an_expert_to_which_no_sample_is_sent_records_nothing(kind, statistics):
    model, shape = experts(kind)
    gradients = []
    with autospec.watch(model, statistics=statistics, quiet=True) as watcher:
        for samples in (8, 9, 8):  # an even number goes to the last
            model.zero_grad()
            model(torch.randn(samples, *shape)).backward()
            gradients.append([layer.weight.grad.flatten(1).clone() for layer in model.experts])
            watcher.step()
    for i in range(2):
        for statistic in statistics:
            found = watcher.trajectories[f"layers/experts.{i}.weight/{statistic}"].sel(group="all").values
            assert np.isnan(found[[0, 2]]).all() == (i == 0)
            assert np.isfinite(found[1]).any()
        found = watcher.trajectories[f"layers/experts.{i}.weight/gradient"].sel(group="all").values
        assert error(found[1], svdvals(gradients[1][i])) < 1e-6


@pytest.mark.parametrize("kind", EXPERTS)
def test_rows_that_are_sent_by_what_they_contain_are_refused(kind):
    model, shape = experts(kind)
    with (
        pytest.raises(WatchError, match=r"How many rows 'experts\.0' receives depends on the numbers in the batch"),
        autospec.watch(model, LABELS),
    ):
        model(torch.randn(N, *shape))


def test_a_batch_without_samples_gives_nothing_to_record():
    model = nn.Linear(6, 4)
    with autospec.watch(model, quiet=True) as watcher:
        model(torch.randn(0, 6)).sum().backward()
        with pytest.raises(WatchError, match="not for a batch without samples"):
            watcher.step()
        model(torch.randn(3, 6)).sum().backward()
        watcher.step()
    assert watcher.trajectories.sizes["step"] == 1


class Graphs(nn.Module):
    """A layer on every node, one on the mean over its neighbours, one on the mean over each graph."""

    def __init__(self):
        super().__init__()
        self.node, self.neighbours, self.head = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x, edges, graph):
        hidden = torch.tanh(self.node(x))
        hidden = torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
        hidden = torch.tanh(self.neighbours(hidden))
        return self.head(hidden.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, hidden))


def test_rows_may_change_from_batch_to_batch_as_the_nodes_of_graphs_do():
    model = Graphs()
    shares = []
    with autospec.watch(model, LABELS, rows={"head.weight": np.arange(N)}, quiet=True) as watcher:
        for _ in range(3):
            graph = torch.arange(N).repeat_interleave(torch.randint(3, 8, (N,)))
            x, edges = torch.randn(len(graph), 6), torch.randint(len(graph), (2, 300))
            edges = edges[:, graph[edges[0]] == graph[edges[1]]]
            watcher.set_groups(LABELS, rows={"node.weight": graph, "neighbours.weight": graph})
            # Nothing connects graphs, so a group's share is the gradient of its part of the loss.
            output = model(x, edges, graph).square().sum(1)
            parts = {group: output[mask].sum() for group, mask in members(LABELS, N).items()}
            shares.append(
                {g: torch.autograd.grad(p, list(model.parameters()), retain_graph=True) for g, p in parts.items()}
            )
            model.zero_grad()
            output.sum().backward()
            watcher.step()
    names = [name for name, _ in model.named_parameters()]
    for step, of_groups in enumerate(shares):
        for group, share in of_groups.items():
            for name, matrix in zip(names, share, strict=True):
                if matrix.ndim == 2:
                    found = spectrum(watcher.trajectories, name, "gradient", group, step)
                    assert error(found, svdvals(matrix)) < 1e-6, (step, group, name)


class Switch(nn.Module):
    """An option of the forward pass decides the order of the rows, for the same shape of input."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x, time_major=False):
        return self.inner((x.transpose(0, 1) if time_major else x).reshape(-1, 6))


def test_an_option_that_changes_the_order_of_the_rows_is_probed_anew():
    model, x = Switch(), torch.randn(N, T, 6)
    with autospec.watch(model, LABELS) as watcher:
        for time_major in (False, True):
            model.zero_grad()
            output = model(x, time_major=time_major)
            output = output.reshape(T, N, 4).transpose(0, 1) if time_major else output.reshape(N, T, 4)
            mean_square(output).backward()
            watcher.step()
    gradient = watcher.trajectories["layers/inner.weight/gradient"].sel(group="a").values
    np.testing.assert_allclose(gradient[0], gradient[1], rtol=1e-5)


class SortedByLength(nn.Module):
    """Puts the samples in the order of their lengths, and back."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x, lengths):
        order = lengths.argsort(stable=True)
        return self.inner(x[order])[order.argsort()]


class Scanners(nn.Module):
    """A layer for each scanner, then one for all."""

    def __init__(self):
        super().__init__()
        self.inner, self.others, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x, scanner):
        hidden = x.new_zeros(len(x), 4)
        for number, layer in enumerate((self.inner, self.others)):
            chosen = scanner == number
            if chosen.any():
                hidden[chosen] = layer(x[chosen])
        return self.head(torch.tanh(hidden))


EQUAL = [0] * N
MIXED = [0, 1, 1, 0, 1, 0, 0, 0, 1]
OTHER = [1, 0, 1, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("numbers", [[MIXED, OTHER, MIXED], [EQUAL, MIXED, OTHER]], ids=["mixed", "equal at first"])
@pytest.mark.parametrize("family", [SortedByLength, Scanners])
def test_rows_that_go_by_the_numbers_of_each_batch_are_traced_in_each(family, numbers):
    model, x, where = family(), torch.randn(N, 6), members(LABELS, N)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for given in numbers:
            model.zero_grad()
            mean_square(model(x, torch.tensor(given))).backward()
            watcher.step()
    tree = watcher.trajectories
    for step, given in enumerate(numbers):
        reached = np.ones(N, bool) if family is SortedByLength else np.array(given) == 0
        for group in "ab":
            found = tree["layers/inner.weight/activation"].sel(group=group, step=step).values
            expected = svdvals(x[where[group] & reached])
            assert error(found[: len(expected)], expected) < 1e-6, (step, group)


def test_numbers_that_leave_the_rows_where_they_are_are_not_traced_again(probes):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(30, 6), nn.Linear(6, 3)

        def forward(self, tokens, padding):
            return self.head((self.table(tokens) * ~padding.unsqueeze(-1)).sum(1))

    model = Tokens()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for _ in range(5):
            model.zero_grad()
            padding = torch.arange(T) > torch.randperm(N)[:, None] % T
            mean_square(model(torch.randint(30, (N, T)), padding)).backward()
            watcher.step()
    assert len(probes) == 1


ADJACENCY = torch.eye(N) + torch.eye(N).roll(1, 0)


def compressed(matrix):
    with warnings.catch_warnings(action="ignore"):  # torch says that this layout is new
        return matrix.to_sparse_csr()


@pytest.mark.parametrize("form", [torch.Tensor.to_sparse, compressed])
def test_a_sparse_tensor_among_the_arguments_is_not_traced(form):
    class OverAGraph(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x, adjacency=ADJACENCY):
            return self.head(adjacency.to(x.dtype) @ torch.tanh(self.inner(x)))

    x, network = torch.randn(N, 6), OverAGraph()
    with autospec.watch(network, LABELS, rows={"head.weight": range(N)}, quiet=True) as watcher:
        mean_square(network(x, form(ADJACENCY))).backward()
        watcher.step()
    problem = Problem(network, x, mean_square, LABELS)  # of the dense matrix
    assert_shares({2e-5: watcher.trajectories}, problem, members(LABELS, N))


def test_a_sparse_input_is_refused_in_words_that_say_so():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x):
            return self.inner(x.to_dense())

    problem = Problem(Dense(), torch.randn(N, 6).to_sparse(), mean_square, LABELS)
    with pytest.raises(WatchError, match=r"inputs: \(9, 6\), not dense.*nothing in sparse tensors.*dense .* or rows="):
        record(problem)
    assert np.isfinite(
        spectrum(record(problem, rows={"inner.weight": range(N)}), "inner.weight", "gradient", "a")
    ).all()


@pytest.mark.parametrize("part", [torch.view_as_real, lambda z: z.imag, lambda z: torch.fft.ifft(z, dim=-1).abs()])
def test_complex_input_that_the_model_makes_real_is_marked_too(part):
    class FromKSpace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.LazyLinear(4), nn.Linear(4, 2)

        def forward(self, z):
            return self.head(torch.tanh(self.inner(part(z).flatten(2)).mean(0)))

    k_space = torch.randn(T, N, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    model = FromKSpace()
    model(k_space)
    problem = Problem(model.double(), k_space.to(torch.complex128), mean_square, LABELS, {"inner": 1})
    assert_shares({1e-7: record(problem)}, problem, members(LABELS, N))


def test_two_inputs_and_inputs_in_containers_are_marked_together():
    class Paired(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, batch, scale):
            return self.left(batch["x"]) * scale + self.right(batch["parts"][0])

    batch = {"x": torch.randn(N, 6), "parts": (torch.randn(N, 3), "name"), "number": torch.arange(N)}
    model = Paired()
    with autospec.watch(model, LABELS) as watcher:
        mean_square(model(batch, torch.rand(1))).backward()
        watcher.step()
    chosen = np.array(LABELS) == "b"
    for layer, data in (("left", batch["x"]), ("right", batch["parts"][0])):
        recorded = spectrum(watcher.trajectories, f"{layer}.weight", "activation", "b")
        assert error(recorded, svdvals(data[chosen])) < 1e-6
    assert watcher.trajectories.attrs["audit"]["batch_dims"] == [0, 0]


RECURRENT = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}


class Sequences(nn.Module):
    """A recurrent layer, then a Linear layer on every step."""

    def __init__(self, family, batch_first, layout="whole"):
        super().__init__()
        self.layer, self.head = family(6, 5, batch_first=batch_first), nn.Linear(5, 3)
        self.layout = layout

    def forward(self, x):
        hidden = self.layer(x)[0]
        if self.layout == "flattened":
            return torch.tanh(self.head(hidden.reshape(-1, 5)))
        if self.layout == "turned":
            return torch.tanh(self.head(hidden.transpose(0, 1).reshape(-1, 5)))
        return torch.tanh(self.head(hidden))


@pytest.mark.parametrize("layout", ["whole", "flattened", "turned"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["sample first", "time first"])
@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("steps", [T, N], ids=["T", "T == N"])
def test_a_recurrent_layer_tells_times_from_samples(family, batch_first, layout, steps):
    x = torch.randn(N, steps, 6) if batch_first else torch.randn(steps, N, 6)
    samples = torch.arange(N).unsqueeze(1).expand(N, steps)
    samples = samples if batch_first else samples.T
    of_head = {"whole": samples, "flattened": samples.flatten(), "turned": samples.T.flatten()}[layout]
    axis = 0 if batch_first else 1
    of_layer = (axis, (1, 1) if family == "LSTM" else 1)
    model = Sequences(RECURRENT[family], batch_first, layout)
    problem = Problem(model, x, mean_square, LABELS, {"layer": of_layer, "head": lambda _: of_head})
    tree = record(problem)
    assert tree.attrs["audit"]["batch_dims"] == [axis]
    assert_shares({2e-5: tree}, problem, members(LABELS, N))
    assert_exact(tree, problem, members(LABELS, N))


class Sliced(nn.Module):
    """Rows of a convolution are windows of a sample, of which it has as many as there are samples."""

    def __init__(self, time_major):
        super().__init__()
        self.conv, self.head, self.time_major = nn.Conv1d(2, 3, 3), nn.Linear(3, 2), time_major

    def forward(self, x):
        x = x.transpose(0, 1) if self.time_major else x
        hidden = torch.tanh(self.conv(x.reshape(-1, *x.shape[2:]))).mean(2).unflatten(0, x.shape[:2])
        return self.head(hidden.mean(0 if self.time_major else 1))


@pytest.mark.parametrize("time_major", [False, True], ids=["sample by sample", "time by time"])
def test_windows_of_as_many_times_as_samples_are_given_to_their_samples(time_major):
    rows = torch.arange(N).repeat(N) if time_major else torch.arange(N).repeat_interleave(N)
    problem = Problem(Sliced(time_major), torch.randn(N, N, 2, 5), mean_square, LABELS, {"conv": lambda _: rows})
    tree = record(problem)
    assert tree.attrs["audit"]["batch_dims"] == [0]
    assert_exact(tree, problem, members(LABELS, N))


class Between(nn.Module):
    """A layer that mixes samples, by name, before one that is watched."""

    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


MIXING = {
    "attention between samples": lambda: Between(nn.MultiheadAttention(6, 2), lambda m, x: m(x, x, x)[0]),
    "recurrence over samples": lambda: Between(nn.LSTM(6, 4), lambda m, x: m(x)[0]),
    "convolution over samples": lambda: Between(nn.Conv1d(6, 4, 3), lambda m, x: m(x.permute(1, 2, 0))),
    "samples side by side": lambda: Between(nn.Linear(6 * N, 4), lambda m, x: m(x.transpose(0, 1).flatten(1))),
}


@pytest.mark.parametrize("case", MIXING)
def test_layers_whose_rows_mix_samples_are_refused_by_name(case):
    with pytest.raises(WatchError, match=r"'layer' mix several samples.*batch_dim= or rows="):
        record(Problem(MIXING[case](), torch.randn(N, T, 6), mean_square, LABELS))


class SecondHead(nn.Module):
    """A head for the samples of one class alone."""

    def __init__(self):
        super().__init__()
        self.read, self.every, self.rare = nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x, classes):
        states = torch.tanh(self.read(x))
        chosen = (classes == 2).nonzero()[:, 0]
        out = self.every(states)
        return out.index_add(0, chosen, self.rare(states[chosen])) if len(chosen) else out


def test_what_one_batch_does_not_show_is_not_forgotten():
    model, x = SecondHead(), torch.randn(N, 6)
    batches = [torch.tensor(classes) for classes in ([0, 1, 2] * 3, [0, 1, 1] * 3, [2, 1, 0] * 3)]
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for classes in batches:
            model.zero_grad()
            mean_square(model(x, classes)).backward()
            watcher.step()
    exact, x = copy.deepcopy(model).double(), x.double()
    for group, member in members(LABELS, N).items():
        inside = torch.from_numpy(member).unsqueeze(1)
        for step, classes in enumerate(batches):
            exact.zero_grad()
            made = exact(x, classes)
            mean_square(torch.where(inside, made, made.detach())).backward()
            for name in ("read.weight", "every.weight", "rare.weight"):
                gradient = exact.get_parameter(name).grad
                found = spectrum(watcher.trajectories, name, "gradient", group, step)
                if gradient is None:
                    assert np.isnan(found).all()
                elif gradient.any():
                    assert error(found, svdvals(gradient)) < 1e-6


class Counting(nn.Module):
    """Takes a number: of the step, or of how often a layer is called, or of how far the samples are moved."""

    def __init__(self, use):
        super().__init__()
        self.read, self.use = nn.Linear(6, 6), use

    def forward(self, x, number):
        moved = number if self.use == "moves" or (self.use == "moves late" and number > 6) else 0
        states = torch.tanh(self.read(x.roll(moved, 0))) * (1 + 0.1 * number)
        for _ in range(number if self.use == "unrolls" else 0):
            states = torch.tanh(self.read(states))
        return states.roll(-moved, 0)


def counted_to(model, x, numbers):
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for number in numbers:
            model.zero_grad()
            mean_square(model(x, number)).backward()
            watcher.step()
    return watcher.trajectories


@pytest.mark.parametrize("use", ["unrolls", "moves", "moves late"])
def test_a_number_among_the_arguments_may_decide_where_rows_lie(use):
    """Whatever the numbers before it did; that each new one has rows traced is said once."""
    model, x = Counting(use), torch.randn(N, 6)
    with pytest.warns(UserWarning, match="number of a step") as said:
        tree = counted_to(model, x, range(12))
    assert len([each for each in said if "number of a step" in str(each.message)]) == 1
    exact, x = copy.deepcopy(model).double(), x.double()
    for group, member in members(LABELS, N).items():
        inside = torch.from_numpy(member).unsqueeze(1)
        for number in range(12):
            exact.zero_grad()
            made = exact(x, number)
            mean_square(torch.where(inside, made, made.detach())).backward()
            found = spectrum(tree, "read.weight", "gradient", group, number)
            assert error(found, svdvals(exact.read.weight.grad)) < 1e-6


def test_a_number_that_counts_steps_as_a_float_costs_nothing(probes):
    counted_to(Counting("counts"), torch.randn(N, 6), map(float, range(12)))
    assert len(probes) == 1


def test_a_layer_that_training_alone_calls_is_traced_for_once_more(probes):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.aside = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x):
            states = self.read(x)
            if self.training:
                self.seen = self.aside(states.detach()).detach()
            return states

    model, x = Auxiliary(), torch.randn(N, 6)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for _ in range(6):
            model.zero_grad()
            mean_square(model(x)).backward()
            watcher.step()
    assert len(probes) == 2


def test_a_model_that_grows_by_an_attribute_is_traced_again():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.more, self.last, self.depth = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), 0

        def forward(self, x):
            states = torch.tanh(self.first(x))
            for _ in range(self.depth):
                states = torch.tanh(self.more(states))
            return self.last(states)

    model, x = Growing(), torch.randn(N, 6)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for model.depth in (0, 1, 3, 2):
            model.zero_grad()
            mean_square(model(x)).backward()
            watcher.step()
    exact = copy.deepcopy(model).double()
    inside = torch.from_numpy(members(LABELS, N)["a"]).unsqueeze(1)
    for step, exact.depth in enumerate((0, 1, 3, 2)):
        exact.zero_grad()
        made = exact(x.double())
        mean_square(torch.where(inside, made, made.detach())).backward()
        for name in ("first.weight", "more.weight", "last.weight"):
            gradient = exact.get_parameter(name).grad
            found = spectrum(watcher.trajectories, name, "gradient", "a", step)
            assert np.isnan(found).all() if gradient is None else error(found, svdvals(gradient)) < 1e-6


def valid_positions():
    valid = torch.arange(T) < torch.tensor([5, 3, 1, 4, 2, 5, 2, 1, 3]).unsqueeze(1)
    return valid, {group: torch.from_numpy(member).unsqueeze(1) & valid for group, member in members(LABELS, N).items()}


@pytest.mark.parametrize("form", ["tensor", "array", "list", "numbers"])
def test_positions_that_are_not_valid_are_left_out_of_every_spectrum(form):
    valid, kept = valid_positions()
    given = {"tensor": valid, "array": valid.numpy(), "list": valid.tolist(), "numbers": valid.float()}[form]
    problem = Problem(nn.Linear(6, 4), torch.randn(N, T, 6), mean_square, LABELS)
    tree = record(problem, valid=given)
    a, d, _ = factors(problem)["weight"]
    a, d = a.unflatten(0, (N, T)), d.unflatten(0, (N, T))
    for group, rows in kept.items():
        for statistic, matrix in (("gradient", d[rows].T @ a[rows]), ("activation", a[rows]), ("adjoint", d[rows])):
            assert error(spectrum(tree, "weight", statistic, group), svdvals(matrix)) < 1e-6
        assert int(tree["layers/weight"].rank_limit.sel(group=group)) == min(4, int(rows.sum()))


@pytest.mark.parametrize("time_first", [False, True])
def test_positions_are_those_of_the_sample_wherever_the_rows_lie(time_first):
    valid, kept = valid_positions()
    x = torch.randn(T, N, 6) if time_first else torch.randn(N, T, 6)
    problem = Problem(nn.Linear(6, 4), x, mean_square, LABELS, 1 if time_first else 0)
    tree = record(problem, valid=valid)
    rows = kept["b"].T if time_first else kept["b"]
    assert error(spectrum(tree, "weight", "activation", "b"), svdvals(x[rows])) < 1e-6


def test_layers_after_the_mean_over_time_are_untouched_by_valid():
    valid, _ = valid_positions()
    problem = Problem(Pooled(1), torch.randn(N, T, 6), mean_square, LABELS)
    plain, tree = record(problem), record(problem, valid=valid)
    path = "layers/head.weight/gradient"
    assert np.array_equal(tree[path], plain[path])
    assert not np.allclose(tree["layers/inner.weight/gradient"], plain["layers/inner.weight/gradient"], rtol=1e-2)


def test_valid_may_come_with_the_labels_of_each_batch():
    valid, kept = valid_positions()
    model, x = nn.Linear(6, 4), torch.randn(N, T, 6)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for given in (valid, None):
            watcher.set_groups(LABELS, valid=given)
            model.zero_grad()
            mean_square(model(x)).backward()
            watcher.step()
    tree = watcher.trajectories
    assert error(spectrum(tree, "weight", "activation", "a", step=0), svdvals(x[kept["a"]])) < 1e-6
    whole = x[torch.from_numpy(members(LABELS, N)["a"])].flatten(0, 1)
    assert error(spectrum(tree, "weight", "activation", "a", step=1), svdvals(whole)) < 1e-6


@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels again", "the same labels"])
def test_a_new_mask_holds_for_data_that_stay_the_same(labels):
    model, x = nn.Linear(6, 4), torch.randn(N, T, 6)
    masks = [
        valid_positions(),
        (lambda valid: (valid, {"a": valid & torch.from_numpy(members(LABELS, N)["a"])[:, None]}))(
            torch.ones(N, T, dtype=torch.bool).tril()
        ),
    ]
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for valid, _ in masks:
            watcher.set_groups(labels, valid=valid)
            model.zero_grad()
            mean_square(model(x)).backward()
            watcher.step()
    for step, (_, kept) in enumerate(masks):
        found = spectrum(watcher.trajectories, "weight", "activation", "a", step)
        assert error(found, svdvals(x[kept["a"]])) < 1e-6


def test_rows_left_out_by_valid_are_no_penalty():
    valid, _ = valid_positions()
    problem = Problem(nn.Linear(6, 4), torch.randn(N, T, 6), mean_square, LABELS)
    with pytest.warns(
        UserWarning, match=r"rows that valid= leaves out hold [\d.]+ % of the gradient of 'weight'"
    ) as said:
        tree = record(problem, valid=valid)
    assert len(said) == 1
    assert tree.attrs["audit"]["outside"] == {}
    a, d, _ = factors(problem)["weight"]
    share = d[~valid.flatten()].T @ a[~valid.flatten()]
    fraction = float(torch.linalg.matrix_norm(share) / torch.linalg.matrix_norm(d.T @ a))
    assert tree.attrs["audit"]["left_out"] == {"weight": pytest.approx(fraction, rel=1e-4)}


class Padded(nn.Module):
    """A mean over the positions that count, with padding in the place of the others, and a layer that sees these alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 5, padding_idx=0)
        self.every, self.valid_alone, self.decide = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, tokens, valid):
        states = torch.tanh(self.every(self.table(tokens)))
        picked = torch.tanh(self.valid_alone(states[valid]))
        filled = states.new_zeros(*tokens.shape, 4).masked_scatter(valid.unsqueeze(-1), picked)
        return self.decide(filled.sum(1) / valid.sum(1, keepdim=True))


LENGTHS = torch.tensor([5, 3, 1, 4, 2, 5, 2, 1, 3]).unsqueeze(1)
MASKS = {
    "to the right": lambda lengths: torch.arange(T) < lengths,
    "to the left": lambda lengths: torch.arange(T) >= T - lengths,
    "in between": lambda lengths: (torch.arange(T) * 3 + lengths) % T < lengths,
    "as many of each": lambda lengths: (torch.arange(T) + lengths) % T < 2,
}


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("where", MASKS)
def test_rows_that_were_picked_by_the_model_are_not_masked_again(where, by_position):
    valid = MASKS[where](LENGTHS)
    tokens = torch.randint(1, 20, (N, T)) * valid
    model = Padded()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with autospec.watch(model, LABELS, valid=valid, per_position=by_position, quiet=True) as watcher:
            mean_square(model(tokens, valid)).backward()
            watcher.step()
    tree, exact, rows = watcher.trajectories, copy.deepcopy(model).double(), []
    exact.valid_alone.register_forward_hook(lambda _, args, output: rows.append((args[0], output)))
    whole = mean_square(exact(tokens, valid))
    activation, output = rows[0]
    adjoint, activation = torch.autograd.grad(whole, output)[0], activation.detach()
    sample, position = valid.nonzero(as_tuple=True)
    for group, member in members(LABELS, N).items():
        inside = torch.from_numpy(member)
        exact.zero_grad()
        made = exact(tokens, valid)
        mean_square(torch.where(inside.unsqueeze(1), made, made.detach())).backward()
        for name in ("table.weight", "every.weight", "valid_alone.weight", "decide.weight"):
            assert error(spectrum(tree, name, "gradient", group), svdvals(exact.get_parameter(name).grad)) < 1e-6, name
        assert (
            error(spectrum(tree, "valid_alone.weight", "activation", group), svdvals(activation[inside[sample]])) < 1e-6
        )
        for place in range(T) if by_position else ():
            there = inside[sample] & (position == place)
            found = tree["layers/valid_alone.weight/gradient_by_position"].sel(step=0, group=group, position=place)
            assert error(found.values, svdvals(adjoint[there].T @ activation[there])) < 1e-6


def test_valid_that_is_neither_all_rows_nor_those_that_came_is_refused_by_name():
    lengths = torch.tensor([5, 3, 1, 4, 2, 5, 2, 1, 3]).unsqueeze(1)
    came, valid = torch.arange(T) < lengths, torch.arange(T) < lengths - (lengths > 1).int()
    model = Padded()
    with (
        autospec.watch(model, LABELS, valid=valid, quiet=True),
        pytest.raises(
            WatchError, match=r"'valid_alone\.weight' received between 1 and 5 rows of a sample.*mark in valid="
        ),
    ):
        mean_square(model(torch.randint(1, 20, (N, T)), came)).backward()


def test_a_mask_for_rows_that_lie_the_other_way_round_is_told_of():
    valid, _ = valid_positions()

    class TurnedRound(nn.Module):
        def __init__(self):
            super().__init__()
            self.ahead, self.back = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return (self.ahead(x) * self.back(x.flip(1)).flip(1) * valid.unsqueeze(-1)).sum(1)

    with pytest.warns(UserWarning, match=r"hold [\d.]+ % of the gradient of 'back\.weight'.*another order") as said:
        record(Problem(TurnedRound(), torch.randn(N, T, 6), mean_square, LABELS), valid=valid)
    assert len(said) == 1


def test_labels_of_a_batch_without_its_mask_are_told_of_once():
    valid, _ = valid_positions()
    model = nn.Linear(6, 4)
    with autospec.watch(model, LABELS, valid=valid, quiet=True) as watcher:
        with pytest.warns(UserWarning, match="Give set_groups\\(\\) the valid= of each batch"):
            watcher.set_groups(LABELS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for mask in (None, valid, None):
                watcher.set_groups(LABELS, valid=mask)


def test_the_probe_leaves_buffers_gradients_and_random_numbers_alone():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    x = torch.randn(N, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin_x, state = x.clone(), torch.get_rng_state()
    with autospec.watch(model, LABELS):
        model(x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
    model.load_state_dict(before)
    model(twin_x)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(x, twin_x)
    assert all(p.grad is None for p in model.parameters())
    assert int(model[1].num_batches_tracked) == 1
