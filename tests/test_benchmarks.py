"""What the benchmark compares with is right, and what is wrong is called wrong."""

import copy

import numpy as np
import pytest
import torch

from autospec import specs
from autospec.config import parse_config, read_yaml
from autospec.training import prepare
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", ["cnn1d", "lstm", "bert-linear", "bert-stock"])
def test_the_oracle_computes_what_torch_computes(name):
    from contestants import as_matrix, as_rows, layers_of
    from models import CASES, matrices_of
    from oracle import Products, plainly

    torch.manual_seed(0)
    model = CASES[name].make_model().double()
    x = torch.randn(3, 53, 7, dtype=torch.float64)
    x = x if name == "cnn1d" else x.mT
    twin = copy.deepcopy(model)
    matrices, layers, products = matrices_of(twin), layers_of(twin), Products(twin)
    plainly(twin, products)
    expected, output = model(x), twin(x)
    assert torch.allclose(output, expected, atol=1e-12)
    expected.square().sum().backward()
    for parameter, (weight, own) in zip(matrices_of(model).values(), matrices.items(), strict=True):
        if own.ndim > 2:
            continue  # the channels at each position are not a convolution's true factor
        adjoints = torch.autograd.grad(output.square().sum(), products.outputs[weight], retain_graph=True)
        share = sum(
            (as_rows(layers[weight], d).T @ as_rows(layers[weight], a))
            if weight in layers
            else d.flatten(0, -2).T @ a.flatten(0, -2)
            for a, d in zip(products.inputs[weight], adjoints, strict=True)
        )
        assert torch.allclose(share, as_matrix(parameter.grad), atol=1e-10), weight


@pytest.mark.parametrize("name", ["mlp", "cnn1d"])
def test_the_least_work_is_done_on_the_factors_of_the_step_and_has_every_part(name):
    from bounds import Work, factors_of
    from contestants import Contestant, layers_of, weight_gradient
    from models import CASES, Batch

    torch.manual_seed(0)
    case = CASES[name]
    x = torch.rand(12, 784) if name == "mlp" else torch.randn(12, 53, 9)
    target = x if name == "mlp" else torch.arange(12) % 2
    batch = Batch(x, target, ["a", "b", "b"] * 4)
    plain = Contestant(case, case.make_model(), batch, ("gradient",))
    plain.open()
    for weight, (activation, adjoint) in factors_of(plain).items():
        layer = layers_of(plain.model)[weight]
        expected = layer.weight.grad
        assert torch.allclose(weight_gradient(layer, activation, adjoint).reshape(expected.shape), expected, atol=1e-6)
    parts = Work(plain, batch, rows_too=False).parts()
    assert list(parts) == ["sorting", "products", "Gram matrices", "eigenvalues"]
    # each layer's batch is a product less; a share of fewer rows than columns has the values of its rows' matrix
    assert sum(len(stack) for stack in parts["eigenvalues"]()) == 3 * len(layers_of(plain.model))
    sides = 2 * len(layers_of(plain.model)) - 1  # of the factors; the input stays the same
    more = Work(plain, batch, rows_too=True).parts()
    assert sum(len(stack) for stack in more["eigenvalues"]()) == 3 * (len(layers_of(plain.model)) + sides)
    assert len(more["Gram matrices"]()) > len(parts["Gram matrices"]())


def test_who_can_record_what():
    from contestants import CONTESTANTS
    from models import CASES, Batch

    def able(contestant, model, *statistics):
        x = torch.zeros(2, 3)
        case = CASES[model]
        return CONTESTANTS[contestant](case, case.make_model(), Batch(x, x, ["a", "b"]), statistics).able()

    assert able("hooks", "cnn3d", "gradient", "activation", "adjoint")
    assert able("sub-batch", "lstm", "gradient")
    assert able("backpack", "lstm", "gradient")
    assert not able("hooks", "lstm", "gradient")
    assert not able("hooks", "bert-stock", "gradient")
    assert not able("backpack", "bert-stock", "gradient")
    assert not able("sub-batch", "lstm", "gradient", "activation", "adjoint")


def test_the_cohort_is_unbalanced_and_fixed():
    from models import cohort

    x, target, labels = cohort(146, 2)
    assert dict(zip(*np.unique(labels, return_counts=True), strict=True)) == {
        "SZ & M": 58,
        "SZ & F": 14,
        "HC & M": 51,
        "HC & F": 23,
    }
    assert target.sum() == 72
    assert (x == cohort(146, 2)[0]).all()


def test_wrong_numbers_and_a_changed_training_are_found(monkeypatch, tmp_path):
    import contestants
    import cost

    class Wrong(contestants.Hooks):
        def keep(self, name, statistic, matrices):
            super().keep(name, statistic, [matrices[0], *(1.01 * share for share in matrices[1:])])

    class Meddling(contestants.Hooks):
        def backward(self):
            super().backward()
            next(self.model.parameters()).grad.mul_(1 + 1e-3)

    job = {"model": "mlp", "device": "cpu", "data": str(tmp_path / "mlp.npz"), "statistics": "gradient"}
    cost.make_data(job)
    threads = torch.get_num_threads()
    verdicts = {}
    for contestant in (contestants.Hooks, Wrong, Meddling):
        monkeypatch.setitem(contestants.CONTESTANTS, "tried", contestant)
        verdicts[contestant] = cost.check(job | {"contestant": "tried"}).get("verdict")
    torch.set_num_threads(threads)
    assert verdicts[contestants.Hooks] is None
    assert verdicts[Wrong] == "wrong, off by 1e-02"
    assert verdicts[Meddling].startswith("wrong")


def test_the_permutation_benchmark_measures_every_part():
    import permutations

    def small():
        return permutations.chain(6, 3, 6), torch.randn(20, 6)

    asked = {"headline": ("contrast",), "two": ("contrast", "distance")}
    found = permutations.seconds_of(small, asked, permutations=9, measured=2, steps=4)
    assert set(found) == set(asked)
    for taken in found.values():
        assert set(taken) == {"all", "shares", "statistics", "eigenvalues", "tables"}
        assert all(seconds > 0 for seconds in taken.values())
        assert taken["eigenvalues"] < taken["statistics"]
    assert found["headline"]["shares"] == found["two"]["shares"]
    model, x = permutations.series()
    assert model(x).shape == x.shape


@pytest.mark.parametrize("name", ["mnist_mlp", "sinusoids_rnn", "freesurfer_mlp", "timeseries_lstm", "maps_cnn3d"])
def test_the_battery_builds_data_sets_that_a_training_reads(monkeypatch, tmp_path, name):
    import battery

    monkeypatch.setitem(battery.SHAPES, "maps", dict(zip(battery.SHAPES["maps"], (6, 5, 4), strict=True)))
    config = parse_config(read_yaml(ROOT / "configs/paper.yaml"))
    dataset = config.experiments[name].dataset
    path = str(tmp_path / "data.zarr.zip")
    battery.build(config, dataset, path)
    settings = specs.run_settings(config, name, "classifier_32_relu")
    prepared = prepare(settings, path, torch.device("cpu"))
    kind = config.datasets[dataset].kind
    if kind in battery.SHAPES:
        assert prepared.x.shape == (157, *battery.SHAPES[kind].values())
        assert prepared.classes == ("HC", "SZ")
    assert prepared.attributes.get("kind") == kind
    assert len(set(prepared.labels[next(iter(prepared.labels))])) == len(prepared.classes)
    assert prepared.model(prepared.x[:2]).shape == (2, len(prepared.classes))


def test_the_battery_prints_each_experiment_when_it_is_measured(monkeypatch, capsys):
    import battery

    def measured(config, chosen, results):
        costs = {"training": 30.0, "introspection": 60.0, "input_output": 20.0, "start_up": 10.0}
        yield chosen[0], [battery.Cost(costs, 10, 5, 0.25, 0.5)] * 2
        assert "| mnist_mlp | 2 | 10 | 5 | 250 | 500 | 4 | 25 % | 50 % | 17 % | 8 % |" in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(battery, "recorded", measured)
    monkeypatch.setattr("sys.argv", ["battery.py", str(ROOT / "configs/paper.yaml"), "--results", "results"])
    with pytest.raises(KeyboardInterrupt):
        battery.main()
