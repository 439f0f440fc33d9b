"""What is said about held-out samples."""

import numpy as np
import pytest
import torch
from scipy import stats

from autospec import open_trajectories
from autospec.datasets.labelled import open_labelled
from autospec.paths import result
from autospec.training import open_snapshots
from autospec.training.performance import (
    autoencoder_performance,
    binomial_tail,
    classifier_performance,
    no_performance,
)


@pytest.mark.parametrize(("trials", "probability"), [(1, 0.5), (7, 0.25), (30, 0.55), (400, 0.5), (5000, 0.31)])
def test_the_binomial_tail_is_scipys(trials, probability):
    for successes in {0, 1, trials // 3, trials // 2, trials - 1, trials}:
        expected = stats.binomtest(successes, trials, probability, alternative="greater").pvalue
        assert binomial_tail(successes, trials, probability) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert binomial_tail(3, 3, 1.0) == 1.0
    assert binomial_tail(1, 3, 0.0) == 0.0


def test_a_classifier_is_compared_with_the_best_constant_answer():
    target = ["HC"] * 12 + ["SZ"] * 8
    subjects = [f"s{number}" for number in range(20)]
    constant = classifier_performance(np.array([label == "HC" for label in target]), target, subjects)
    assert (constant["accuracy"], constant["chance"], constant["at_chance"]) == (0.6, 0.6, True)
    good = classifier_performance(np.arange(20) != 3, target, subjects)
    assert good["p"] == pytest.approx(stats.binomtest(19, 20, 0.6, alternative="greater").pvalue)
    assert not good["at_chance"]


def test_scans_of_one_subject_do_not_make_many():
    """Four subjects of 10 scans: 40 right answers would be overwhelming, four are not."""
    target = ["HC"] * 20 + ["SZ"] * 20
    found = classifier_performance(np.ones(40, dtype=bool), target, np.repeat(["a", "b", "c", "d"], 10))
    assert (found["held_out"], found["subjects"], found["chance"]) == (40, 4, 0.5)
    assert found["p"] == pytest.approx(1 / 16)
    assert found["at_chance"]


def test_one_class_alone_is_at_chance():
    assert classifier_performance(np.ones(5, dtype=bool), ["HC"] * 5, list("abcde"))["at_chance"]


@pytest.mark.parametrize(
    ("error", "at_chance"), [(0.5, False), (1.0, True), (2.0, True), (np.nan, True), (np.inf, True)]
)
def test_an_autoencoder_is_compared_with_the_training_mean(error, at_chance):
    found = autoencoder_performance(error, 1.0, ["a", "b"])
    assert found["at_chance"] is at_chance
    assert found["explained"] == (1 - error if np.isfinite(error) else None)


def test_nothing_held_out_says_nothing():
    assert no_performance() == {"held_out": 0, "at_chance": None}


@pytest.mark.parametrize("run", ["coder", "judge"])
def test_what_is_recorded_is_what_the_kept_weights_give(study, run):
    """Computed again from the file of weights, in numpy's order of things."""
    kept = open_snapshots(study.folder / result("weights", experiment="small", run=run))
    tree = open_trajectories(study.run(run))
    samples = open_labelled(study.dataset)
    held = np.isin(samples["id"].values.astype(object), kept.held_out)
    assert held.sum() == 5
    x = torch.tensor(samples["x"].values[held])
    mean = samples["x"].values[~held].astype(float).mean(0)
    reference = np.square(samples["x"].values[held] - mean).mean()
    target = torch.tensor([["0", "1", "3"].index(label) for label in samples["target"].values[held]])
    model = kept.rebuild(str(study.dataset)).model
    for step in (*kept.steps, None):
        model.load_state_dict(kept.weights(step))
        with torch.no_grad():
            output = model(x)
        if run == "coder":
            loss = (output - x).square().mean().item()
            measure, value = "explained", 1 - loss / reference
        else:
            loss = torch.nn.functional.cross_entropy(output, target).item()
            measure, value = "accuracy", (output.argmax(1) == target).double().mean().item()
        if step is None:
            assert tree.attrs["performance"][measure] == pytest.approx(value, rel=1e-6)
            assert tree.attrs["performance"]["held_out"] == 5
        else:
            assert tree["training/held_out_loss"].values[step] == pytest.approx(loss, rel=1e-6)
            assert tree[f"training/held_out_{measure}"].values[step] == pytest.approx(value, rel=1e-6)
