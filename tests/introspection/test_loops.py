"""Training loops as people write them: gradients on the side, several losses, penalties, hooks, interruptions."""

import copy
import threading
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import _get_current_function_mode_stack

import autospec
from autospec.introspection import WatchError

from .oracle import Problem, assert_exact, assert_shares, error, members, record, spectrum, svdvals

N = 24
LABELS = ["a", "b", "b", "c"] * 6
LAYERS = ("0.weight", "2.weight")
STATISTICS = ("gradient", "activation", "adjoint", "contrast")


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))


def batch(samples=N):
    return torch.randn(samples, 7, generator=torch.Generator().manual_seed(5))


def two_losses(output):
    return output[:, :2].square().mean(), (output[:, 2:] - 0.3).square().sum() / N


def loss_of(output):
    return sum(two_losses(output))


def assert_same(tree, expected):
    for layer in LAYERS:
        for statistic in STATISTICS[:3]:
            xr.testing.assert_equal(tree[f"layers/{layer}/{statistic}"], expected[f"layers/{layer}/{statistic}"])
    xr.testing.assert_equal(tree["group_size"], expected["group_size"])
    assert tree.attrs["audit"]["outside"] == {}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("samples", [N, 9], ids=["batch", "validation"])
def test_gradients_of_weights_on_the_side_are_not_recorded(when, samples):
    expected = record(Problem(network(), batch(), loss_of, LABELS))
    model = network()

    def on_the_side():
        model.train(samples == N)
        torch.autograd.grad(model(batch(samples))[:, 0].sum(), list(model.parameters()), allow_unused=True)
        model.train()

    with autospec.watch(model, LABELS, quiet=True) as watcher:
        if when == "before":
            on_the_side()
        loss = loss_of(model(batch()))
        loss.backward(retain_graph=True)
        if when == "after":
            on_the_side()
            torch.autograd.grad(loss, list(model.parameters()))
        watcher.step()
    assert_same(watcher.trajectories, expected)


def test_gradients_that_are_never_added_to_the_weights_are_refused():
    model = network()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        gradients = torch.autograd.grad(loss_of(model(batch())), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        with pytest.raises(WatchError, match=r"torch\.autograd\.grad returned them, .* call loss\.backward\(\)"):
            watcher.step()
        loss_of(model(batch())).backward()
        watcher.step()


def test_two_backward_passes_through_one_forward_pass_count_its_samples_and_rows_once():
    trees = []
    for passes in (1, 2):
        model = network()
        with autospec.watch(model, LABELS, statistics=STATISTICS, quiet=True) as watcher:
            first, second = two_losses(model(batch()))
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                if passes == 1:
                    (first + second).backward()
                else:
                    first.backward(retain_graph=True)
                    second.backward()
            watcher.step()
        assert [str(each.message)[:19] for each in said] == ["two backward passes"] * (passes - 1)
        trees.append(watcher.trajectories)
    once, twice = trees
    xr.testing.assert_equal(once["group_size"], twice["group_size"])
    for layer in LAYERS:
        xr.testing.assert_equal(once[f"layers/{layer}/rank_limit"], twice[f"layers/{layer}/rank_limit"])
        for statistic in ("gradient", "activation"):
            xr.testing.assert_allclose(once[f"layers/{layer}/{statistic}"], twice[f"layers/{layer}/{statistic}"], 1e-5)
        contrasts = [tree[f"contrasts/a - b/{layer}/gradient"] for tree in trees]
        xr.testing.assert_allclose(*contrasts, 1e-5)
        assert twice[f"layers/{layer}/adjoint"].isnull().all()


def test_micro_batches_of_one_forward_pass_each_still_add_up():
    model = network()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for _ in range(2):
            loss_of(model(batch())).backward()
        watcher.step()
    assert watcher.trajectories["group_size"].sel(group="all").item() == 2 * N
    assert watcher.trajectories["layers/0.weight/adjoint"].notnull().any()


class Heads(nn.Module):
    """A head for each of two questions."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(5, 4), nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])

    def forward(self, x, which):
        hidden = torch.tanh(self.body(x))
        return [self.heads[i](hidden) for i in which]


@pytest.mark.parametrize("layers", [None, ["heads.*"]])
def test_samples_count_once_wherever_their_gradient_arrives(layers):
    model, sizes = Heads(), (6, 10)
    batches = [(torch.randn(size, 5), ["a", "b"] * (size // 2)) for size in sizes]
    with autospec.watch(model, ["a", "b"], layers=layers, statistics=["gradient", "contrast"], quiet=True) as watcher:
        for which, (x, labels) in enumerate(batches):  # each micro-batch reaches another head
            watcher.set_groups(labels)
            model(x, [which])[0].square().sum().backward()
        watcher.step()
        model.zero_grad()
        for output in model(batches[1][0], [0, 1]):  # two losses of one forward pass
            output.square().sum().backward(retain_graph=True)
        watcher.step()
    tree = watcher.trajectories
    assert tree.group_size.values.tolist() == [[16, 8, 8], [10, 5, 5]]
    model.zero_grad()
    shares = []
    for start in (0, 1):
        loss = sum(model(x[start::2], [which])[0].square().sum() for which, (x, _) in enumerate(batches))
        shares.append(torch.autograd.grad(loss, model.heads[0].weight)[0])
    recorded = tree["contrasts/a - b/heads.0.weight/gradient"].values[0]
    np.testing.assert_allclose(recorded, torch.linalg.svdvals((shares[0] - shares[1]) / 8), rtol=1e-4)


def test_a_penalty_on_gradients_is_reported_at_whatever_step_it_comes():
    model = network()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for step in range(3):
            model.zero_grad()
            x = batch().requires_grad_()
            output = model(x)
            loss = loss_of(output)
            if step == 1:
                (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
                loss = loss + slope.square().sum()
            loss.backward()
            with pytest.warns(UserWarning, match="penalty on weights or on gradients") if step == 1 else nullcontext():
                watcher.step()
    outside = watcher.trajectories.attrs["audit"]["outside"]
    assert set(outside) == set(LAYERS)
    assert min(outside.values()) > 0.5


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.LeakyReLU])
def test_a_penalty_with_a_backward_pass_of_its_own_is_reported(activation, order):
    def model():
        made = network()
        made[1] = activation()
        return made

    def penalty():
        x = batch().requires_grad_()
        (slope,) = torch.autograd.grad(watched(x).sum(), x, create_graph=True)
        slope.square().sum().backward()

    def losses():
        for part in (penalty, lambda: loss_of(watched(batch())).backward())[:: 1 if order == "before" else -1]:
            part()

    watched = model()
    with autospec.watch(watched, LABELS, quiet=True, steps=[1]) as watcher:
        for _ in range(2):
            watched.zero_grad()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                losses()
                watcher.step()
    assert ["penalty on weights or on gradients" in str(each.message) for each in said] == [True, True]
    tree = watcher.trajectories
    assert set(tree.attrs["audit"]["outside"]) == set(LAYERS)
    if activation is nn.LeakyReLU:  # whose second derivative is zero: nothing of the penalty comes by rows
        expected = record(Problem(model(), batch(), loss_of, LABELS))
        for layer in LAYERS:
            found, alone = (spectrum(each, layer, "gradient", "a", step=0) for each in (tree, expected))
            assert error(found, alone) < 1e-6


def test_a_second_derivative_that_is_only_looked_at_is_no_penalty():
    expected = record(Problem(network(), batch(), loss_of, LABELS))
    model = network()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        weights = list(model.parameters())
        gradients = torch.autograd.grad(loss_of(model(batch())), weights, create_graph=True)
        torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), weights)
        loss_of(model(batch())).backward()
        watcher.step()
    assert_same(watcher.trajectories, expected)


def test_weights_may_be_updated_while_the_backward_pass_runs():
    """As in PyTorch's tutorial on fusing the optimizer's step into the backward pass."""
    expected = record(Problem(network(), batch(), loss_of, LABELS))
    model = network()
    optimizers = {parameter: torch.optim.SGD([parameter], 0.1) for parameter in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for _ in range(2):
            loss_of(model(batch())).backward()
            watcher.step()
    assert_same(watcher.trajectories.isel(step=[0]), expected)


class Features(list):
    """A feature extractor that is an object."""

    def __call__(self, _module, _args, output):
        self.append(output)


@pytest.mark.parametrize("kind", ["function", "object"])
def test_hooks_of_the_users_see_the_training_alone(kind):
    def losses(watched):
        model = network()
        features = Features() if kind == "object" else []
        model[1].register_forward_hook(features if kind == "object" else lambda _, __, output: features.append(output))
        optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
        watcher = autospec.watch(model, LABELS, quiet=True) if watched else None
        with watcher or warnings.catch_warnings():
            for _ in range(3):
                features.clear()
                optimizer.zero_grad()
                loss = loss_of(model(batch())) + 0.1 * sum(each.square().mean() for each in features)
                loss.backward()
                if watcher:
                    watcher.step()
                optimizer.step()
                found.append((len(features), loss.item()))
        return found

    assert losses(watched=True) == losses(watched=False)


def test_a_hook_that_needs_a_gradient_does_not_disturb():
    model, seen = network(), []
    model[1].register_forward_hook(lambda _, __, output: output.register_hook(seen.append) and None)
    problem = Problem(model, batch(), loss_of, LABELS)
    assert_exact(record(problem), problem, members(LABELS, N))
    assert seen


class Outside:
    """Holds what cannot be copied, as a trainer does."""

    def __init__(self):
        self.lock, self.seen = threading.Lock(), 0

    def note(self, *_):
        with self.lock:
            self.seen += 1


def test_a_method_of_something_outside_of_the_model_may_be_a_hook():
    model, outside = network(), Outside()
    handle = model[1].register_forward_hook(outside.note)
    problem = Problem(model, batch(), loss_of, LABELS)
    tree = record(problem)
    assert outside.seen == 1
    handle.remove()
    assert_exact(tree, problem, members(LABELS, N))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_hooks_that_are_part_of_the_model_are_copied_with_it():
    model = network()
    nn.utils.weight_norm(model[0])
    problem = Problem(model, batch(), loss_of, LABELS)
    tree = record(problem, unknown="skip")
    assert list(tree["layers"].children) == ["2.weight"]
    rows = problem.model[:2](batch()).detach()
    assert error(spectrum(tree, "2.weight", "activation"), svdvals(rows)[:5]) < 1e-6


def test_a_function_that_is_a_hook_may_bring_the_input_into_form():
    model, plain = network(), network()
    model[0].register_forward_pre_hook(lambda _, args: (args[0].flatten(1),))
    x = batch().reshape(N, 7, 1)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        loss_of(model(x)).backward()
        watcher.step()
    assert_same(watcher.trajectories, record(Problem(plain, batch(), loss_of, LABELS)))


def turned(_, __, output):
    return output.flip(0)


def centred(_, __, output):
    return output - output.mean(0)


def mixed_in_training(module, _, output):
    return output + output[torch.randperm(len(output))] if module.training else output


def test_a_hook_that_moves_rows_is_followed():
    model = network()
    model[1].register_forward_hook(turned)
    model[0].register_forward_pre_hook(lambda _, args: (args[0].flip(0),))
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for _ in range(2):
            model.zero_grad()
            loss_of(model(batch())).backward()
            watcher.step()
    where = members(LABELS, N)
    hidden = torch.tanh(nn.functional.linear(batch(), model[0].weight, model[0].bias)).detach()
    for step in range(2):
        for group in "abc":
            for name, rows in (("0.weight", batch()), ("2.weight", hidden)):
                found = spectrum(watcher.trajectories, name, "activation", group, step)
                expected = svdvals(rows[torch.from_numpy(where[group])])
                assert error(found[: len(expected)], expected[: len(found)]) < 1e-6, (step, group, name)


@pytest.mark.parametrize("hook", [centred, mixed_in_training])
def test_a_hook_that_mixes_samples_is_refused(hook):
    model = network()
    model[1].register_forward_hook(hook)
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError, match=r"several samples|other samples"):
        model(batch())


class Positions(nn.Module):
    """Adds a table that all samples share."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.table, self.head, self.form = nn.Linear(7, 6), nn.Embedding(3, 6), nn.Linear(6, 2), form

    def forward(self, x):
        place = torch.arange(x.shape[1])
        added = self.table(place.unsqueeze(0)) if self.form == "before" else self.table(place).unsqueeze(0)
        return self.head(torch.tanh(self.inner(x) + added))


def test_hooks_on_a_shared_table_see_it_as_it_is():
    model, seen = Positions("before"), []
    model.table.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        model(torch.randn(N, 3, 7)).square().sum().backward()
        watcher.step()
    assert seen == [(1, 3, 6)]
    assert error(spectrum(watcher.trajectories, "table.weight", "gradient"), svdvals(model.table.weight.grad)) < 1e-6


def test_a_shared_table_that_gets_its_dimension_afterwards():
    model, x = Positions("after"), torch.randn(N, 3, 7)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        model(x).square().sum().backward()
        watcher.step()
    for group, member in members(LABELS, N).items():
        twin = copy.deepcopy(model).double()
        (share,) = torch.autograd.grad(twin(x.double())[torch.from_numpy(member)].square().sum(), twin.table.weight)
        assert error(spectrum(watcher.trajectories, "table.weight", "gradient", group), svdvals(share)) < 1e-6


def test_a_hook_that_replaces_the_output_of_a_layer_is_after_it():
    model = network()
    model[0].register_forward_hook(lambda _, __, output: 2 * output)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        loss_of(model(batch())).backward()
        watcher.step()
    assert error(spectrum(watcher.trajectories, "0.weight", "gradient"), svdvals(model[0].weight.grad)) < 1e-6
    assert watcher.trajectories.attrs["audit"]["outside"] == {}


class Keeps(nn.Module):
    """Keeps an activation in an attribute, as attention maps are."""

    def __init__(self):
        super().__init__()
        self.net, self.kept = network(), None

    def forward(self, x):
        self.kept = torch.softmax(self.net(x), 1)
        return self.kept


def test_an_activation_that_the_model_keeps_does_not_hinder_a_copy():
    model = Keeps()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for samples in (N, 16):
            watcher.set_groups(LABELS[:samples])
            model.zero_grad()
            model(batch(samples)).square().sum().backward()
            watcher.step()
    found = spectrum(watcher.trajectories, "net.0.weight", "gradient", step=1)
    assert error(found, svdvals(model.net[0].weight.grad)) < 1e-6


def test_a_gradient_with_respect_to_inputs_of_another_batch_needs_no_labels():
    expected = record(Problem(network(), batch(), loss_of, LABELS))
    model = network()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        model.eval()
        probe = batch(9).requires_grad_()
        assert torch.autograd.grad(model(probe).sum(), probe)[0].shape == (9, 7)
        model.train()
        loss_of(model(batch())).backward()
        watcher.step()
    assert_same(watcher.trajectories, expected)


def test_an_interruption_within_attention_leaves_nothing_behind(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = len(_get_current_function_mode_stack())
    monkeypatch.setattr(nn.functional, "multi_head_attention_forward", interrupt)
    with pytest.raises(KeyboardInterrupt), autospec.watch(model, quiet=True):
        model(torch.randn(4, 3, 8))
    assert len(_get_current_function_mode_stack()) == before


@pytest.mark.parametrize("kept", [False, True])
def test_gradients_on_the_side_keep_nothing_alive(kept):
    model = network()
    alive = []

    def note(_, __, output):
        alive.append(weakref.ref(output))

    model[1].register_forward_hook(note)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for _ in range(4):
            loss = loss_of(model(batch()))
            for _ in range(1 + kept):
                torch.autograd.grad(loss, list(model.parameters()), retain_graph=kept)
            del loss
        loss = loss_of(model(batch()))
        assert sum(each() is not None for each in alive) == 1
        calls = len(watcher._capture._calls)
        loss.backward()
        watcher.step()
    assert calls <= 2


def test_a_layer_that_is_made_at_the_first_call_does_not_disturb():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(7, 5)

        def forward(self, x):
            hidden = self.inner(x)
            if not hasattr(self, "act"):
                self.act = nn.Tanh()
            return self.act(hidden)

    problem = Problem(Late(), batch(), loss_of, LABELS)
    assert_exact(record(problem), problem, members(LABELS, N))


def test_weights_that_change_their_type_within_the_block_are_followed():
    model = network()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for x in (batch(), batch().double(), batch()):
            model.to(x.dtype)
            model.zero_grad()
            loss_of(model(x)).backward()
            watcher.step()
    found = watcher.trajectories["layers/0.weight/gradient"].values
    assert np.abs(found[1:] - found[0]).max() < 1e-6 * found.max()


class Unpadded(nn.Module):
    """Sees the places that count alone, by their number in the whole batch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(7, 4)

    def forward(self, x, places):
        return self.inner(x.flatten(0, 1)[places])


def test_rows_that_are_chosen_by_their_number_are_traced_for_each_batch():
    model, x, where = Unpadded(), torch.randn(N, 3, 7), members(LABELS, N)
    lengths = [np.array([3, 1] * (N // 2)), np.array([1, 3] * (N // 2))]
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for each in lengths:
            model.zero_grad()
            places = torch.from_numpy(np.flatnonzero(np.arange(3) < each[:, None]))
            model(x, places).square().sum().backward()
            watcher.step()
    for step, each in enumerate(lengths):
        for group in "abc":
            rows = x[torch.from_numpy((np.arange(3) < each[:, None]) & where[group][:, None])]
            found = spectrum(watcher.trajectories, "inner.weight", "activation", group, step)
            assert error(found, svdvals(rows)[: len(found)]) < 1e-6, (step, group)


class Scanners(nn.Module):
    """A head for each scanner, whose names come in one way or another."""

    def __init__(self):
        super().__init__()
        self.inner, self.heads = nn.Linear(7, 4), nn.ModuleDict({"A": nn.Linear(4, 3), "B": nn.Linear(4, 3)})

    def forward(self, x, scanners):
        scanners = np.asarray(getattr(scanners, "names", scanners))
        states = torch.tanh(self.inner(x))
        for name, head in self.heads.items():
            chosen = torch.from_numpy(np.flatnonzero(scanners == name))
            states = states.index_copy(0, chosen, nn.functional.pad(head(states[chosen]), (0, 1)))
        return states


@dataclass
class Names:
    names: np.ndarray
    itself: "Names | None" = None
    unset: int = field(init=False)

    def __post_init__(self):
        self.itself = self


@pytest.mark.parametrize(
    "form",
    [
        list,
        np.asarray,
        lambda names: np.asarray(names, dtype=object),
        Names,
        lambda names: SimpleNamespace(names=names),
        lambda names: SimpleNamespace(names=names, more=SimpleNamespace(kept={"names": names})),
        pd.Series,
    ],
    ids=["list", "array", "array of objects", "dataclass", "object", "object in an object", "column"],
)
def test_rows_that_go_by_what_is_no_tensor_are_traced_for_each_batch(form):
    model, x, where = Scanners(), batch(), members(LABELS, N)
    orders = [np.array(list("AABB") * (N // 4)), np.array(list("BABA") * (N // 4))]
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for scanners in orders:
            model.zero_grad()
            model(x, form(scanners)).square().sum().backward()
            watcher.step()
    states = torch.tanh(model.inner(x)).detach()
    for step, scanners in enumerate(orders):
        for group in "abc":
            rows = states[torch.from_numpy((scanners == "A") & where[group])]
            found = spectrum(watcher.trajectories, "heads.A.weight", "activation", group, step)
            if not len(rows):
                assert not found.any()
                continue
            assert error(found, svdvals(rows)[: len(found)]) < 1e-6, (step, group)


class Order(Enum):
    GIVEN, REVERSED = 0, 1


class Turns(nn.Module):
    """Turns the batch round where it is told to, in one way or another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 6)

    def forward(self, x, order):
        return self.layer(x.flip(0) if getattr(order, "order", order) in (True, "reversed", Order.REVERSED) else x)


@pytest.mark.parametrize(
    "form",
    [
        bool,
        Order,
        lambda reverse: SimpleNamespace(order=bool(reverse)),
        lambda reverse: SimpleNamespace(order="reversed" if reverse else "given"),
        lambda reverse: SimpleNamespace(order=Order(reverse)),
    ],
    ids=["argument", "enumeration", "in an object", "text in an object", "enumeration in an object"],
)
def test_rows_that_go_by_a_switch_are_traced_for_each_of_its_values(form):
    model, x, where = Turns(), batch(), members(LABELS, N)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for reverse in (0, 1):
            model.zero_grad()
            model(x, form(reverse)).square().sum().backward()
            watcher.step()
    for step in (0, 1):
        for group in "abc":
            expected = svdvals(x[torch.from_numpy(where[group])])[:6]
            assert error(spectrum(watcher.trajectories, "layer.weight", "activation", group, step), expected) < 1e-6


class Carries(nn.Module):
    """Begins each batch where the last one ended, and makes a part of itself when it is first called."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how, self.states = nn.GRU(7, 5, batch_first=True), how, []
        if how == "buffer":
            self.register_buffer("state", torch.zeros(1, N, 5))

    def forward(self, x):
        if not hasattr(self, "gain"):
            self.register_buffer("gain", torch.ones(5))
        if self.how == "buffer":
            output, state = self.layer(x, self.state.clone())
            self.state.copy_(state.detach())
        else:
            output, state = self.layer(x, self.states[-1] if self.states else None)
            self.states = [*self.states, state.detach()] if self.how == "attribute" else self.states
            if self.how == "list":
                self.states.append(state.detach())
        return output * self.gain


@pytest.mark.parametrize("how", ["buffer", "attribute", "list"])
def test_a_state_that_is_carried_on_is_not_touched_by_the_probe(how):
    x = torch.randn(N, 4, 7, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    plain = Carries(how)
    model = copy.deepcopy(plain)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for part in x.chunk(2, 1):
            for each in (plain, model):
                each.zero_grad()
                each(part).square().sum().backward()
            watcher.step()
    for one, other in (
        zip([model.state], [plain.state], strict=True)
        if how == "buffer"
        else zip(model.states, plain.states, strict=True)
    ):
        assert torch.equal(one, other)
    assert torch.equal(model.layer.weight_hh_l0.grad, plain.layer.weight_hh_l0.grad)
    found = spectrum(watcher.trajectories, "layer.weight_ih_l0", "gradient", step=1)
    assert error(found, svdvals(plain.layer.weight_ih_l0.grad)) < 1e-6


class Windows(nn.Module):
    """Attention's projections of windows of three, filled up at the edge."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(7, 4)

    def forward(self, x):
        filled = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 3))
        return self.project(filled.reshape(-1, 3, 7)).mean(1)


def test_rows_that_fill_up_windows_go_to_the_sample_of_their_window():
    problem = Problem(
        Windows(),
        torch.randn(N, 7, 7),
        loss_of,
        LABELS,
        lambda y: torch.arange(N).repeat_interleave(3)[:, None].expand(y.shape[:-1]),
    )
    assert_exact(record(problem), problem, members(LABELS, N))


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_a_packed_sequence_may_be_what_the_model_is_called_with(enforce_sorted):
    model, x = nn.LSTM(7, 5), torch.randn(9, N, 7, generator=torch.Generator().manual_seed(2))
    lengths = torch.arange(N, 0, -1).clamp(max=9)
    lengths = lengths if enforce_sorted else lengths.flip(0)
    where = members(LABELS, N)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        model(packed)[0].data.square().sum().backward()
        watcher.step()
    for group in "abc":
        model.zero_grad()
        of_group = torch.from_numpy(where[group])
        alone = pack_padded_sequence(x[:, of_group], lengths[of_group], enforce_sorted=enforce_sorted)
        model(alone)[0].data.square().sum().backward()
        for name in ("weight_ih_l0", "weight_hh_l0"):
            expected = svdvals(model.get_parameter(name).grad)
            assert error(spectrum(watcher.trajectories, name, "gradient", group), expected) < 1e-6


class Distilled(nn.Module):
    """Compares with what it made of a part of the batch, without gradients."""

    def __init__(self, part):
        super().__init__()
        self.inner, self.head, self.part = nn.Linear(7, 4), nn.Linear(4, 3), part

    def forward(self, x):
        with torch.no_grad():
            first = self.inner(x.transpose(0, 1) if self.part is None else x[:, self.part])
            target = first.mean(0 if self.part is None else 1)
        return self.head(torch.tanh(self.inner(x) - target.unsqueeze(1)))


class Refining(nn.Module):
    """Calls itself for a first guess."""

    def __init__(self, guess_learns):
        super().__init__()
        self.inner, self.head, self.guess_learns = nn.Linear(10, 8), nn.Linear(8, 3), guess_learns

    def forward(self, x, guess=None):
        if guess is None:
            with nullcontext() if self.guess_learns else torch.no_grad():
                guess = self(x, x.new_zeros(*x.shape[:-1], 3))
        return self.head(torch.tanh(self.inner(torch.cat([x, guess], -1))))


@pytest.mark.parametrize(
    "model",
    [Distilled(None), Distilled(slice(2)), Refining(True), Refining(False)],
    ids=["other order", "fewer rows", "calls itself", "calls itself without gradients"],
)
def test_calls_without_gradients_and_of_the_model_by_itself_are_counted(model):
    problem = Problem(model, torch.randn(N, 5, 7), lambda y: (y - 1).square().sum(), LABELS)
    assert_exact(record(problem), problem, members(LABELS, N))


class Guided(nn.Module):
    """Looks at its own guess, made without gradients, of other rows than it goes on with; in training alone or always."""

    def __init__(self, attends, in_training):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True) if attends else nn.Linear(8, 8)
        self.head, self.attends, self.in_training = nn.Linear(8, 3), attends, in_training

    def forward(self, x):
        def mixed(rows):
            return self.inner(rows, rows, rows)[0] if self.attends else self.inner(rows)

        guess = 0.0
        if self.training or not self.in_training:
            with torch.no_grad():
                guess = mixed(x.flip(0)).flip(0).mean(1, keepdim=True)
        states = mixed(x)
        if states.requires_grad:
            states.retain_grad()
        return self.head(torch.tanh(states - guess))


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize(("attends", "in_training"), [(True, False), (False, False), (False, True), (True, True)])
def test_what_is_made_without_gradients_is_no_use_in_whatever_mode(attends, in_training, mode):
    torch.manual_seed(1)
    problem = Problem(
        Guided(attends, in_training).train(mode == "training"), torch.randn(N, 5, 8), lambda y: y.square().sum(), LABELS
    )
    assert_shares({1e-6: record(problem)}, problem, members(LABELS, N))


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_call_of_the_model_that_was_interrupted_does_not_disturb_the_next():
    expected = record(Problem(network(), batch(), loss_of, LABELS))
    model = network()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        handle = model[1].register_forward_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(batch())
        handle.remove()
        loss_of(model(batch())).backward()
        watcher.step()
    assert_same(watcher.trajectories, expected)


class Fails(nn.Module):
    """A model for series of one length, that draws numbers and counts before it fails on others."""

    def __init__(self, in_evaluation=False):
        super().__init__()
        self.read, self.norm, self.drop = nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3), nn.Dropout(0.2)
        self.decide, self.in_evaluation = nn.Linear(12, 5), in_evaluation

    def forward(self, x):
        if self.in_evaluation and not self.training:
            raise ValueError("targets are for training only")
        return self.decide(self.drop(torch.relu(self.norm(self.read(x)))).flatten(1))


@pytest.mark.parametrize("lengths", [[4, 3, 4], [3, 4], [4, 4, 3, 3, 4]], ids=str)
def test_a_batch_on_which_the_model_fails_may_be_skipped_and_the_training_is_the_same(lengths):
    def train(watched):
        torch.manual_seed(0)
        model, x, failures = Fails(), torch.randn(N, 2, 4), 0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with autospec.watch(model, LABELS, quiet=True) if watched else nullcontext() as watcher:
            for length in lengths:
                optimizer.zero_grad()
                try:
                    loss = model(x[:, :, :length]).square().mean()
                except RuntimeError:  # no WatchError
                    failures += 1
                    continue
                loss.backward()
                if watched:
                    watcher.step()
                optimizer.step()
        assert failures == lengths.count(3)
        assert not watched or watcher.trajectories.sizes["step"] == lengths.count(4)
        return [*model.state_dict().values(), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_a_model_that_fails_in_evaluation_mode_alone_is_refused_with_a_way_out():
    model, x = Fails(in_evaluation=True), torch.randn(N, 2, 4)
    with (
        pytest.warns(UserWarning, match="never called"),
        autospec.watch(model, LABELS, quiet=True),
        pytest.raises(WatchError, match=r"evaluation mode.*\(ValueError: targets are for training only\).*rows="),
    ):
        model(x)
    rows = {"read.weight": range(N), "decide.weight": range(N)}
    with autospec.watch(model, LABELS, rows=rows, quiet=True) as watcher:
        model(x).square().mean().backward()
        watcher.step()
    assert watcher.trajectories.attrs["audit"]["outside"] == {}
    with autospec.watch(model, quiet=True) as watcher:
        model(x).square().mean().backward()
        watcher.step()


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without gradients"])
@pytest.mark.parametrize("way", ["trace", "export"])
def test_a_checkpoint_may_be_exported_in_the_block(way, gradients):
    expected = record(Problem(network(), batch(), loss_of, LABELS))
    model = network()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        with torch.set_grad_enabled(gradients):
            if way == "trace":
                traced = torch.jit.trace(model.eval(), batch(3))
                assert torch.equal(traced(batch(3)), model(batch(3)))
            else:
                torch.export.export(model.eval(), (batch(3),), strict=False)  # as newer versions of torch do
        loss_of(model.train()(batch())).backward()
        watcher.step()
    assert_same(watcher.trajectories, expected)


def test_positions_count_within_each_forward_pass():
    model, x = nn.Linear(7, 5), torch.randn(N, 6, 7, generator=torch.Generator().manual_seed(1))
    parts = x.chunk(2, 1)
    found = []
    for together in (True, False):
        with autospec.watch(model, LABELS, quiet=True, per_position=True) as watcher:
            model.zero_grad()
            losses = [model(part).square().sum() for part in parts]
            if together:
                sum(losses).backward()
            else:
                [loss.backward() for loss in losses]
            watcher.step()
        found.append(watcher.trajectories["layers/weight/gradient_by_position"].sel(group="b").values[0])
    wide, rows = nn.Linear(7, 5).double(), members(LABELS, N)["b"]
    wide.load_state_dict(model.state_dict())
    for position in range(3):
        loss = sum(wide(part.double()[rows, position]).square().sum() for part in parts)
        expected = svdvals(torch.autograd.grad(loss, wide.weight)[0])
        for each in found:
            assert each.shape == (3, 5)
            assert error(each[position], expected) < 1e-6


def test_functions_of_torch_func_run_beside_the_training():
    """A moving average of the weights is evaluated; sensitivities are computed."""
    expected = record(Problem(network(), batch(), loss_of, LABELS))
    model = network()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        loss = loss_of(model(batch()))
        slope = torch.func.grad(lambda x: model(x).sum())(batch())
        torch.func.vmap(model)(batch())
        loss.backward()
        with torch.no_grad():
            torch.func.functional_call(model, {name: p * 0.9 for name, p in model.named_parameters()}, batch())
        watcher.step()
    x = batch().requires_grad_()
    assert torch.allclose(slope, torch.autograd.grad(network()(x).sum(), x)[0])
    assert_same(watcher.trajectories, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_is_refused_and_an_iterator_of_labels_is_not():
    with pytest.raises(WatchError, match="the model is TorchScript"):
        autospec.watch(torch.jit.script(network()), LABELS)
    with pytest.raises(WatchError, match="groups=3: give one label for each sample"):
        autospec.watch(network(), 3)
    expected = record(Problem(network(), batch(), loss_of, LABELS))
    for labels in (iter(LABELS), {"group": iter(LABELS)}, np.array(LABELS, dtype="S1")):
        tree = record(Problem(network(), batch(), loss_of, labels))
        xr.testing.assert_equal(tree["layers/0.weight"].dataset, expected["layers/0.weight"].dataset)


# ---------------------------------------------------------------------- other weights for one call


class TwoStages(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.read, self.head = nn.Linear(6, 5), nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.read(self.encode(x).tanh())[0])


@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.detach], ids=["parameters", "tensors"])
def test_a_call_with_other_weights_as_of_a_mean_teacher_leaves_the_record_as_it_was(kind):
    x, found = torch.randn(N, 3, 6), []
    for teacher_is_model in (False, True):
        torch.manual_seed(0)
        model = TwoStages()
        other = {name: kind(parameter.detach() * 1.3) for name, parameter in model.named_parameters()}
        teacher = model if teacher_is_model else copy.deepcopy(model)
        with autospec.watch(model, LABELS, quiet=True) as watcher:
            for _ in range(2):
                model.zero_grad()
                target = torch.func.functional_call(teacher, other, (x,)).detach()
                (model(x) - target).square().mean().backward()
                watcher.step()
        found.append(watcher.trajectories)
    xr.testing.assert_identical(found[1], found[0])


def test_a_call_with_another_head_is_recorded_but_for_the_head():
    torch.manual_seed(0)
    model, x = TwoStages(), torch.randn(N, 3, 6)
    head = {f"head.{name}": p.detach() * 2 for name, p in model.head.named_parameters()}
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        torch.func.functional_call(model, head, (x,)).square().mean().backward()
        watcher.step()
    layers = watcher.trajectories["layers"]
    assert layers["head.weight/gradient"].isnull().all()
    for name in ("encode.weight", "read.weight_hh_l0"):
        expected = svdvals(model.get_parameter(name).grad)
        assert error(spectrum(watcher.trajectories, name, "gradient"), expected) < 1e-6


@pytest.mark.parametrize("change", [lambda p: 2 * p, lambda p: p + torch.ones_like(p)], ids=["scaled", "moved"])
def test_a_call_with_weights_computed_of_the_watched_ones_is_refused(change):
    """Its gradient comes back to them, without its rows."""
    model, x = TwoStages(), torch.randn(N, 3, 6)
    with autospec.watch(model, LABELS, quiet=True):
        other = {name: change(parameter) for name, parameter in model.named_parameters()}
        with pytest.raises(
            WatchError, match=r"'encode\.weight' was replaced, for one call, by a tensor computed with gradients"
        ):
            torch.func.functional_call(model, other, (x,))
