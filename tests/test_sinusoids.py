"""Sinusoids: equal to the formula, with the frequencies and noise that were asked for, the same at every making."""

import copy

import numpy as np
import pytest
from scipy import stats

from autospec.datasets.labelled import group_labels, open_labelled
from autospec.datasets.sinusoids import build_sinusoids, make_sinusoids
from autospec.errors import UserError

SETTINGS = {
    "name": "waves",
    "classes": {"slow": {"frequency": 2.0, "phase": 0.3}, "fast": {"frequency": 7.5, "phase": -1.0}},
    "samples_per_class": 4,
    "time_points": 41,
    "noise": 0.0,
    "phase_jitter": 0.0,
    "seed": 3,
}


def test_without_noise_samples_are_those_of_the_formula(tmp_path):
    message = build_sinusoids(SETTINGS, str(tmp_path / "x.zarr.zip"))
    assert message == "waves: 8 samples (fast: 4, slow: 4), 41 time points"
    dataset = open_labelled(tmp_path / "x.zarr.zip")
    assert dataset["x"].dims == ("sample", "time", "feature")
    assert dataset["x"].shape == (8, 41, 1)
    assert dataset["x"].dtype == np.float32
    assert dataset["target"].values.tolist() == ["fast"] * 4 + ["slow"] * 4 == group_labels(dataset, "class")
    assert dataset["id"].values.tolist()[3:5] == ["fast-00003", "slow-00000"]
    for label, wave in SETTINGS["classes"].items():
        expected = [np.sin(2 * np.pi * wave["frequency"] * t / 41 + wave["phase"]) for t in range(41)]
        for sample in dataset["x"].values[dataset["target"].values == label]:
            np.testing.assert_allclose(sample[:, 0], expected, atol=1e-6)
    assert dataset.attrs["kind"] == "sinusoids"
    assert dataset.attrs["simulated"] is True
    assert dataset.attrs["classes"] == SETTINGS["classes"]


def test_fourier_analysis_finds_frequencies_phases_jitter_and_noise():
    settings = copy.deepcopy(SETTINGS)
    settings |= {"samples_per_class": 400, "time_points": 64, "noise": 0.5, "phase_jitter": 0.4}
    settings["classes"] = {
        label: {"frequency": f, "phase": p} for label, f, p in (("a", 3, 0.0), ("b", 11, 2.0), ("c", 31, -1.2))
    }
    x, labels = make_sinusoids(settings)
    spectrum = np.fft.rfft(x, axis=1)
    for label, wave in settings["classes"].items():
        mine = spectrum[np.array(labels) == label]
        assert (np.abs(mine)[:, 1:].argmax(1) + 1 == wave["frequency"]).all()
        # sin(a + p) has at its own frequency the Fourier coefficient T/2 exp(i (p - pi/2)), so the angles turn about p.
        turned = np.angle(mine[:, int(wave["frequency"])] * np.exp(1j * (np.pi / 2 - wave["phase"])))
        angle_of_noise = 0.5 / np.sqrt(64 / 2)
        spread = np.hypot(0.4, angle_of_noise)
        assert abs(turned.mean()) < 5 * spread / np.sqrt(400)
        low, high = stats.chi2.interval(1 - 1e-6, 399)
        assert low < 399 * turned.var(ddof=1) / spread**2 < high
        others = np.delete(mine, [0, int(wave["frequency"])], axis=1)[:, :-1]  # without mean, signal and Nyquist
        # Their power is noise alone: twice each, over the variance, has 2 degrees of freedom.
        low, high = stats.chi2.interval(1 - 1e-6, 2 * others.size)
        assert low < 2 * (np.abs(others) ** 2).sum() / (64 * 0.5**2) < high


def test_the_same_settings_give_the_same_bytes_in_whatever_order_and_another_seed_gives_others(tmp_path):
    settings = {**SETTINGS, "noise": 0.1, "phase_jitter": 0.2}
    turned = {**settings, "classes": dict(reversed(settings["classes"].items()))}
    made = []
    for number, each in enumerate((settings, turned, {**settings, "seed": 4})):
        build_sinusoids(each, str(tmp_path / f"{number}.zarr.zip"))
        made.append((tmp_path / f"{number}.zarr.zip").read_bytes())
    assert made[0] == made[1] != made[2]


def test_no_two_samples_or_classes_share_their_random_numbers():
    alike = {"frequency": 2.0, "phase": 0.0}
    x, _ = make_sinusoids({**SETTINGS, "classes": {"a": alike, "b": alike}, "noise": 1.0, "samples_per_class": 30})
    correlation = np.corrcoef(x - x.mean(0))
    assert np.abs(correlation[~np.eye(60, dtype=bool)]).max() < 0.8
    assert len(np.unique(x)) == x.size


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": {}}, "waves has no classes"),
        ({"samples_per_class": 0}, "samples_per_class 0 and time_points 41"),
        ({"time_points": 1}, "samples_per_class 4 and time_points 1"),
        ({"noise": -0.1}, r"noise of waves is -0\.1: a standard deviation"),
        ({"phase_jitter": float("nan")}, "phase_jitter of waves is nan"),
        ({"time_points": 15}, r"class 'fast' of waves is 7\.5 cycles, but 15 time points can show 0 to less than 7\.5"),
        ({"classes": {"a": {"frequency": -1.0, "phase": 0.0}}}, "class 'a' of waves is -1 cycles"),
        ({"classes": {"a": {"frequency": 1.0, "phase": float("inf")}}}, "the phase of class 'a' of waves is inf"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(tmp_path, change, said):
    with pytest.raises(UserError, match=said) as caught:
        build_sinusoids({**SETTINGS, **change}, str(tmp_path / "x.zarr.zip"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.zarr.zip").exists()
