"""Sinusoids as a labelled data set: [sample, time, feature], one frequency and phase a class."""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np
import xarray as xr

from autospec.datasets.labelled import labelled, write_labelled
from autospec.errors import UserError


class SinusoidClass(TypedDict):
    """What makes a class."""

    frequency: float
    """Cycles over the window."""
    phase: float
    """Radians at the first time point."""


class SinusoidSettings(TypedDict):
    """What the stage reads from the configuration."""

    name: str
    classes: dict[str, SinusoidClass]
    samples_per_class: int
    time_points: int
    noise: float
    """Standard deviation of the noise at each time point; the sinusoids have amplitude 1."""
    phase_jitter: float
    """Standard deviation of a sample's phase about its class's, in radians."""
    seed: int


def make_sinusoids(settings: SinusoidSettings) -> tuple[np.ndarray, list[str]]:
    """Draw the samples.

    A sample of a class is ``sin(2 pi frequency t / T + phase + jitter) + noise`` at t = 0 to T - 1, with T time points and a
    jitter for the whole sample.  Classes are taken in the order of their names, each with random numbers of its own.

    Parameters
    ----------
    settings : SinusoidSettings

    Returns
    -------
    x : ndarray, shape (samples, time_points)
    labels : list of str
        Class of each sample.

    Raises
    ------
    UserError
        If the settings ask for what cannot be drawn.
    """
    _require_possible(settings)
    samples, time_points = settings["samples_per_class"], settings["time_points"]
    turns = 2 * math.pi * np.arange(time_points) / time_points
    parts = []
    names = sorted(settings["classes"])
    for number, name in enumerate(names):
        random = np.random.default_rng([settings["seed"], number])
        wave = settings["classes"][name]
        phases = wave["phase"] + settings["phase_jitter"] * random.standard_normal((samples, 1))
        noise = settings["noise"] * random.standard_normal((samples, time_points))
        parts.append(np.sin(wave["frequency"] * turns + phases) + noise)
    return np.concatenate(parts), [name for name in names for _ in range(samples)]


def build_sinusoids(settings: SinusoidSettings, output: str) -> str:
    """Build a data set of sinusoids and write it.

    Parameters
    ----------
    settings : SinusoidSettings
    output : str
        The ``.zarr.zip`` file to write.

    Returns
    -------
    str
        One line that says what was built.

    Raises
    ------
    UserError
        If the settings ask for what cannot be drawn.
    """
    x, labels = make_sinusoids(settings)
    dataset = _arranged(x, labels, settings)
    write_labelled(dataset, output)
    counts = ", ".join(f"{name}: {settings['samples_per_class']}" for name in sorted(settings["classes"]))
    return f"{settings['name']}: {len(labels)} samples ({counts}), {settings['time_points']} time points"


def _arranged(x: np.ndarray, labels: list[str], settings: SinusoidSettings) -> xr.Dataset:
    samples = settings["samples_per_class"]
    return labelled(
        x[:, :, np.newaxis],
        ("time", "feature"),
        ids=[f"{label}-{i % samples:05d}" for i, label in enumerate(labels)],
        target=labels,
        groupings={"class": labels},
        attributes={
            "kind": "sinusoids",
            "source": "sin(2 pi frequency t / T + phase + jitter) + noise",
            "simulated": True,
            "classes": {
                name: {"frequency": wave["frequency"], "phase": wave["phase"]}
                for name, wave in sorted(settings["classes"].items())
            },
            "noise": settings["noise"],
            "phase_jitter": settings["phase_jitter"],
            "seed": settings["seed"],
        },
    )


def _require_possible(settings: SinusoidSettings) -> None:
    name, time_points = settings["name"], settings["time_points"]
    if not settings["classes"]:
        raise UserError(f"{name} has no classes: give each a name, a frequency and a phase.")
    if settings["samples_per_class"] < 1 or time_points < 2:
        raise UserError(
            f"{name} has samples_per_class {settings['samples_per_class']} and time_points {time_points}: "
            "at least 1 sample and 2 time points are needed."
        )
    for key, value in (("noise", settings["noise"]), ("phase_jitter", settings["phase_jitter"])):
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{key} of {name} is {value}: a standard deviation is 0 or more.")
    for label, wave in settings["classes"].items():
        if not 0 <= wave["frequency"] < time_points / 2:
            raise UserError(
                f"the frequency of class '{label}' of {name} is {wave['frequency']:g} cycles, but {time_points} time points "
                f"can show 0 to less than {time_points / 2:g}: lower it, or raise time_points."
            )
        if not math.isfinite(wave["phase"]):
            raise UserError(f"the phase of class '{label}' of {name} is {wave['phase']}: give radians.")
