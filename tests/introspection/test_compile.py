"""torch.compile: watched where watching began before the first call, else refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import autospec
from autospec.introspection import WatchError

from .families import (
    LABELS,
    Bert,
    Calls,
    E,
    LanguageModel,
    N,
    Stepwise,
    T,
    Twice,
    convolutional_network,
    normal,
    weighted,
    whole_numbers,
)
from .oracle import error, spectrum, svdvals

MODELS = {
    "Linear, in-place ReLU": lambda: (
        nn.Sequential(nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 5)),
        normal(N, 7),
    ),
    "Linear, twice": lambda: (Twice(nn.Linear(7, 7)), normal(N, 7)),
    "convolutions": lambda: (convolutional_network(1), normal(N, 2, 9)),
    "embedding": lambda: (LanguageModel(), whole_numbers(20, N, T)),
    "LSTM": lambda: (Calls(nn.LSTM(4, 5, batch_first=True)), normal(N, T, 4)),
    "LSTMCell": lambda: (Stepwise(nn.LSTMCell(4, 5)), normal(N, T, 4)),
    "attention": lambda: (
        Calls(nn.MultiheadAttention(E, 2, batch_first=True, dropout=0.1), lambda m, x: m(x, x, x)[0]),
        normal(N, T, E),
    ),
    "BERT": lambda: (Bert(1), whole_numbers(20, N, T)),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(case):
    torch.manual_seed(0)
    return MODELS[case]()


def train(model, called, x, labels=LABELS, **options):
    """Two steps of a model that is called under another name; the tree, or None."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    watcher = autospec.watch(called, labels, quiet=True, **options) if labels else None
    with watcher or torch.enable_grad():
        for _ in range(2):
            optimizer.zero_grad()
            weighted(called(x)).backward()
            if watcher:
                watcher.step()
            optimizer.step()
    return watcher and watcher.trajectories


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_the_record_of_the_model_and_trains_as_without_watching(backend, case, caplog):
    model, x = make(case)
    eager, alone = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(eager, eager, x)
    tree = train(model, torch.compile(model, backend=backend), x)
    assert list(tree["layers"].children) == list(expected["layers"].children)
    for layer in tree["layers"].children:
        for statistic in ("gradient", "activation", "adjoint"):
            values = expected[f"layers/{layer}/{statistic}"].values
            found = tree[f"layers/{layer}/{statistic}"].values
            np.testing.assert_allclose(found, values, rtol=0, atol=2e-6 * np.nanmax(values), err_msg=layer)
    assert tree.attrs["audit"]["outside"] == {}
    torch._dynamo.reset()
    train(alone, torch.compile(alone, backend=backend), x, labels=None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    assert "Graph break" not in caplog.text


def test_the_model_may_be_compiled_inside_the_block_or_in_place():
    model, x = make("Linear, twice")
    expected = train(copy.deepcopy(model), model, x)
    for form in ("inside", "in place"):
        torch._dynamo.reset()
        twin, x = make("Linear, twice")
        if form == "in place":
            twin.compile(backend="eager")
        with autospec.watch(twin, LABELS, quiet=True) as watcher:
            called = torch.compile(twin, backend="eager") if form == "inside" else twin
            weighted(called(x)).backward()
            watcher.step()
        found = watcher.trajectories["layers/layer.weight/gradient"].values[0]
        np.testing.assert_allclose(found, expected["layers/layer.weight/gradient"].values[0], rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_may_hold_the_whole_step(backend):
    model, x = make("Linear, in-place ReLU")
    alone, eager = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(eager, eager, x)

    def trained(model, watcher=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        @torch.compile(backend=backend)
        def step(x):
            loss = weighted(model(x))
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.zero_grad()
            step(x)
            if watcher:
                watcher.step()
            optimizer.step()
        torch._dynamo.reset()

    torch.manual_seed(1)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        trained(model, watcher)
    torch.manual_seed(1)
    trained(alone)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    for layer in expected["layers"].children:
        values = expected[f"layers/{layer}/gradient"].values
        found = watcher.trajectories[f"layers/{layer}/gradient"].values
        np.testing.assert_allclose(found, values, rtol=0, atol=2e-6 * np.nanmax(values), err_msg=layer)


@pytest.mark.parametrize("watched", ["compiled", "inner"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_watching_a_model_that_was_compiled_and_called_before_is_refused_at_the_first_step(backend, watched):
    model, x = make("Linear, in-place ReLU")
    compiled = torch.compile(model, backend=backend)
    weighted(compiled(x)).backward()
    with autospec.watch(compiled if watched == "compiled" else model, LABELS) as watcher:
        model.zero_grad()
        weighted(compiled(x)).backward()
        with pytest.raises(WatchError, match=r"must not be called before watch\(\) is entered.*torch\._dynamo\.reset"):
            watcher.step()
    torch._dynamo.reset()
    tree = train(model, compiled, x)
    assert tree["layers/0.weight/gradient"].notnull().all()


def test_a_compiled_part_of_the_model_that_was_called_before_is_refused():
    part, x = make("Linear, twice")
    model = nn.Sequential(torch.compile(part, backend="eager"), nn.Linear(7, 3))
    weighted(model(x)).backward()
    with autospec.watch(model), pytest.raises(WatchError, match=r"gradient reached '0\..*layer\.weight'"):
        weighted(model(x)).backward()


def test_with_groups_the_probe_has_such_a_part_compiled_again():
    """Weights of the probe's copy need no gradient, so torch compiles again, and then the hooks are there."""
    part, x = make("Linear, twice")
    model = nn.Sequential(torch.compile(part, backend="eager"), nn.Linear(7, 3))
    weighted(model(x)).backward()
    model.zero_grad()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        weighted(model(x)).backward()
        watcher.step()
    found = spectrum(watcher.trajectories, "0._orig_mod.layer.weight", "gradient")
    assert error(found, svdvals(part.layer.weight.grad)) < 1e-6
    assert watcher.trajectories.attrs["audit"]["largest_error"] < 1e-6


def test_steps_that_are_not_recorded_and_validation_leave_no_trace():
    model, x = make("Linear, in-place ReLU")
    compiled = torch.compile(model, backend="eager")
    with autospec.watch(compiled, LABELS, every=2, quiet=True) as watcher:
        for _ in range(4):
            model.zero_grad()
            weighted(compiled(x)).backward()
            watcher.step()
            with torch.no_grad():
                compiled(x[:5])
    gradient = watcher.trajectories["layers/0.weight/gradient"]
    assert gradient.step.values.tolist() == [0, 2]
    assert np.array_equal(gradient[0], gradient[1])
    assert torch.equal(compiled(x), model(x))
