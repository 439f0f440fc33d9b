"""The watcher looks on: the training keeps its bits, and every way to call it gives the record of the same step."""

import contextlib
import copy
import io
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F

import autospec
from autospec.introspection import WatchError
from autospec.introspection import measure as measure_module
from autospec.introspection.shares import Shares

from .oracle import Problem, assert_exact, error, members, record, share_by_copies, spectrum, svdvals

N = 24
LABELS = ["a", "b", "b", "c"] * 6


class Noise(nn.Module):
    """Draws random numbers of three kinds, in evaluation mode too."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) + 0.1 * random.random() + 0.1 * np.random.normal()  # noqa: NPY002


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(7, 6), Noise(), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(6, 5)
    )


def smooth():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))


def batch():
    return torch.randn(N, 7, generator=torch.Generator().manual_seed(5))


def watched_steps(model, loss, labels=LABELS, count=1, **options):
    """Record some steps without an update; return the tree."""
    with autospec.watch(model, labels, **options) as watcher:
        for _ in range(count):
            model.zero_grad()
            loss().backward()
            watcher.step()
    return watcher.trajectories


def loss_of(output):
    return (output * torch.linspace(-1, 2, 5)).tanh().square().mean() * 4


def no_watch():
    class Nothing:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def step(self):
            pass

        def set_groups(self, labels):
            pass

    return Nothing()


def train(watch, optimizer_of):
    """Train with shuffling, Dropout and three sources of random numbers; return everything that could change."""
    model, x = network(), batch()
    optimizer = optimizer_of(model.parameters())
    torch.manual_seed(7), np.random.seed(7), random.seed(7)  # noqa: NPY002
    losses = []
    with watch(model) as watcher:
        for _ in range(4):
            order = torch.randperm(N)
            for part in order.split(8):
                watcher.set_groups([LABELS[i] for i in part])
                optimizer.zero_grad()
                noise = torch.from_numpy(np.random.normal(size=7)).float() * random.random()  # noqa: NPY002
                loss = loss_of(model(x[part] + noise))
                loss.backward()
                watcher.step()
                optimizer.step()
                losses.append(loss.item())
    return (
        losses,
        model.state_dict(),
        optimizer.state_dict(),
        [p.grad for p in model.parameters()],
        torch.get_rng_state(),
        np.random.get_state(),  # noqa: NPY002
        random.getstate(),
    )


def assert_same(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"audit": 1, "singular_values": "all"}, {"every": 3}], ids=str)
def test_training_is_bitwise_unchanged(optimizer, options):
    threads = torch.get_num_threads()
    plain = train(lambda model: no_watch(), OPTIMIZERS[optimizer])
    watched = train(lambda model: autospec.watch(model, LABELS, **options), OPTIMIZERS[optimizer])
    assert_same(plain, watched)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("change", ["sum", "dropout"])
@pytest.mark.parametrize("counts", [False, True])
def test_a_model_that_changes_its_input_in_place_gets_it_as_it_is(change, counts):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.count = nn.Linear(7, 4), 0

        def forward(self, x):
            self.count += counts
            x = x.add_(1.0) if change == "sum" else F.dropout(x, 0.5, self.training, inplace=True)
            return self.layer(x).tanh()

    gradients, inputs = [], []
    for watched in (False, True):
        torch.manual_seed(0)
        model, x = InPlace(), batch()
        with autospec.watch(model, LABELS, quiet=True) if watched else contextlib.nullcontext() as watcher:
            model(x).square().sum().backward()
            if watcher is not None:
                watcher.step()
        gradients.append(model.layer.weight.grad)
        inputs.append(x)
    assert torch.equal(*gradients)
    assert torch.equal(*inputs)


def test_a_plain_run_with_another_seed_differs_so_the_comparison_can_fail():
    plain = train(lambda model: no_watch(), OPTIMIZERS["Adam"])
    disturbed = train(lambda model: torch.rand(1) is None or no_watch(), OPTIMIZERS["Adam"])
    with pytest.raises(AssertionError):
        assert_same(plain, disturbed)


def hooks_of(model):
    found = [len(p._backward_hooks or ()) for p in model.parameters()]
    for module in model.modules():
        found += [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
    return sum(found)


@pytest.mark.parametrize("failure", [None, "in the loop", "in the forward pass", "of the labels"])
def test_hooks_are_gone_after_the_block_whatever_happened_in_it(failure):
    model, x = network(), batch()
    assert hooks_of(model) == 0
    labels = LABELS[:-1] if failure == "of the labels" else LABELS
    try:
        with autospec.watch(model, labels) as watcher:
            loss_of(model(x)).backward()
            assert hooks_of(model) > 4
            watcher.step()
            if failure == "in the forward pass":
                model(x[:, :3])
            if failure:
                raise RuntimeError("mat1")
    except (RuntimeError, WatchError):
        raised = True
    else:
        raised = False
    assert raised == (failure is not None)
    assert hooks_of(model) == 0
    with autospec.watch(model, LABELS):
        pass


def hidden_layers(kind):
    torch.manual_seed(3)
    if kind == "linear":
        return nn.Sequential(nn.Linear(7, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)), batch()
    if kind == "tokens":
        layers = nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)
        return nn.Sequential(*layers), torch.randn(N, 4, 7)
    layers = nn.Conv1d(7, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 3)
    return nn.Sequential(*layers), torch.randn(N, 7, 11)


@pytest.mark.parametrize("kind", ["linear", "tokens", "convolution"])
def test_activations_live_no_longer_than_without_a_watcher(kind):
    def alive(watched):
        model, x = hidden_layers(kind)
        storages, counts = [], []

        def note(_, args, output):
            storages.extend(weakref.ref(tensor.untyped_storage()) for tensor in (*args, output))

        def count(*_):
            counts.append(sum(storage() is not None for storage in storages))

        watcher = autospec.watch(model, LABELS, quiet=True) if watched else contextlib.nullcontext()
        with watcher:
            for _ in range(2):
                storages.clear()
                handles = [layer.register_forward_hook(note) for layer in model]
                loss = loss_of(model(x))
                count()
                for handle in handles:
                    handle.remove()
                weights = [layer.weight for layer in model if hasattr(layer, "weight")]
                handles = [weight.register_post_accumulate_grad_hook(count) for weight in weights]
                loss.backward()
                count()
                for handle in handles:
                    handle.remove()
                if watched:
                    watcher.step()
        return counts[len(counts) // 2 :]  # the first step is audited

    assert alive(watched=True) == alive(watched=False)


@pytest.mark.parametrize("half", [False, True], ids=["single precision", "autocast"])
@pytest.mark.parametrize("kind", ["linear", "tokens", "convolution"])
def test_a_graph_that_is_kept_may_be_crossed_again(kind, half):
    model, x = hidden_layers(kind)
    trees = []
    for passes in (1, 2):
        model.zero_grad()
        with autospec.watch(model, LABELS, quiet=True) as watcher:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = loss_of(model(x).float())
            for part in range(passes):
                loss.backward(retain_graph=part < passes - 1)
            watcher.step()
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                loss.backward()
        trees.append(watcher.trajectories)
    for name in ("0.weight", "2.weight", "4.weight"):
        once, twice = (spectrum(tree, name, "gradient") for tree in trees)
        assert error(twice, 2 * once) < 1e-6


class LetsGo(nn.Module):
    """Keeps its hidden state until the derivative arrives."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(7, 12), nn.Linear(12, 5)

    def forward(self, x):
        self.hidden = torch.tanh(self.first(x).float())
        output = self.last(self.hidden)
        if output.requires_grad:
            output.register_hook(lambda _: setattr(self, "hidden", None))
        return output


def test_an_input_that_user_code_lets_go_is_there_for_a_second_backward_pass():
    """Under autocast the graph keeps a copy in half precision."""
    model = LetsGo()
    with autospec.watch(model, LABELS, statistics=("gradient",), quiet=True) as watcher:
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model(batch()).float())
            loss.backward(retain_graph=True)
            loss.backward()
            watcher.step()
    gradient = svdvals(model.last.weight.grad.double())
    assert error(spectrum(watcher.trajectories, "last.weight", "gradient", step=1), gradient) < 1e-2


def test_a_second_backward_pass_without_the_input_says_so():
    """The graph keeps a copy elsewhere, and the model's own reference goes between the two passes."""
    model = LetsGo()
    elsewhere = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor)
    with autospec.watch(model, LABELS, statistics=("gradient",), quiet=True), elsewhere:
        for _ in range(2):
            output = model(batch())
            model.hidden, hidden = None, model.hidden
            keep = [hidden]
            del hidden
            output.register_hook(lambda _, keep=keep: keep.clear())
            loss_of(output).backward(retain_graph=True)
            with pytest.raises(WatchError, match=r"a second backward pass reached 'last\.weight'"):
                loss_of(output).backward()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_stays(training):
    model = network().train(training)
    model[4].train(not training)
    modes = [module.training for module in model.modules()]
    running = copy.deepcopy(model[2].state_dict())
    with autospec.watch(model, LABELS) as watcher:
        loss = loss_of(model(batch()))
        assert [module.training for module in model.modules()] == modes
        loss.backward()
        watcher.step()
    assert [module.training for module in model.modules()] == modes
    if not training:
        assert_same(running, model[2].state_dict())


@pytest.mark.parametrize("when", ["before", "after", "after zero_grad"])
def test_step_before_or_after_the_optimizer_gives_the_same_record(when):
    def run(when):
        model, x = smooth(), batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with autospec.watch(model, LABELS) as watcher:
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model(x)).backward()
                if when == "before":
                    watcher.step()
                optimizer.step()
                if when == "after zero_grad":
                    optimizer.zero_grad()
                if when != "before":
                    watcher.step()
        return watcher.trajectories

    xr.testing.assert_identical(run(when), run("before"))


def test_data_that_change_between_backward_and_step_do_not_change_the_record():
    model, x = nn.Sequential(nn.Linear(40, 6)), torch.randn(N, 40)  # fewer rows than columns: the rows are kept
    for labels in (None, LABELS):
        with autospec.watch(model, labels) as watcher:
            output = model(x)
            output.retain_grad()
            output.square().mean().backward()
            expected = svdvals(x)[:6]
            adjoint = svdvals(output.grad)[:6]
            x.normal_()
            output.grad.zero_()
            watcher.step()
        assert error(spectrum(watcher.trajectories, "0.weight", "activation"), expected) < 1e-6
        assert error(spectrum(watcher.trajectories, "0.weight", "adjoint"), adjoint) < 1e-6


@pytest.mark.parametrize("kind", ["image of few positions", "series of many positions", "table"])
@pytest.mark.parametrize("labels", [None, ["a", "a", "b", "b"]], ids=["no groups", "groups in order"])
@pytest.mark.parametrize("changed", [False, True])
def test_images_and_indices_may_be_filled_with_the_next_batch_before_the_step_is_closed(kind, labels, changed):
    torch.manual_seed(0)
    positions = 5 if kind == "image of few positions" else 50
    model = nn.Embedding(30, 20) if kind == "table" else nn.Conv1d(40, 6, 3)
    x = torch.randint(30, (4, 3)) if kind == "table" else torch.randn(4, 40, positions)
    with autospec.watch(model, labels, quiet=True) as watcher:
        output = model(x)
        output.retain_grad()
        output.square().sum().backward()
        seen = F.one_hot(x.flatten(), 30).float() if kind == "table" else x.movedim(1, 2).flatten(0, 1)
        expected = {
            "gradient": svdvals(model.weight.grad.flatten(1)),
            "activation": svdvals(seen),
            "adjoint": svdvals(
                output.grad.flatten(0, 1) if kind == "table" else output.grad.transpose(0, 1).flatten(1)
            ),
        }
        if changed:
            x.fill_(7)
            output.grad.zero_()
        watcher.step()
    for statistic, values in expected.items():
        recorded = spectrum(watcher.trajectories, "weight", statistic)
        assert error(recorded[: len(values)], values) < 1e-6, statistic


@pytest.mark.parametrize("parts", [2, 3, N])
def test_micro_batches_accumulate_to_the_full_batch(parts):
    x, problem = batch(), Problem(smooth(), batch(), loss_of, LABELS)
    full = record(problem)
    model = smooth()
    with autospec.watch(model, LABELS) as watcher:
        for rows in torch.arange(N).chunk(parts):
            watcher.set_groups([LABELS[i] for i in rows])
            (loss_of(model(x[rows])) * (len(rows) / N)).backward()
        watcher.step()
    tree = watcher.trajectories
    for layer in ("0.weight", "2.weight"):
        for statistic in ("gradient", "activation", "adjoint"):
            for group in full.group.values:
                expected = spectrum(full, layer, statistic, group)
                assert error(spectrum(tree, layer, statistic, group), expected) < 2e-6
    xr.testing.assert_equal(tree.group_size, full.group_size)
    xr.testing.assert_equal(tree["layers/0.weight/rank_limit"], full["layers/0.weight/rank_limit"])


def silent_in_the_first_half():
    """Return a batch, and a network and a loss that give zero gradients on its first half."""
    model, x = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5)), batch()
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    x = torch.cat([-x[:12].abs(), x[12:].abs()])  # every unit is off, then on
    return model, x


@pytest.mark.parametrize("whole", [False, True], ids=["one layer", "every layer"])
def test_a_gradient_that_is_zero_after_one_micro_batch_is_not_taken_for_zero_grad(whole):
    model, x = silent_in_the_first_half()
    weight = torch.ones(N, 1)
    weight[:12] = 0.0 if whole else 1.0  # a part that does not count in the loss
    full = record(Problem(model, x, lambda y: (y * weight).tanh().square().mean(), LABELS))
    model.zero_grad()
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for rows in torch.arange(N).chunk(2):
            watcher.set_groups([LABELS[i] for i in rows])
            ((model(x[rows]) * weight[rows]).tanh().square().mean() / 2).backward()
            if rows[0] == 0:
                assert not model[0].weight.grad.any()
                assert bool(model[2].bias.grad.any()) != whole
        watcher.step()
    tree = watcher.trajectories
    for layer in ("0.weight", "2.weight"):
        for statistic in ("gradient", "activation", "adjoint"):
            for group in full.group.values:
                expected = spectrum(full, layer, statistic, group)
                assert error(spectrum(tree, layer, statistic, group), expected) < 2e-6
    xr.testing.assert_equal(tree.group_size, full.group_size)
    xr.testing.assert_equal(tree["layers/0.weight/rank_limit"], full["layers/0.weight/rank_limit"])


ZEROING = {
    "set to None": lambda model: model.zero_grad(),
    "in place": lambda model: model.zero_grad(set_to_none=False),
    "through .data": lambda model: [p.grad.data.zero_() for p in model.parameters()],
}


@pytest.mark.parametrize("zero", ZEROING)
def test_every_way_to_zero_gradients_discards(zero):
    problem = Problem(smooth(), batch(), loss_of, LABELS)
    expected = record(problem)
    with autospec.watch(problem.model, LABELS, quiet=True) as watcher:
        problem.model.zero_grad()
        (3 * loss_of(problem.model(batch() + 1))).backward()
        ZEROING[zero](problem.model)
        problem.loss().backward()
        watcher.step()
    for layer in ("0.weight", "2.weight"):
        xr.testing.assert_equal(watcher.trajectories[f"layers/{layer}"].dataset, expected[f"layers/{layer}"].dataset)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_that_came_as_zero_is_discarded_by_zero_grad_like_any_other(set_to_none):
    model, x = silent_in_the_first_half()
    expected = record(Problem(model, x[12:], loss_of, LABELS[12:]))
    model.zero_grad()
    with autospec.watch(model, LABELS[12:], quiet=True) as watcher:
        for rows in (x[:12], x[12:]):
            model.zero_grad(set_to_none=set_to_none)
            loss_of(model(rows)).backward()
        watcher.step()
    xr.testing.assert_equal(watcher.trajectories["layers/0.weight"].dataset, expected["layers/0.weight"].dataset)


def test_a_gradient_that_came_as_zero_and_was_clipped_is_kept():
    """A head that begins with zeros lets no gradient through: the first micro-batch counts all the same."""
    model, x = smooth(), batch()
    nn.init.zeros_(model[2].weight)
    found = []
    for clipped in (False, True):
        model.zero_grad()
        with autospec.watch(model, LABELS, quiet=True) as watcher:
            for rows in torch.arange(N).chunk(2):
                watcher.set_groups([LABELS[i] for i in rows])
                loss_of(model(x[rows])).backward()
                if clipped:
                    nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            watcher.step()
        found.append(watcher.trajectories)
    xr.testing.assert_identical(found[1]["layers"], found[0]["layers"])
    assert error(spectrum(found[1], "0.weight", "activation"), svdvals(x)[: min(model[0].weight.shape)]) < 1e-6


def test_two_forward_passes_of_one_batch_in_one_backward_pass_count_its_samples_once():
    model, x = smooth(), batch()
    with autospec.watch(model, LABELS) as watcher:
        (loss_of(model(x)) + loss_of(model(x + 1))).backward()
        watcher.step()
    assert watcher.trajectories.group_size.values.tolist() == [[24, 6, 12, 6]]
    stacked = svdvals(torch.cat([x, x + 1]))[:6]
    assert error(spectrum(watcher.trajectories, "0.weight", "activation"), stacked) < 1e-6


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("zero_first", [True, False], ids=["before the forward pass", "after the forward pass"])
def test_zero_grad_in_between_discards(set_to_none, zero_first):
    problem = Problem(smooth(), batch(), loss_of, LABELS)
    model, optimizer = problem.model, torch.optim.SGD(problem.model.parameters(), lr=0.1)
    expected = record(problem)
    with autospec.watch(model, LABELS) as watcher:
        model.zero_grad()
        (3 * loss_of(model(batch() + 1))).backward()
        if zero_first:
            optimizer.zero_grad(set_to_none=set_to_none)
        loss = problem.loss()
        if not zero_first:
            optimizer.zero_grad(set_to_none=set_to_none)
        loss.backward()
        watcher.step()
    for layer in ("0.weight", "2.weight"):
        xr.testing.assert_equal(watcher.trajectories[f"layers/{layer}"].dataset, expected[f"layers/{layer}"].dataset)
    xr.testing.assert_equal(watcher.trajectories.group_size, expected.group_size)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(7, 5), nn.Linear(7, 5)

    def forward(self, x):
        return self.left(x), self.right(x)


def test_zero_grad_discards_a_layer_that_the_next_backward_pass_does_not_reach():
    model, x = Branches(), batch()
    with autospec.watch(model, LABELS) as watcher:
        left, right = model(x)
        (loss_of(left) + loss_of(right)).backward()
        model.zero_grad()
        loss_of(model(x)[1]).backward()
        watcher.step()
    assert model.left.weight.grad is None
    assert watcher.trajectories["layers/left.weight/gradient"].isnull().all()
    assert watcher.trajectories["layers/right.weight/gradient"].notnull().all()


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_gradient_with_respect_to_the_input_leaves_no_rows_behind(when):
    problem = Problem(smooth(), batch(), loss_of, LABELS)
    expected = record(problem)
    with autospec.watch(problem.model, LABELS) as watcher:
        problem.model.zero_grad()
        probe = batch().requires_grad_()
        if when == "before":
            torch.autograd.grad(problem.model(probe).sum(), probe)
        loss = problem.loss()
        if when == "between":
            torch.autograd.grad(problem.model(probe).square().sum(), probe)
        loss.backward()
        watcher.step()
    for layer in ("0.weight", "2.weight"):
        for statistic in ("gradient", "activation", "adjoint"):
            path = f"layers/{layer}/{statistic}"
            xr.testing.assert_equal(watcher.trajectories[path], expected[path])
    assert watcher.trajectories.attrs["audit"]["outside"] == {}


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_a_closure_called_several_times_records_its_last_call(line_search):
    problem = Problem(smooth(), batch(), loss_of, LABELS)
    optimizer = torch.optim.LBFGS(problem.model.parameters(), lr=0.1, max_iter=4, line_search_fn=line_search)
    calls = []
    with autospec.watch(problem.model, LABELS) as watcher:

        def closure():
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            calls.append(copy.deepcopy(problem.model))
            return loss

        optimizer.step(closure)
        watcher.step()
    assert len(calls) >= 4
    problem.model = calls[-1]
    assert_exact(watcher.trajectories, problem, members(LABELS, N))


def test_mini_batches_are_recorded_with_the_labels_set_for_them():
    model, x = smooth(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    with autospec.watch(model, LABELS) as watcher:
        for rows in torch.randperm(N).split(10):
            labels = [LABELS[i] for i in rows]
            steps.append(Problem(copy.deepcopy(model), x[rows], loss_of, labels))
            watcher.set_groups(labels)
            optimizer.zero_grad()
            loss_of(model(x[rows])).backward()
            watcher.step()
            optimizer.step()
    tree = watcher.trajectories
    assert tree.group_size.sel(group="all").values.tolist() == [10, 10, 4]
    for step, problem in enumerate(steps):
        table = members(problem.labels, len(problem.x))
        assert_exact(tree.isel(step=[step]), problem, table)
        for group in table:
            assert int(tree.group_size.sel(group=group)[step]) == table[group].sum()


def test_a_group_without_a_sample_in_the_batch_is_nan_at_that_step():
    model, x = smooth(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with autospec.watch(model, LABELS) as watcher:
            for rows in ([0, 4, 8, 1], [3, 7, 1, 2]):
                watcher.set_groups([LABELS[i] for i in rows])
                model.zero_grad()
                loss_of(model(x[rows])).backward()
                watcher.step()
    gradient = watcher.trajectories["layers/0.weight/gradient"]
    assert gradient.sel(group="c")[0].isnull().all()
    assert gradient.sel(group="c")[1].notnull().all()
    assert watcher.trajectories.group_size.sel(group="c").values.tolist() == [0, 2]


def test_a_validation_pass_with_another_batch_leaves_no_trace():
    model, x = smooth(), batch()

    def run(validate):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        with autospec.watch(twin, LABELS) as watcher:
            for _ in range(3):
                if validate:
                    twin.eval()
                    twin(x[:5])
                    with torch.no_grad():
                        twin(x[:9])
                    twin.train()
                optimizer.zero_grad()
                loss_of(twin(x)).backward()
                if validate:
                    with torch.no_grad():
                        twin(x)
                watcher.step()
                optimizer.step()
        return watcher.trajectories

    xr.testing.assert_identical(run(True), run(False))


def test_a_copy_of_the_model_made_in_the_block_is_not_watched_and_disturbs_nothing():
    model, x = smooth(), batch()
    with autospec.watch(model, None) as watcher:
        for disturb in (False, True):
            model.zero_grad()
            loss = loss_of(model(x))
            if disturb:
                twin = copy.deepcopy(model)
                loss_of(twin(3 * x)).backward()
                state = io.BytesIO()
                torch.save(twin, state)
            loss.backward()
            watcher.step()
    tree = watcher.trajectories
    for statistic in ("gradient", "activation", "adjoint"):
        first, second = tree[f"layers/0.weight/{statistic}"].values
        assert np.array_equal(first, second)
    state.seek(0)
    again = torch.load(state, weights_only=False)
    assert torch.equal(again(x), model(x))
    assert b"autospec" not in state.getvalue()  # where it is not installed, too
    again.zero_grad()
    with autospec.watch(again, None) as watcher:
        loss_of(again(x)).backward()
        watcher.step()
    xr.testing.assert_equal(watcher.trajectories["layers/0.weight/gradient"][0], tree["layers/0.weight/gradient"][0])


def test_nan_in_the_loss_is_recorded_as_nan_with_one_warning():
    model, x = smooth(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with autospec.watch(model, LABELS, audit=1) as watcher:
            for step in range(4):
                optimizer.zero_grad()
                loss = loss_of(model(x)) * (float("nan") if step >= 1 else 1.0)
                loss.backward()
                watcher.step()
                optimizer.step()
    ours = [str(w.message) for w in caught]
    assert len(ours) == 1
    assert "not finite, or too large for single precision, at step 1" in ours[0]
    tree = watcher.trajectories
    for layer in ("0.weight", "2.weight"):
        assert tree[f"layers/{layer}/gradient"][0].notnull().all()
        assert tree[f"layers/{layer}/gradient"][1:].isnull().all()
    assert tree["layers/0.weight/activation"].notnull().all()


def test_values_too_large_for_the_record_are_told_of_once_and_are_nan():
    model, x = smooth().double(), batch().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with autospec.watch(model, LABELS, quiet=True) as watcher:
            (1e45 * loss_of(model(x))).backward()
            with pytest.warns(UserWarning, match="too large for single precision, at step 0"):
                watcher.step()  # which is audited, so it does not put its decompositions off
        tree = watcher.trajectories
    assert torch.isfinite(model[0].weight.grad).all()
    assert tree["layers/0.weight/gradient"].isnull().all()
    assert error(spectrum(tree, "0.weight", "activation"), svdvals(x)[: min(model[0].weight.shape)]) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_at_the_very_first_step_raise_nothing(value):
    model, x = smooth(), batch()
    x[3, 2] = value
    with pytest.warns(UserWarning, match="not finite") as caught:
        tree = watched_steps(model, lambda: loss_of(model(x)))
    assert len(caught) == 1
    activation = tree["layers/0.weight/activation"][0]
    assert activation.sel(group="c").isnull().all()
    assert activation.sel(group=["a", "b"]).notnull().all()


def test_a_model_that_diverged_before_the_first_recorded_step_raises_nothing():
    model, x = smooth(), batch()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="not finite"):
        tree = watched_steps(model, lambda: loss_of(model(x)), count=2, steps=[1])
    assert tree["layers/0.weight/activation"].notnull().all()
    assert tree["layers/2.weight/activation"].isnull().all()


def test_a_group_can_be_nan_while_the_others_are_not():
    model, x = smooth(), batch()
    scale = torch.ones(N, 1)
    scale[0] = float("nan")  # sample 0 is of group a
    with pytest.warns(UserWarning, match="not finite"):
        tree = watched_steps(model, lambda: (model(x) * scale).square().sum(1).mean())
    gradient = tree["layers/2.weight/gradient"][0]
    assert gradient.sel(group=["all", "a"]).isnull().all()
    assert gradient.sel(group=["b", "c"]).notnull().all()


def test_a_weight_penalty_outside_the_model_is_reported_with_a_warning():
    problem = Problem(smooth(), batch(), loss_of, LABELS)
    clean = record(problem)
    with pytest.warns(UserWarning, match=r"gradient of '2\.weight' comes from no sample's row") as caught:
        tree = watched_steps(problem.model, lambda: problem.loss() + 0.1 * problem.model[2].weight.square().sum())
    assert len(caught) == 1
    assert list(tree.attrs["audit"]["outside"]) == ["2.weight"]
    share = share_by_copies(problem, np.ones(N, dtype=bool))["2.weight"]
    penalty = 0.2 * problem.model[2].weight.detach().double()
    expected = float(penalty.norm() / (share + penalty).norm())
    assert tree.attrs["audit"]["outside"]["2.weight"] == pytest.approx(expected, rel=1e-4)
    assert clean.attrs["audit"]["outside"] == {}
    xr.testing.assert_equal(tree["layers/2.weight"].dataset, clean["layers/2.weight"].dataset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", ["clip", "zero"])
def test_gradients_may_be_changed_in_place_before_the_step_is_closed(dtype, change):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).to(dtype), torch.randn(6, 3, dtype=dtype)
    with warnings.catch_warnings(), autospec.watch(model, list("aabbab"), quiet=True) as watcher:
        warnings.simplefilter("error")
        model(x).square().sum().backward()
        if change == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        else:
            model.zero_grad(set_to_none=False)
        watcher.step()
    audit = watcher.trajectories.attrs["audit"]
    assert audit["outside"] == {}
    assert audit["steps"] == [0]


def test_the_audit_says_what_was_checked():
    model = smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with autospec.watch(model, [None, *LABELS[1:]], every=2, audit=2) as watcher:
        for _ in range(9):
            optimizer.zero_grad()
            loss_of(model(batch())).backward()
            watcher.step()
            optimizer.step()
    audit = watcher.trajectories.attrs["audit"]
    assert audit["steps"] == [0, 4, 8]
    assert 0 < audit["largest_error"] < 1e-6
    assert 0 < audit["largest_guard_deviation"] < audit["guard_tolerance"]
    assert audit["samples_without_label"] == {"group": 1}
    assert audit["batch_dims"] == [0]
    assert audit["probe_passes"] >= 5


@pytest.mark.parametrize("parts", [1, 4])
def test_the_guard_knows_how_rows_that_cancel_round_in_large_layers_and_in_micro_batches(parts):
    """At the solution of a least-squares problem nothing of the gradient is left but rounding."""
    torch.manual_seed(0)
    x = torch.randn(4000, 300)
    y = x @ torch.randn(300, 20) / 17 + 0.3 * torch.randn(4000, 20)
    layer = nn.Linear(300, 20, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)
    with warnings.catch_warnings(), autospec.watch(layer, quiet=True) as watcher:
        warnings.simplefilter("error")
        for some, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss_of_squares(layer(some), target) / parts).backward()
        watcher.step()
    assert watcher.trajectories.attrs["audit"]["outside"] == {}


def loss_of_squares(output, target):
    return (output - target).square().mean()


def test_a_use_outside_the_layer_that_begins_later_is_told_of_within_64_steps():
    class Changing(nn.Module):
        tied = False

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return self.layer(x) + (x @ self.layer.weight if self.tied else 0)

    model, x = Changing(), torch.randn(8, 5)
    with autospec.watch(model, ["a", "b"] * 4, quiet=True) as watcher:
        for step in range(65):
            model.tied = step > 3
            model.zero_grad()
            model(x).square().sum().backward()
            if step == 64:
                says = r"^[\d.]+ % of the gradient of 'layer.weight' comes from no sample's row"
                with pytest.warns(UserWarning, match=says) as said:
                    watcher.step()
                assert said[0].filename == __file__
            else:
                watcher.step()
    assert list(watcher.trajectories.attrs["audit"]["outside"]) == ["layer.weight"]


def test_rows_that_cancel_in_torchs_own_sum_are_not_said_to_be_outside():
    """An instance norm undoes the scale of a convolution of one channel, whose gradient is rounding of 130,000 rows."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv3d(1, 4, 1, bias=False), nn.InstanceNorm3d(4), nn.LeakyReLU(), nn.Conv3d(4, 2, 3))
    x = torch.randn(4, 1, 32, 32, 32)
    with autospec.watch(model, list("abba"), statistics=["gradient"], quiet=True) as watcher:
        model(x).square().mean().backward()
        watcher.step()
    assert watcher.trajectories.attrs["audit"]["outside"] == {}


@pytest.mark.parametrize(("factor", "said"), [(1.001, 0), (1.1, 1)])
def test_a_record_that_is_not_that_of_float64_is_said_to_be_wrong_once(factor, said, monkeypatch):
    grams = Shares.grams
    monkeypatch.setattr(Shares, "grams", lambda *args: [(some, factor * gram) for some, gram in grams(*args)])
    model = smooth()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with autospec.watch(model, LABELS, audit=1, quiet=True) as watcher:
            for _ in range(3):
                model.zero_grad()
                loss_of(model(batch())).backward()
                watcher.step()
    sentences = [each for each in caught if "autospec is at fault" in str(each.message)]
    assert len(sentences) == said
    assert watcher.trajectories.attrs["audit"]["largest_error"] == pytest.approx(factor**0.5 - 1, rel=1e-3)
    for each in sentences:
        assert "of the gradients of '" in str(each.message)
        assert "off by 0.049 of the largest" in str(each.message)
        assert each.filename == __file__


def test_the_guard_knows_how_hundreds_of_groups_round():
    """Their shares point the same way: the gradient, one sum over all rows, is rounded like what is far larger than each of them."""
    torch.manual_seed(0)
    layer, groups = nn.Linear(30, 20), 600
    x = 1 + 0.1 * torch.randn(groups, 30)
    with (
        warnings.catch_warnings(),
        autospec.watch(layer, np.arange(groups), statistics=["gradient"], singular_values=1, quiet=True) as watcher,
    ):
        warnings.simplefilter("error")
        layer(x).sum().backward()
        watcher.step()
    audit = watcher.trajectories.attrs["audit"]
    assert audit["outside"] == {}
    assert 0 < audit["largest_guard_deviation"] < audit["guard_tolerance"]


@pytest.mark.parametrize("labels", [None, LABELS])
def test_an_unchanged_full_batch_has_the_same_spectrum_whether_or_not_it_was_kept(labels):
    model, x = smooth(), batch()
    with autospec.watch(model, labels) as watcher:
        for copied in (False, False, True):
            model.zero_grad()
            loss_of(model(x.clone() if copied else x)).backward()
            watcher.step()
    first, second, third = watcher.trajectories["layers/0.weight/activation"].values
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)


def test_an_unchanged_full_batch_is_decomposed_once(monkeypatch):
    sizes, solve = [], measure_module.singular_values

    def counting(grams):
        sizes.append(sum(gram.shape[:-2].numel() for gram in grams))
        return solve(grams)

    monkeypatch.setattr(measure_module, "singular_values", counting)
    model, x = nn.Linear(7, 5), batch()
    with autospec.watch(model, LABELS, statistics=["activation"], quiet=True) as watcher:
        for step in range(5):
            model.zero_grad()
            model(x.clone() if step == 4 else x).sum().backward()
            watcher.step()
    assert watcher.trajectories["layers/weight/activation"].notnull().all()
    assert sum(sizes) == 2 * 4  # the groups and the whole batch, for each of two inputs


def by_torch(x):
    x.mul_(1.01)


def by_numpy(x):
    x.numpy()[4, 2] += 0.01  # sample 4 is of group a


def rows_exchanged_by_numpy(x):
    x.numpy()[[0, 1]] = x.numpy()[[1, 0]].copy()


def columns_exchanged_within_two_rows(x):
    x.numpy()[0, [0, 1]] = x.numpy()[0, [1, 0]].copy()


def rows_and_columns_exchanged(x):
    x.numpy()[:5, :5] = x.numpy()[:5, :5].T.copy()


CHANGES = [by_torch, by_numpy, rows_exchanged_by_numpy, columns_exchanged_within_two_rows, rows_and_columns_exchanged]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("width", [7, 40])
def test_an_input_changed_in_place_is_noticed(change, width, monkeypatch):
    if change is by_torch:  # as on a GPU, where no checksum is taken
        monkeypatch.setattr("autospec.introspection.capture._checksum", lambda tensor: None)
    model, x = nn.Linear(width, 5), torch.randn(N, width)
    with autospec.watch(model, LABELS) as watcher:
        for step in range(2):
            if step:
                change(x)
            model.zero_grad()
            loss_of(model(x)).backward()
            watcher.step()
    expected = svdvals(x[np.array(LABELS) == "a"])[:5]
    tree = watcher.trajectories
    assert error(spectrum(tree, "weight", "activation", "a", step=1), expected) < 1e-6
    assert error(spectrum(tree, "weight", "activation", "a", step=0), expected) > 1e-6


def test_another_view_of_the_same_memory_is_another_input():
    model, x = nn.Linear(6, 5), torch.randn(6, 6)
    with autospec.watch(model, list("aabbcc"), batch_dim=0) as watcher:
        for data in (x, x.T):
            model.zero_grad()
            loss_of(model(data)).backward()
            watcher.step()
    expected = svdvals(x.T[:2])
    assert error(spectrum(watcher.trajectories, "weight", "activation", "a", step=1), expected) < 1e-6


def test_new_labels_on_the_same_input_give_new_spectra():
    model, x = smooth(), batch()
    with autospec.watch(model, LABELS) as watcher:
        for labels in (LABELS, LABELS[::-1]):
            watcher.set_groups(labels)
            model.zero_grad()
            loss_of(model(x)).backward()
            watcher.step()
    expected = svdvals(x[np.array(LABELS[::-1]) == "a"])
    assert error(spectrum(watcher.trajectories, "0.weight", "activation", "a", step=1), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("statistic", ["gradient", "activation", "adjoint"])
def test_the_noise_floor_is_positive_and_covers_the_rounding(statistic, dtype):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30)).to(dtype)
    x = torch.randn(N, 3, dtype=dtype) @ torch.randn(3, 30, dtype=dtype)  # rank 3 and rounding
    problem = Problem(model, x, lambda y: F.mse_loss(y, torch.zeros_like(y)), LABELS)
    tree = record(problem)
    floor = tree[f"layers/0.weight/{statistic}_noise_floor"]
    assert (floor > 0).all()
    assert (floor < 1e-4 * tree[f"layers/0.weight/{statistic}"].sel(index=1)).all()
    if statistic == "activation":
        beyond = tree["layers/0.weight/activation"].sel(index=slice(4, None))
        assert (beyond.fillna(0) < floor).all()


@pytest.mark.parametrize("shape", [(24, 7), (24, 5, 7)])
def test_the_rank_limit_is_that_of_the_smaller_side_or_of_the_rows(shape):
    labels = ["one"] + ["three"] * 3 + ["rest"] * 20
    tree = record(Problem(nn.Linear(7, 11), torch.randn(*shape), torch.Tensor.sum, labels))
    positions = shape[1] if len(shape) == 3 else 1
    expected = {"all": 7, "one": min(7, positions), "three": min(7, 3 * positions), "rest": 7}
    limit = tree["layers/weight/rank_limit"]
    assert {g: int(limit.sel(group=g)) for g in expected} == expected
