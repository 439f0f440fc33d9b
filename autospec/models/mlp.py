"""Multi-layer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from .common import ACTIVATIONS


def _layers(widths: Sequence[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class MLPAutoencoder(nn.Module):
    """Encoder, mirrored decoder, linear output.

    Parameters
    ----------
    shape : sequence of int
        Shape of one sample, which is flattened.
    hidden : sequence of int
        Widths of the encoder's layers; the decoder runs back through them.
    activation : {"relu", "sigmoid", "tanh"}
        Activation after every layer but the last.
    """

    def __init__(self, shape: Sequence[int], hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        features = math.prod(shape)
        self.encoder = _layers([features, *hidden], activation)
        self.decoder = _layers([*hidden[::-1], features], activation)[:-1]

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct samples, shape (samples, *shape)."""
        return self.decoder(self.encoder(x.flatten(1))).reshape(x.shape)


class MLPClassifier(nn.Module):
    """Encoder and a linear classifier.

    Parameters
    ----------
    shape : sequence of int
        Shape of one sample, which is flattened.
    classes : int
        Classes of the target.
    hidden : sequence of int
        Widths of the encoder's layers.
    activation : {"relu", "sigmoid", "tanh"}
        Activation after every hidden layer.
    """

    def __init__(self, shape: Sequence[int], classes: int, hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.encoder = _layers([math.prod(shape), *hidden], activation)
        self.classifier = nn.Linear(hidden[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities, shape (samples, classes)."""
        return self.classifier(self.encoder(x.flatten(1)))
