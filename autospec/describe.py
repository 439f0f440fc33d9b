"""What a panel shows, in words: for the titles of figures and the headings of the report."""

from __future__ import annotations

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


ARCHITECTURES = {
    "mlp": "MLP",
    "cnn1d": "1D CNN",
    "cnn2d": "2D CNN",
    "cnn3d": "3D CNN",
    "rnn": "RNN",
    "lstm": "LSTM",
    "bert": "BERT",
}


def content(panel: dict[str, Any]) -> str:
    """What a panel shows, in words: architecture, task, widths, activation, groups."""
    widths = " x ".join(str(width) for width in panel["hidden"])
    architecture = ARCHITECTURES.get(panel["architecture"], panel["architecture"])
    words = f"{architecture} {panel['task']}, hidden {widths}, {ACTIVATIONS[panel['activation']]}"
    return words if panel["compare"] is None else f"{words}: {panel['compare'][0]} against {panel['compare'][1]}"
