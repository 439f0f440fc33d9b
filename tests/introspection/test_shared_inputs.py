"""Layers and functions that are given what all samples share, and how that is told from data."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autospec.testing
from autospec.introspection import WatchError
from autospec.introspection.copies import copy_model

from .oracle import Problem, error, members, record, spectrum, svdvals
from .own_weights import (
    INPUTS,
    LABELS,
    OUTPUTS,
    SPREAD,
    BiasedScores,
    Joined,
    N,
    T,
    assert_definition,
    assert_same_training,
    loss_by_sample,
    loss_of,
)


def test_a_buffer_that_the_batch_is_written_into_is_data():
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5) / 2)
            self.register_buffer("room", torch.zeros(N, 6))

        def forward(self, x):
            self.room.copy_(x)
            return self.room @ self.weight

    torch.manual_seed(0)
    model, x = Static(), torch.randn(N, 6)
    tree = record(Problem(model, x, loss_of, LABELS))
    assert_definition(tree, model, x)


@pytest.mark.parametrize("buffer", [True, False])
def test_a_state_that_is_carried_on_is_data(buffer):
    class Carried(nn.Module):
        def __init__(self):
            super().__init__()
            self.of_input, self.of_state = (nn.Parameter(torch.randn(6, 6) / 3) for _ in range(2))
            if buffer:
                self.register_buffer("state", torch.zeros(N, 6))
            else:
                self.state = torch.zeros(N, 6)

        def forward(self, x):
            made = torch.tanh(x @ self.of_input + self.state @ self.of_state)
            self.state = made.detach()
            return made

    torch.manual_seed(0)
    model, x = Carried(), torch.randn(N, 6)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for _ in range(3):
            before = model.state.clone()
            loss_of(model(x)).backward()
            watcher.step()
            model.zero_grad()
    found = watcher.trajectories["layers/of_state/activation"].sel(group="all").values[-1]
    assert error(found[~np.isnan(found)], svdvals(before)) < 1e-6


class Shared(nn.Module):
    """Layers are applied to what all samples share, and what they return meets data."""

    def __init__(self, given, meets):
        super().__init__()
        if given == "prototypes":
            self.constants = nn.Parameter(torch.randn(T, INPUTS))
        else:
            self.register_buffer("constants", torch.randn(T, INPUTS))
        self.positions = nn.Embedding(T, INPUTS) if given == "positions" else None
        self.given, self.meets = given, meets
        self.project = nn.Sequential(
            nn.Linear(INPUTS, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, OUTPUTS, bias=False)
        )
        self.first = nn.Linear(INPUTS, OUTPUTS)
        if meets in ("graph", "queries"):
            self.a, self.b = nn.Linear(OUTPUTS, 5), nn.Linear(OUTPUTS, 5)
        self.head = nn.Linear(T if meets == "prototypes" else OUTPUTS, 3)

    def forward(self, x):
        given = self.constants if self.positions is None else self.positions(torch.arange(T))
        shared, data = self.project(given.unsqueeze(0) if self.given == "for a batch" else given), self.first(x)
        if self.meets == "sum":
            data = data + shared
        elif self.meets == "a number":
            data = data + shared.square().mean()
        elif self.meets == "prototypes":
            data = data @ shared.mT
        elif self.meets == "graph":
            data = torch.softmax(self.a(shared) @ self.b(shared).mT, -1) @ data
        elif self.meets == "queries":
            data = torch.softmax(self.a(shared) @ self.b(data).mT, -1) @ data
        elif self.meets == "kernel":
            kernel = shared.T.reshape(OUTPUTS, 1, T)
            data = F.conv1d(data.mT, kernel, padding=T - 1, groups=OUTPUTS)[..., :T].mT
        elif self.meets == "the same layer":
            data = data * self.project(x) + shared
        return self.head(torch.tanh(data))


SHARED = ["constants", "prototypes", "positions", "for a batch"]
MEETS = ["sum", "a number", "graph", "queries", "the same layer", "prototypes", "kernel"]
# The last two take a matrix.
MET = [(given, meets) for given in SHARED for meets in MEETS[: -2 if given == "for a batch" else None]]


@pytest.mark.parametrize(("given", "meets"), MET)
def test_a_layer_may_be_given_what_all_samples_share(given, meets):
    torch.manual_seed(0)
    model, x = Shared(given, meets), torch.randn(N, T, INPUTS)
    tree = record(Problem(model, x, loss_of, LABELS))
    names = {"project.0.weight", "project.3.weight", "first.weight", "head.weight"}
    names |= {"constants"} if given == "prototypes" else set()
    names |= {"positions.weight"} if given == "positions" else set()
    names |= {"a.weight", "b.weight"} if meets in ("graph", "queries") else set()
    assert set(tree["layers"].children) == names
    assert_definition(tree, model, x)
    assert tree.attrs["audit"]["outside"] == {}
    assert_same_training(model, x)


def test_an_input_that_was_taken_for_one_of_the_samples_is_noticed_at_the_next_size():
    class Dots(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.place = nn.Linear(INPUTS, 4), nn.Linear(3, 4)

        def forward(self, x, coordinates):
            return self.first(x) @ self.place(coordinates).T

    torch.manual_seed(0)
    model, coordinates = Dots(), torch.randn(6, 3)
    twin = copy.deepcopy(model).double()
    batches = [torch.randn(count, INPUTS) for count in (6, 9, 6)]
    with autospec.watch(model, ["a", "b"], singular_values="all", quiet=True) as watcher:
        for step, x in enumerate(batches):
            watcher.set_groups(LABELS[: len(x)])
            model.zero_grad()
            said = pytest.warns(UserWarning, match="in batches of 6") if step == 1 else contextlib.nullcontext()
            with said:
                output = model(x, coordinates)
            loss_of(output).backward()
            watcher.step()
    for step in (1, 2):
        losses = loss_by_sample(twin(batches[step].double(), coordinates.double()))
        inside = torch.tensor([label == "a" for label in LABELS[: len(losses)]])
        (share,) = torch.autograd.grad(losses[inside].sum(), twin.place.weight)
        found = watcher.trajectories["layers/place.weight/gradient"].isel(step=step).sel(group="a").dropna("index")
        assert error(found.values, svdvals(share)) < 1e-6


@pytest.mark.parametrize("regions", [T, N], ids=["fewer than samples", "as many"])
def test_an_input_that_all_samples_share(regions):
    """Coordinates of regions, by which a network weights what it passes from region to region."""

    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.mask = nn.Linear(3, 6), nn.Parameter(torch.randn(regions, regions))
            self.read, self.head = nn.Linear(INPUTS, 6), nn.Linear(6, 3)

        def forward(self, x, coordinates):
            place = self.place(coordinates)
            graph = torch.softmax(place @ place.T + self.mask * (coordinates @ coordinates.T), -1)
            return self.head(torch.tanh(graph @ (self.read(x) + place)))

    torch.manual_seed(0)
    model, x, coordinates = Regions(), torch.randn(N, regions, INPUTS), torch.randn(regions, 3)
    twin, trained = copy_model(model), copy_model(model)
    with autospec.watch(trained, LABELS, batch_dim=0, singular_values="all", quiet=True) as watcher:
        loss_of(trained(x, coordinates)).backward()
        watcher.step()
    twin.forward = lambda x: Regions.forward(twin, x, coordinates.to(x))
    twin.double()
    for group, member in members(LABELS, N).items():
        weights = {name: each for name, each in twin.named_parameters() if each.ndim == 2}
        losses = loss_by_sample(twin.forward(x.double()))[torch.from_numpy(member)].sum()
        shares = torch.autograd.grad(losses, list(weights.values()))
        for name, share in zip(weights, shares, strict=True):
            assert error(spectrum(watcher.trajectories, name, "gradient", group), svdvals(share)) < 1e-6, name
    assert autospec.testing.check(model, (x, coordinates), LABELS, batch_dim=0, quiet=True).passed


class Placed(nn.Module):
    """Coordinates of regions are an argument; there is an output for each region."""

    def __init__(self, first):
        super().__init__()
        self.place, self.read, self.head, self.first = nn.Linear(3, 6), nn.Linear(INPUTS, 6), nn.Linear(6, 3), first

    def forward(self, *given):
        coordinates, x = given if self.first else given[::-1]
        return self.head(torch.tanh(self.read(x) + self.place(coordinates)))


@pytest.mark.parametrize(("first", "options"), [(False, {}), (True, {}), (True, {"batch_dim": 0})])
def test_a_batch_of_as_many_samples_as_regions_is_read_as_the_one_before(first, options):
    torch.manual_seed(0)
    regions, labels = 6, {9: LABELS, 6: LABELS[:6]}
    model, coordinates = Placed(first), torch.randn(regions, 3)
    batches = [torch.randn(count, regions, INPUTS) for count in (9, 6)]
    watched, twin = copy.deepcopy(model), copy.deepcopy(model).double()
    with autospec.watch(watched, ["a", "b"], singular_values="all", quiet=True, **options) as watcher:
        for x in batches:
            watcher.set_groups(labels[len(x)])
            loss_of(watched(*((coordinates, x) if first else (x, coordinates)))).backward()
            watcher.step()
            watched.zero_grad()
    for step, x in enumerate(batches):
        wide = (coordinates.double(), x.double())
        losses = loss_by_sample(twin(*(wide if first else wide[::-1])))
        for group, member in members(labels[len(x)], len(x)).items():
            (share,) = torch.autograd.grad(losses[torch.from_numpy(member)].sum(), twin.place.weight, retain_graph=True)
            found = (
                watcher.trajectories["layers/place.weight/gradient"].isel(step=step).sel(group=group).dropna("index")
            )
            assert error(found.values, svdvals(share)) < 1e-6


@pytest.mark.parametrize("first", [True, False])
def test_as_many_regions_as_samples_at_once_are_refused_or_told_apart(first):
    torch.manual_seed(0)
    model, coordinates, x = Placed(first), torch.randn(N, 3), torch.randn(N, N, INPUTS)
    given = (coordinates, x) if first else (x, coordinates)
    with (
        autospec.watch(model, LABELS, quiet=True),
        pytest.raises(WatchError, match=r"more than one dimension.*batch_dim="),
    ):
        model(*given)
    check = autospec.testing.check(model, given, LABELS, batch_dim=0, quiet=True)
    assert check.passed
    assert check.not_compared == {}


UNKNOWN = {
    "new_ones": lambda model, x: x.new_ones(N, 3),
    "ones_like": lambda model, x: torch.ones_like(x[0, :, :3]),
    "a list": lambda model, x: model.listed[0],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_constants_that_are_not_known_for_such_decide_nothing(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.read, self.head = nn.Linear(3, 6), nn.Linear(INPUTS, 6), nn.Linear(6, 3)
            self.listed = [torch.randn(N, 3)]

        def forward(self, x):
            return self.head(torch.tanh(self.read(x) + self.place(UNKNOWN[name](self, x))))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(N, N, INPUTS)
    with (
        autospec.watch(model, LABELS, quiet=True),
        pytest.raises(WatchError, match=r"more than one dimension.*batch_dim="),
    ):
        model(x)


GRID = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1]])


class OfConstants(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.register_buffer("constants", torch.randn(T, INPUTS))
        self.first, self.second, self.read = nn.Linear(INPUTS, 7), nn.Linear(7, 6), nn.Linear(INPUTS, 6)
        self.table, self.head, self.kind = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3), kind

    def forward(self, x):
        hidden = self.first(self.constants)
        if self.kind == "in place":
            hidden = F.relu(hidden, inplace=True)
        elif self.kind == "in place, by position":
            hidden = nn.functional.leaky_relu(hidden, 0.1, True)
        elif self.kind == "dropout":
            hidden = F.dropout(hidden, 0.4, self.training)
        shared, data = self.second(hidden), self.read(x)
        if self.kind == "tied":
            data = torch.tanh(data @ self.second.weight) @ self.second.weight.T
        elif self.kind == "an index from elsewhere":  # of the table's rows
            shared = shared + self.table[GRID].sum(1)
        return self.head(torch.tanh(data + shared))


@pytest.mark.parametrize("kind", ["in place", "in place, by position", "tied", "an index from elsewhere", "dropout"])
def test_what_is_computed_of_constants_in_several_ways(kind):
    torch.manual_seed(0)
    model, x = OfConstants(kind), torch.randn(N, T, INPUTS)
    model.table.requires_grad_(kind == "an index from elsewhere")
    assert_same_training(model, x)
    own = copy.deepcopy(model).double()
    state = torch.get_rng_state()
    with autospec.watch(model, LABELS, singular_values="all", quiet=True) as watcher:
        loss_of(model(x)).backward()
        watcher.step()
    torch.set_rng_state(state)
    mask = F.dropout(torch.ones(T, 7), 0.4)  # what was drawn
    if kind == "dropout":
        own.kind, own.first = "", nn.Sequential(own.first, Times(mask.double()))
    losses = loss_by_sample(own(x.double()))
    for group, member in members(LABELS, N).items():
        for name in watcher.trajectories["layers"].children:
            weight = own.get_parameter(name if kind != "dropout" else name.replace("first.", "first.0."))
            (share,) = torch.autograd.grad(losses[torch.from_numpy(member)].sum(), weight, retain_graph=True)
            assert error(spectrum(watcher.trajectories, name, "gradient", group), svdvals(share)) < 1e-6, name
    if kind != "dropout":
        assert autospec.testing.check(model, x, LABELS, quiet=True).passed


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_the_reason_is_said_why_a_layer_of_constants_cannot_be_followed():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("times", torch.linspace(0, 1, T).unsqueeze(1))
            self.make, self.head = nn.Linear(1, INPUTS), nn.Linear(INPUTS, 3)

        def forward(self, x):
            kernel = torch.fft.rfft(self.make(self.times), n=2 * T, dim=0)
            return self.head(torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * kernel, n=2 * T, dim=1)[:, :T])

    model = Kernel()
    said = r"'make\.weight' in mul\(\).*layers=\['!make\.weight'\]"
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError, match=said):
        model(torch.randn(N, T, INPUTS))


@pytest.mark.parametrize("case", ["positions-the same layer", "prototypes-graph", "cat", "queries", "made by layers"])
def test_the_check_compares_what_is_made_of_what_all_samples_share(case):
    torch.manual_seed(0)
    given, _, meets = case.partition("-")
    if meets:
        model = Shared(given, meets)
    else:
        model = BiasedScores(case) if case == "made by layers" else Joined(SPREAD["repeat"], case)
    check = autospec.testing.check(model, torch.randn(N, T, INPUTS), LABELS, quiet=True)
    assert check.passed
    assert check.not_compared == {}


@pytest.mark.parametrize("tokens", [N, T], ids=["as many as samples", "fewer"])
def test_as_many_constants_as_samples_are_no_samples(tokens):
    """Where a loss is taken of each time step, either dimension might be that of the samples."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("constants", torch.randn(tokens, INPUTS))
            self.place, self.read, self.head = nn.Linear(INPUTS, 6), nn.Linear(INPUTS, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.read(x) + self.place(self.constants)))

    torch.manual_seed(0)
    model, x = Positions(), torch.randn(N, tokens, INPUTS)
    if tokens == N:
        with pytest.raises(WatchError, match=r"more than one dimension.*batch_dim="):
            record(Problem(model, x, loss_of, LABELS))
    assert_definition(record(Problem(model, x, loss_of, LABELS), batch_dim=0), model, x)


def test_a_width_that_is_the_number_of_samples_makes_no_state_of_a_constant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(N, N)), nn.Tanh(), nn.Linear(N, 3))
    x = torch.randn(N, N, N)
    tree = record(Problem(model, x, loss_of, LABELS), batch_dim=0)
    assert_definition(tree, model, x)


class Constants(nn.Module):
    """Positions that are made of a constant, which is as long as the batch is large."""

    def __init__(self, use):
        super().__init__()
        self.weight, self.out, self.use = nn.Parameter(torch.randn(3, 6) / 2), nn.Linear(6, 2), use
        self.table = nn.Embedding(N, 6)
        self.register_buffer("basis", torch.randn(N, 3))
        self.register_buffer("places", torch.arange(N))

    def forward(self, x):
        return self.out(torch.tanh(self.use(self, x)))


PLACES = torch.arange(N)
AS_LONG_AS_THE_BATCH = {
    "a basis": lambda m, x: x + m.basis @ m.weight,
    "positions with a dimension afterwards": lambda m, x: x + m.table(torch.arange(N)).unsqueeze(0),
    "positions in a buffer": lambda m, x: x + m.table(m.places)[None],
    "positions that are nobody's": lambda m, x: x + (2 * m.table(PLACES))[None],
    "positions by which data are multiplied": lambda m, x: torch.tanh(m.table(torch.arange(N)))[None] * x,
}


@pytest.mark.parametrize("name", AS_LONG_AS_THE_BATCH)
def test_what_is_as_long_as_the_batch_is_large_is_no_guess(name):
    torch.manual_seed(0)
    model, x = Constants(AS_LONG_AS_THE_BATCH[name]), torch.randn(N, N, 6)
    layers = ["!table.weight"] if name == "a basis" else ["!weight"]
    tree = record(Problem(model, x, loss_of, LABELS), batch_dim=0, layers=layers)
    assert_definition(tree, model, x)
    try:
        tree = record(Problem(model, x, loss_of, LABELS), layers=layers)
    except WatchError as error_:
        assert "more than one dimension" in str(error_)  # noqa: PT017
    else:
        assert_definition(tree, model, x)


def test_as_many_prototypes_as_samples_are_no_samples():
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.centres = nn.Linear(6, 6), nn.Embedding(N, 6)

        def forward(self, x):
            return torch.tanh(self.inner(x)) @ self.centres(torch.arange(N)).T

    torch.manual_seed(0)
    model, x = Prototypes(), torch.randn(N, 6)
    assert_definition(record(Problem(model, x, loss_of, LABELS)), model, x)
