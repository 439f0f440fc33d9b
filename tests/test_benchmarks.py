"""What the benchmark compares with is right, and what is wrong is called wrong."""

import copy

import numpy as np
import pytest
import torch

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
