"""Copies run in the model's place, and nothing of the model or around it changes."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autospec
from autospec.introspection import WatchError
from autospec.introspection.copies import copy_model, kept_apart
from autospec.introspection.sample_shares import sample_shares
from autospec.testing import check

from .oracle import Problem, assert_exact, members, record, svdvals, weights_after_training


def mean_square(output):
    return output.square().mean()


N = 12
LABELS = ["a", "b", "b", "c"] * 3


class Net(nn.Module):
    """A layer, statistics of the batch, and another layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


class InAttributes(Net):
    """Functions that hold the model: in an attribute, in a container, as a default, and one within the other."""

    def __init__(self):
        super().__init__()
        self.body = lambda x: torch.tanh(self.norm(self.first(x)))
        self.heads = {"main": [functools.partial(lambda layer, x: layer(x), self.second)]}
        self.whole = lambda x, model=self: model.heads["main"][0](model.body(x))

    def forward(self, x):
        return self.whole(x)


def timed(model):
    """Wrap the forward pass, as timers and loggers do."""
    inner, calls = model.forward, [0]

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        calls[0] += 1
        return inner(*args, **kwargs)

    model.forward = forward
    return model


def in_autocast(model):
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def compiled(model):
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


MODELS = {
    "functions in attributes": InAttributes,
    "wrapped": lambda: timed(timed(Net())),
    "autocast": lambda: in_autocast(Net()),
    "compiled": lambda: compiled(Net()),
}


def trained(make, watched):
    torch.manual_seed(0)
    model, x = make(), torch.randn(N, 5)
    return weights_after_training(model, x, mean_square, LABELS if watched else None, steps=3, lr=0.1)


@pytest.mark.parametrize("case", MODELS)
def test_a_model_in_functions_of_its_own_is_copied_with_them_and_stays_as_it_was(case):
    plain, watched = (trained(MODELS[case], each) for each in (False, True))
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name


def test_shares_of_a_model_in_functions_of_its_own_are_exact():
    model, plain, x = InAttributes(), Net(), torch.randn(N, 5)
    plain.load_state_dict(model.state_dict())
    tree = record(Problem(model, x, mean_square, LABELS))
    assert_exact(tree, Problem(plain, x, mean_square, LABELS), members(LABELS, N))


def test_the_copy_holds_itself_and_shares_no_state_with_the_model():
    model = timed(InAttributes())
    twin = copy_model(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = torch.randn(N, 5)
    assert not twin(x).any()
    assert model(x).any()
    calls = [
        dict(zip(each.forward.__code__.co_freevars, each.forward.__closure__, strict=True)) for each in (model, twin)
    ]
    assert [each["calls"].cell_contents for each in calls] == [[1], [1]]


class Grabber:
    """A hook that is an object, and keeps what it sees in a list that is the model's."""

    def __init__(self, found):
        self.found = found

    def __call__(self, module, args, output):
        self.found.append(output)


class WithHelpers(Net):
    """Lists, dicts and functions that the forward pass looks at are the same ones in the copy."""

    def __init__(self, grab):
        super().__init__()
        self.found, self.scales, self.activation = [], {torch.tanh: 1.0, F.relu: 2.0}, F.relu
        self.first.register_forward_hook(grab(self.found))

    def forward(self, x):
        super().forward(x)
        assert self.activation is F.relu
        return self.second(self.activation(self.found.pop()) * self.scales[self.activation])


def closing_over(found):
    return lambda module, args, output: found.append(output)


@pytest.mark.parametrize("grab", [Grabber, closing_over])
def test_what_a_copy_holds_is_still_the_same_as_what_its_helpers_hold(grab):
    plain, watched = (trained(lambda: WithHelpers(grab), each) for each in (False, True))
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name
    assert check(WithHelpers(grab), torch.randn(N, 5), LABELS, quiet=True).passed


def test_functions_that_hold_nothing_of_the_model_are_not_copied():
    layer = nn.TransformerEncoderLayer(4, 2, activation=F.gelu)
    layer.shared, layer.calls = functools.partial(F.relu, inplace=False), [torch.tanh]
    twin = copy_model(layer)
    assert twin.activation is layer.activation
    assert twin.calls == layer.calls
    assert twin.calls is not layer.calls
    assert twin.shared.func is F.relu


class Holder:
    """Something of another library's, which Python copies as it says."""

    def __init__(self, layer):
        self.layer = layer

    def __deepcopy__(self, memo):
        return Holder(self.layer)

    def __call__(self, x):
        return self.layer(x)


class HeldElsewhere(Net):
    def __init__(self):
        super().__init__()
        self.normalise = Holder(self.norm)

    def forward(self, x):
        return self.second(torch.tanh(self.normalise(self.first(x))))


def watched_once(model, x):
    with autospec.watch(model, LABELS):
        model(x)


USES = {
    "watch": watched_once,
    "sample_shares": lambda model, x: sample_shares(model, lambda each: mean_square(each(x)), N),
    "check": lambda model, x: check(model, x, LABELS, quiet=True),
}


@pytest.mark.parametrize("use", USES)
def test_a_copy_that_would_run_the_models_own_layers_is_refused_before_it_does(use):
    model, x = HeldElsewhere(), torch.randn(N, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WatchError, match=r"calls 'norm' of the model itself.*in a method of the model"):
        USES[use](model, x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.norm.training


def test_what_a_model_calls_that_is_no_part_of_it_is_put_back():
    outside = nn.BatchNorm1d(3)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 3)

        def forward(self, x):
            return torch.tanh(outside(nn.ReLU()(self.first(x))))

    model, x = Around(), torch.randn(N, 5)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        mean_square(model(x)).backward()
        watcher.step()
    expected = nn.BatchNorm1d(3)
    expected(torch.relu(model.first(x)))
    assert outside.training
    assert int(outside.num_batches_tracked) == 1
    assert torch.equal(outside.running_mean, expected.running_mean)
    assert np.isfinite(watcher.trajectories["layers/first.weight/gradient"]).all()


def test_modules_without_weights_may_be_anybodys():
    with kept_apart(Net()):
        nn.Softmax(0)(torch.ones(3))


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    lengths: torch.Tensor
    itself: object = None

    def __post_init__(self):
        object.__setattr__(self, "itself", self)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    lengths: torch.Tensor


@pytest.mark.parametrize(
    "make",
    [
        Batch,
        Frozen,
        lambda x, lengths: SimpleNamespace(x=x, lengths=lengths),
        lambda x, lengths: {"kept": [SimpleNamespace(x=x, lengths=lengths)]},
    ],
    ids=["dataclass", "frozen dataclass", "object", "object in containers"],
)
def test_a_batch_may_be_an_object_that_holds_tensors(make):
    class OfObjects(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(7, 5)

        def forward(self, batch):
            batch = batch["kept"][0] if isinstance(batch, dict) else batch
            counted = torch.arange(5) < batch.lengths[:, None]
            return self.inner(batch.x[counted])  # rows go by the lengths

    torch.manual_seed(0)
    labels = ["a", "b", "b"] * 3
    model, x = OfObjects(), torch.randn(9, 5, 7)
    with autospec.watch(model, labels, quiet=True) as watcher:
        for step in range(2):
            lengths = (torch.arange(9) + step) % 5 + 1
            given = make(x.clone(), lengths)
            model.zero_grad()
            model(given).square().sum().backward()
            watcher.step()
            held = given["kept"][0] if isinstance(given, dict) else given
            assert torch.equal(held.x, x)
            for group, member in members(labels, 9).items():
                rows = x[torch.from_numpy(member)][(torch.arange(5) < lengths[:, None])[torch.from_numpy(member)]]
                watched = watcher.trajectories["layers/inner.weight/activation"].sel(group=group).values[step]
                assert np.abs(watched[:5] - svdvals(rows)[:5]).max() < 1e-5, (group, step)
