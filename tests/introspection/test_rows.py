"""Rows are traced to samples, or refused; they are never assumed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import autospec
from autospec.introspection import WatchError
from autospec.introspection.rows import code_words, decode

from .oracle import Problem, assert_exact, error, factors, members, record, sample_second, spectrum, svdvals

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
    "matmul": lambda x, w: x @ w.t(),
    "of a view": lambda x, w: x @ w.T[:, :3],
    "linear": lambda x, w: F.linear(x, w),
    "einsum": lambda x, w: torch.einsum("nf,gf->ng", x, w),
    "masked": lambda x, w: x @ (w * torch.eye(6)),
}


@pytest.mark.parametrize("use", FUNCTIONAL_USES)
def test_a_weight_used_outside_its_layer_is_refused_by_name(use):
    model = Functional(FUNCTIONAL_USES[use])
    with pytest.raises(WatchError, match=r"'first\.weight' outside its layer"):
        record(Problem(model, torch.randn(N, 6), mean_square, LABELS))
    tree = record(Problem(model, torch.randn(N, 6), mean_square, LABELS), layers=["second.*"])
    assert list(tree["layers"].children) == ["second.weight"]


def test_a_weight_used_nowhere_but_outside_its_layer_is_refused_by_name():
    model, x = Mixing(), torch.randn(N, 6)
    with autospec.watch(model):
        model(x)
        with pytest.raises(WatchError, match=r"gradient reached 'inner\.weight' that did not come through its layer"):
            (x @ model.inner.weight.T).sum().backward()


def test_a_penalty_inside_the_forward_pass_is_no_functional_use():
    model = Functional(lambda x, w: x + 0.01 * w.square().sum())
    with pytest.warns(UserWarning, match=r"first\.weight.*penalty"):
        tree = record(Problem(model, torch.randn(N, 6), mean_square, LABELS))
    assert list(tree.attrs["audit"]["outside"]) == ["first.weight"]


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
