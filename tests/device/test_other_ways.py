"""What else asks for the gradients' shares, on another device: samples' own, permutation tests, check(), a training of the workflow."""

from __future__ import annotations

import contextlib
import copy
import importlib

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import autospec
from autospec import testing
from autospec.introspection.sample_shares import sample_shares
from autospec.statistics.permutation_test import permutation_test
from autospec.statistics.permutations import compare, draw_labellings
from tests.introspection.families import FAMILIES, LABELS, N, T, normal, weighted
from tests.study import Study

from .simulated import NAME, moved, without_float64
from .test_spectra import CASES, assert_same

LIMITED = {"float64": contextlib.nullcontext, "no float64": without_float64}


@pytest.fixture(params=LIMITED)
def limited(request):
    """The device, with float64 or without."""
    with LIMITED[request.param]():
        yield


@pytest.mark.parametrize("case", CASES)
def test_samples_have_the_shares_that_they_have_on_the_processor(case, limited):
    torch.manual_seed(0)
    made = FAMILIES[case]()
    expected = sample_shares(made.model, made.loss, N)
    made.model, made.x = moved(copy.deepcopy(made.model)), made.x.to(NAME)
    found = sample_shares(made.model, made.loss, N)
    some = torch.from_numpy(np.stack([np.arange(N) % 5 < 2, np.arange(N) == 3]).astype(float))
    assert found.keys() == expected.keys()
    for key, there in found.items():
        mine = there.weighted_sums(some.to(there.device)).cpu()
        whole = expected[key].weighted_sums(some)
        assert float((mine - whole).abs().max()) <= 1e-5 * float(whole.abs().max()), key


def test_permutation_tests_find_the_same(limited):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 6, bias=False), nn.Linear(6, 40)), torch.randn(30, 40)
    comparison = compare(["a", "b"] * 15, "a", "b")
    labellings = draw_labellings(comparison, 99, seed=0)

    def tables(model, x):
        shares = {0: sample_shares(model, lambda model: (model(x) - x).square().mean(), 30)}
        return permutation_test(shares, shares.get, comparison, labellings).table

    expected = tables(model, x)
    found = tables(moved(copy.deepcopy(model)), x.to(NAME))
    for column in ("p", "p_adjusted", "p_bh", "p_holm"):
        pd.testing.assert_series_equal(found[column], expected[column])


@pytest.mark.parametrize("case", ["Linear", "1-D network", "GRU, plain", "BERT", "Embedding, positions"])
def test_a_model_is_proved_on_the_device(case, limited):
    torch.manual_seed(0)
    made = FAMILIES[case]()
    report = testing.check(moved(made.model), made.x.to(NAME), LABELS, weighted, quiet=True)
    assert report.unchanged
    assert report.errors
    assert max(report.errors.values()) < testing.TOLERANCE


def recorded(model, x):
    """What is recorded of one step whose loss is scaled, of one of two micro-batches, and of a masked one."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with autospec.watch(model, LABELS, quiet=True, audit=1) as watcher:
        scaler.scale(weighted(model(x))).backward()
        watcher.step()
        model.zero_grad()
        for half in range(2):
            part = slice(half * N // 2, (half + 1) * N // 2)
            watcher.set_groups(LABELS[part])
            weighted(model(x[part])).backward()
        watcher.step()
        model.zero_grad()
        valid = np.arange(T) < np.arange(N)[:, None] % T + 1
        watcher.set_groups(LABELS, valid=valid)
        weighted(model(x) * torch.from_numpy(valid).to(x).unsqueeze(2)).backward()
        watcher.step()
    return watcher.trajectories


def test_scaled_losses_micro_batches_and_masks_give_the_same_record(limited):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)), normal(N, T, 7)
    assert_same(recorded(moved(copy.deepcopy(model)), x.to(NAME)), recorded(model, x))


@pytest.mark.parametrize("converged", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_components_are_those_of_the_processor(dtype, converged, monkeypatch):
    module = importlib.import_module("autospec.ica.moo_icar")
    generator = np.random.default_rng(0)
    references = generator.laplace(size=(5, 800))
    bold = generator.normal(size=(40, 5)) @ (references + generator.laplace(size=(5, 800))) + generator.normal(
        size=(40, 800)
    )
    expected = autospec.ica.moo_icar(bold, references, dtype=dtype, converged=converged)
    monkeypatch.setattr(module, "device_of", lambda device: torch.device(NAME))
    found = autospec.ica.moo_icar(bold, references, dtype=dtype, converged=converged)
    assert found.device == NAME
    tolerance = 1e-4 if dtype == "float32" else 1e-9
    for one, other in ((found.maps, expected.maps), (found.timecourses, expected.timecourses)):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


def test_training_of_the_workflow_gives_the_same_trajectories(limited, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    here, there = Study(tmp_path / "here"), Study(tmp_path / "there")
    here.make()
    monkeypatch.setattr("autospec.training.stage.chosen_device", lambda name: torch.device(NAME))
    there.make()
    for run in ("coder", "judge"):
        assert_same(*(autospec.open_trajectories(study.run(run)) for study in (there, here)))
        tables = [pd.read_csv(study.tests(run), sep="\t") for study in (there, here)]
        assert len(tables[0]) == len(tables[1])
