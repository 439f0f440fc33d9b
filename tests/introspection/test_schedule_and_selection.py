"""Which steps, layers, statistics and singular values are recorded."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import autospec
from autospec.introspection.measure import Measurement
from autospec.introspection.schedule import make_schedule

from .oracle import Problem, assert_exact, assert_shares, error, factors, members, record, spectrum, svdvals

N = 12
LABELS = ["a", "b", "b"] * 4


def loss_of(output):
    return (output * torch.linspace(-1, 2, output.shape[-1], dtype=output.dtype)).tanh().square().mean()


def problem():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 9))
    return Problem(model, torch.randn(N, 7), loss_of, LABELS)


def train(**options):
    chosen = problem()
    optimizer = torch.optim.SGD(chosen.model.parameters(), lr=0.5)
    with autospec.watch(chosen.model, LABELS, **options) as watcher:
        for _ in range(10):
            optimizer.zero_grad()
            chosen.loss().backward()
            watcher.step()
            optimizer.step()
    return watcher.trajectories


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(range(10))),
        ({"every": 3}, [0, 3, 6, 9]),
        ({"every": np.int64(4)}, [0, 4, 8]),
        ({"every": 100}, [0]),
        ({"steps": [7, 2, 2, 50]}, [2, 7]),
        ({"steps": (step for step in (1, 5))}, [1, 5]),
        ({"steps": lambda step: step in (0, 1, 2, 4, 8)}, [0, 1, 2, 4, 8]),
        ({"steps": [30]}, []),
    ],
    ids=["every", "every 3", "numpy 4", "first only", "list", "generator", "callable", "never"],
)
def test_the_schedule_chooses_the_steps_and_each_is_that_of_the_full_record(options, expected):
    tree, full = train(**options), train()
    assert tree.step.values.tolist() == expected
    for path in ("layers/0.weight/gradient", "layers/4.weight/adjoint", "layers/2.weight/activation"):
        np.testing.assert_array_equal(tree[path].values, full[path].sel(step=expected).values)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["0.weight", "2.weight", "4.weight"]),
        (["2.weight"], ["2.weight"]),
        (["4.*", "0.*"], ["0.weight", "4.weight"]),
        (["[02].weight"], ["0.weight", "2.weight"]),
    ],
)
def test_layers_are_selected_by_name_or_pattern(layers, expected):
    tree = record(problem(), layers=layers)
    assert sorted(tree["layers"].children) == expected
    table = members(LABELS, N)
    for name in expected:
        share = {group: spectrum(tree, name, "gradient", group) for group in table}
        full = record(problem())
        for group in table:
            np.testing.assert_array_equal(share[group], spectrum(full, name, "gradient", group))


@pytest.mark.parametrize("layers", [None, ["2.weight"], ["0.*"]])
def test_a_module_that_stands_in_two_places_has_the_names_of_both(layers):
    twice = nn.Linear(5, 5)
    chosen = Problem(nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh()), torch.randn(N, 5), loss_of, LABELS)
    tree = record(chosen, layers=layers)
    assert list(tree["layers"].children) == ["0.weight"]
    assert tree["layers/0.weight"].attrs["also"] == ["2.weight"]
    assert_shares({2e-5: tree}, chosen, members(LABELS, N))


def test_a_layer_without_outputs_or_inputs_has_no_matrix():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outputs, self.inputs = nn.Linear(7, 3), nn.Linear(7, 0), nn.Linear(0, 3)

        def forward(self, x):
            return torch.cat([self.inner(x) + self.inputs(x[:, :0]), self.outputs(x)], 1)

    chosen = Problem(Nothing(), torch.randn(N, 7), loss_of, LABELS)
    tree = record(chosen)
    assert list(tree["layers"].children) == ["inner.weight"]
    assert_exact(tree, chosen, members(LABELS, N))


@pytest.mark.parametrize("statistics", [["gradient"], ["activation"], ["adjoint", "gradient"]], ids=str)
def test_a_subset_of_the_statistics_is_recorded_alone_and_as_exactly(statistics):
    chosen = problem()
    tree = record(chosen, statistics=statistics)
    variables = {s for s in tree["layers/0.weight"].data_vars if not s.endswith("floor")}
    assert variables == {*statistics, "rank_limit"}
    assert_exact(tree, chosen, members(LABELS, N), statistics)


@pytest.mark.parametrize(
    ("singular_values", "expected"),
    [
        (None, {"0.weight": [1, 2, 3, 4, 5], "4.weight": [1, 2, 3]}),
        (2, {"0.weight": [1, 2], "4.weight": [1, 2]}),
        (4, {"0.weight": [1, 2, 3, 4], "4.weight": [1, 2, 3]}),
        (np.int64(2), {"0.weight": [1, 2], "4.weight": [1, 2]}),
        ([3, 1], {"0.weight": [1, 3], "4.weight": [1, 3]}),
        (np.arange(1, 5), {"0.weight": [1, 2, 3, 4], "4.weight": [1, 2, 3]}),
        ("all", {"0.weight": list(range(1, 8)), "4.weight": list(range(1, 10))}),
    ],
    ids=str,
)
def test_the_index_counts_from_one_and_names_the_value(singular_values, expected):
    chosen = problem()
    tree = record(chosen, singular_values=singular_values)
    rows = factors(chosen)
    for layer, index in expected.items():
        node = tree[f"layers/{layer}"]
        assert node.index.values.tolist() == index
        a, d, _ = rows[layer]
        for statistic, matrix in (("gradient", d.T @ a), ("activation", a), ("adjoint", d)):
            exact = svdvals(matrix)
            keeps_all = isinstance(singular_values, str)
            limit = len(exact) if keeps_all and statistic != "gradient" else min(node.attrs["shape"])
            for k in index:
                value = float(node[statistic].sel(group="all", index=k)[0])
                if k <= min(limit, len(exact)):
                    assert abs(value - exact[k - 1]) < 1e-6 * exact[0]
                else:
                    assert np.isnan(value)


def test_values_beyond_the_rows_of_a_group_are_nan_and_no_zeros():
    chosen = problem()
    chosen.labels = ["a"] * 2 + ["b"] * 10
    node = record(chosen)["layers/0.weight"]
    assert node["activation"].sel(group="a", index=[1, 2]).notnull().all()
    assert node["activation"].sel(group="a", index=[3, 4, 5]).isnull().all()
    assert node["adjoint"].sel(group="a", index=[3, 4, 5]).isnull().all()
    assert node["gradient"].sel(group="b").notnull().all()


class OwnMatrix(nn.Module):
    """A layer without a rule."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return x @ self.matrix.T


def test_layers_without_a_rule_are_skipped_on_request_and_the_linear_layer_is_exact():
    torch.manual_seed(0)
    model = nn.Sequential(OwnMatrix(8, 6), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 6, 4))
    chosen = Problem(model, torch.randn(N, 2, 8), loss_of, LABELS)
    assert list(record(chosen)["layers"].children) == ["0.matrix", "3.weight"]
    for options in ({"unknown": "skip"}, {"layers": ["3.weight"]}):
        tree = record(chosen, **options)
        assert list(tree["layers"].children) == ["3.weight"]
        assert_exact(tree, chosen, members(LABELS, N))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["!0.*"], ["2.weight", "4.weight"]),
        (["2.*", "!*.bias*", "4.weight"], None),
        (["*", "!2.weight", "!4.*"], ["0.weight"]),
    ],
)
def test_layers_are_left_out_by_name(layers, expected):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    chosen = Problem(model, torch.randn(N, 8), loss_of, LABELS)
    if expected is None:
        with pytest.raises(autospec.introspection.WatchError, match=r"'\*\.bias\*', but the model has no such matrix"):
            record(chosen, layers=layers)
        return
    assert list(record(chosen, layers=layers)["layers"].children) == expected


def test_a_name_with_brackets_is_a_name():
    model = nn.Sequential()
    for name, layer in {"first": nn.Linear(8, 6), "tanh": nn.Tanh(), "sex[m]": nn.Linear(6, 4)}.items():
        model.add_module(name, layer)
    tree = record(Problem(model, torch.randn(N, 8), loss_of, LABELS), layers=["sex[m].weight"])
    assert list(tree["layers"].children) == ["sex[m].weight"]


def begin_to_learn(chosen):
    with autospec.watch(chosen.model, LABELS, quiet=True) as watcher:
        chosen.model.positions.requires_grad_()
        chosen.loss().backward()
        watcher.step()


@pytest.mark.parametrize("frozen", [True, False])
def test_positions_that_do_not_learn_or_are_one_row_are_no_unknown_matrices(frozen):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            shape = (3, 8) if frozen else (1, 3, 8)
            self.positions, self.layer = nn.Parameter(torch.randn(shape), not frozen), nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x + self.positions).mean(1)

    model = Positions()
    chosen = Problem(model, torch.randn(N, 3, 8), loss_of, LABELS)
    tree = record(chosen)
    assert list(tree["layers"].children) == ["layer.weight"]
    assert_exact(tree, chosen, members(LABELS, N))
    if not frozen:
        return
    with pytest.warns(UserWarning, match=r"\['positions'\] came to the model, or began to learn, within the block"):
        begin_to_learn(chosen)


def test_torchscript_without_matrices_does_not_matter():
    model = nn.Sequential(nn.Linear(8, 6), torch.jit.script(nn.Tanh()), nn.Linear(6, 4))
    chosen = Problem(model, torch.randn(N, 8), loss_of, LABELS)
    plain = Problem(nn.Sequential(model[0], nn.Tanh(), model[2]), chosen.x, loss_of, LABELS)
    assert_exact(record(chosen), plain, members(LABELS, N))


def test_a_weight_shared_with_a_layer_without_a_rule_is_left_out_on_request():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.inner, self.head = OwnMatrix(4, 5), nn.Linear(4, 4), nn.Linear(4, 5)
            self.head.weight = self.own.matrix

        def forward(self, x):
            return self.head(torch.tanh(self.inner(x))) + self.own(x)

    chosen = Problem(Tied(), torch.randn(N, 4), loss_of, LABELS)
    assert list(record(chosen)["layers"].children) == ["own.matrix", "inner.weight"]
    tree = record(chosen, unknown="skip")
    assert list(tree["layers"].children) == ["inner.weight"]
    recorded = spectrum(tree, "inner.weight", "gradient")
    a, d, _ = factors(chosen)["inner.weight"]
    assert error(recorded, svdvals(d.T @ a)) < 1e-6


class Clock:
    """Time that passes when it is told to; recording a step takes two seconds, training one."""

    def __init__(self, monkeypatch, extra=2.0):
        self.now, self.extra = 100.0, extra
        record_step = Measurement.record

        def slow(measurement, *args):
            self.now += self.extra
            return record_step(measurement, *args)

        monkeypatch.setattr(Measurement, "record", slow)
        for module in ("watcher", "capture"):
            clocks = SimpleNamespace(perf_counter=lambda: self.now, process_time=lambda: self.now)
            monkeypatch.setattr(f"autospec.introspection.{module}.time", clocks)

    def train(self, steps, training=1.0, state=None, **options):
        chosen = problem()
        watcher = autospec.watch(chosen.model, LABELS, quiet=True, **options)
        if state is not None:
            watcher.load_state_dict(json.loads(json.dumps(state)))
        with watcher:
            for step in range(steps):
                chosen.model.zero_grad()
                chosen.loss().backward()
                self.now += training(step) if callable(training) else training
                watcher.step()
        return watcher


@pytest.mark.parametrize(
    "steps",
    [
        [0, 20, 10],
        range(0, 21, 10),
        np.arange(0, 30, 10.0),
        torch.arange(0, 30, 10),
        [torch.tensor(0), np.array(10), 20.0],
        xr.DataArray([0, 10, 20], dims="step"),
        (step for step in (0, 10, 20)),
        {0, 10, 20},
    ],
    ids=lambda steps: type(steps).__name__,
)
def test_steps_may_be_listed_in_every_way_that_numbers_are(steps):
    schedule = make_schedule(steps=steps)
    assert [step for step in range(40) if schedule(step)] == [0, 10, 20]


@pytest.mark.parametrize("budget", [0.1, 0.25, 3.0])
def test_a_budget_chooses_every_kth_step_once_and_keeps_to_it(monkeypatch, budget):
    clock, steps = Clock(monkeypatch), 200
    watcher = clock.train(steps, budget=budget)
    tree = watcher.trajectories
    schedule = tree.attrs["schedule"]
    assert schedule["budget"] == budget
    every, calibration = schedule["every"], schedule["calibration_steps"]
    assert every == max(1, np.ceil(2 / budget))
    assert calibration[0] == 0
    end = max(calibration) + 1
    assert end <= 10
    assert tree.step.values.tolist() == calibration + [step for step in range(end, steps) if step % every == 0]
    after = tree.step.values[tree.step.values >= end]
    assert 2.0 * len(after) <= 1.05 * budget * (steps - end)
    assert watcher.cost == {
        "steps": steps,
        "recorded": len(tree.step),
        "seconds": steps + 2.0 * len(tree.step),
        "watching_seconds": 2.0 * len(tree.step),
    }


@pytest.mark.parametrize("dear", [4, 5])
def test_a_budget_goes_by_the_dearest_step_of_its_calibration(monkeypatch, dear):
    clock = Clock(monkeypatch)

    def training(step):
        clock.extra = 3.0 if step == dear else 2.0
        return 1.0

    assert clock.train(10, training=training, budget=0.1).trajectories.attrs["schedule"]["every"] == 30


def test_a_budget_counts_decompositions_that_are_otherwise_put_off(monkeypatch):
    clock, solve = Clock(monkeypatch, extra=0.0), Measurement._solve

    def slow(jobs):
        clock.now += 2.0 * bool(jobs)
        solve(jobs)

    monkeypatch.setattr(Measurement, "_solve", staticmethod(slow))
    assert clock.train(10, budget=0.1).trajectories.attrs["schedule"]["every"] == 20


def test_a_schedule_chosen_by_a_budget_is_frozen_whatever_steps_take_later(monkeypatch):
    clock = Clock(monkeypatch)
    watcher = clock.train(80, training=lambda step: 1.0 if step < 10 else 0.01, budget=0.1)
    assert watcher.trajectories.attrs["schedule"]["every"] == 20
    assert watcher.trajectories.step.values.tolist()[-3:] == [20, 40, 60]


def test_watching_that_costs_nothing_records_every_step(monkeypatch):
    tree = Clock(monkeypatch, extra=0.0).train(15, budget=0.1).trajectories
    assert tree.attrs["schedule"]["every"] == 1
    assert tree.step.values.tolist()[-9:] == list(range(6, 15))


def test_a_schedule_chosen_by_a_budget_belongs_to_the_checkpoint(monkeypatch):
    clock = Clock(monkeypatch)
    state = clock.train(30, budget=0.1).state_dict()
    tree = clock.train(30, training=1000.0, state=state, budget=0.1).trajectories
    assert tree.attrs["schedule"]["every"] == 20
    assert tree.step.values.tolist()[-2:] == [20, 40]


@pytest.mark.parametrize(("at", "budget"), [*((k, 0.1) for k in range(1, 8)), (4, None), (30, None)])
def test_a_budget_chooses_after_resuming_at_whatever_step(monkeypatch, at, budget):
    clock = Clock(monkeypatch)
    state = clock.train(at, budget=budget).state_dict()
    tree = clock.train(60, state=state, budget=0.1).trajectories
    assert tree.attrs["schedule"]["every"] == 20
    calibrated = at if budget is None or at < 6 else 0
    assert tree.attrs["schedule"]["calibration_steps"] == [calibrated, calibrated + 4, calibrated + 5]
    later = tree.step.values[tree.step.values > max(at, calibrated + 5)]
    assert len(later)
    assert (later % 20 == 0).all()


def test_a_training_too_short_for_the_calibration_says_that_nothing_was_chosen(monkeypatch):
    tree = Clock(monkeypatch).train(3, budget=0.1).trajectories
    assert tree.attrs["schedule"]["every"] is None
    assert tree.step.values.tolist() == [0]


def test_a_budget_is_kept_by_the_real_clock():
    chosen = problem()
    with autospec.watch(chosen.model, LABELS, quiet=True, budget=0.5) as watcher:
        for _ in range(60):
            chosen.model.zero_grad()
            chosen.loss().backward()
            watcher.step()
    every = watcher.trajectories.attrs["schedule"]["every"]
    assert every > 1  # a tiny model's step takes less than recording it
    assert len(watcher.trajectories.step) <= 6 + 60 // every


def test_the_cost_is_told_at_the_end_of_the_block_unless_it_is_to_be_quiet(monkeypatch, capsys):
    Clock(monkeypatch).train(4)
    assert capsys.readouterr().err == ""
    chosen = problem()
    with autospec.watch(chosen.model, LABELS) as watcher:
        chosen.loss().backward()
        watcher.step()
    told = capsys.readouterr().err
    assert told.startswith("autospec: recorded 1 of 1 steps, 3 matrices, 3 groups; watching took ")
    assert told.count("\n") == 1
