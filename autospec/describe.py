"""What a panel shows, in words: for the titles of figures and the headings of the report."""

from __future__ import annotations

import math
from typing import Any

ACTIVATIONS = {"relu": "ReLU", "sigmoid": "Sigmoid", "tanh": "Tanh"}
ARCHITECTURES = {
    "mlp": "MLP",
    "cnn1d": "1D CNN",
    "cnn2d": "2D CNN",
    "cnn3d": "3D CNN",
    "rnn": "RNN",
    "lstm": "LSTM",
    "bert": "BERT",
}


def architecture_words(architecture: str) -> str:
    """Name of an architecture; of a user's own, ``package.module:Class``, that of the class."""
    return ARCHITECTURES.get(architecture, architecture.rpartition(":")[2])


def network(panel: dict[str, Any]) -> str:
    """What was trained, in words: architecture, task, widths, activation."""
    widths = " x ".join(str(width) for width in panel["hidden"])
    architecture = architecture_words(panel["architecture"])
    return f"{architecture} {panel['task']}, hidden {widths}, {ACTIVATIONS[panel['activation']]}"


def content(panel: dict[str, Any]) -> str:
    """What a panel shows, in words: the network, and the groups that are compared or the positions."""
    if panel["compare"] is not None:
        return f"{network(panel)}: {panel['compare'][0]} against {panel['compare'][1]} ({panel['test']})"
    return f"{network(panel)}: along positions" if panel["by_position"] else network(panel)


def group_words(group: str, samples: int | None) -> str:
    """Name of a group with the number of samples that it was trained on, where that is known."""
    return group if samples is None else f"{group} (N = {samples})"


def effect_words(row: Any) -> str:
    """Size of an effect with its 95 % interval, from a row of a table of tests, or None."""
    return "–" if row is None else interval_words(row["effect_size"], row["effect_low"], row["effect_high"])


def interval_words(estimate: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval, or what there is instead of one."""
    if estimate is None or not math.isfinite(estimate):
        return "–"
    ends = [math.nan if end is None else end for end in (low, high)]
    if all(map(math.isinf, ends)):
        return f"{two_digits(estimate)} (too few labellings for an interval)"
    if any(map(math.isnan, ends)):
        return f"{two_digits(estimate)} (no interval)"
    return f"{two_digits(estimate)} ({two_digits(ends[0])} to {two_digits(ends[1])})"


def two_digits(number: float) -> str:
    """A number with two digits, or all of those before its point."""
    return f"{number:.0f}" if 100 <= abs(number) < math.inf else f"{number:.2g}"


MEASURES = {"accuracy": "accuracy", "explained": "variance explained"}


def performance_words(performance: dict[str, Any] | None) -> str:
    """How well a run did on held-out data, in words; empty where nothing was recorded of it."""
    if not performance:
        return ""
    if not performance.get("held_out"):
        return "no held-out data"
    measure = next(name for name in MEASURES if name in performance)
    chance = performance.get("chance")
    inside = [f"chance {chance:.2f}"] if measure == "accuracy" and chance is not None else []
    inside.append(f"N = {performance['held_out']}")
    value = performance[measure]
    # Near zero two decimals would not tell what is above chance from what is below.
    shown = f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"
    words = f"{MEASURES[measure]} {shown} ({', '.join(inside)})"
    if not performance.get("at_chance"):
        return f"held-out {words}"
    all_right = measure == "accuracy" and value == 1
    found = "too few held out to tell from chance" if all_right else "at chance on held-out data"
    return f"{found}, hence grey: {words}"


def data_words(dataset: dict[str, Any] | None) -> str:
    """What a reader must know of the data that a run was trained on, by the data set's own attributes; often nothing."""
    said = []
    if dataset and dataset.get("simulated"):
        said.append("simulated data")
    if dataset and dataset.get("stand_in_template"):
        said.append("stand-in template")
    if dataset and dataset.get("downsampled"):
        said.append(f"averaged into voxels of {' x '.join(f'{edge:g}' for edge in dataset['voxel_mm'])} mm")
    return ", ".join(said)
