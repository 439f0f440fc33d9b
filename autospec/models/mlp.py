"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def _layers(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers)


class MLPAutoencoder(nn.Module):
    """Encoder, mirrored decoder, linear output.

    Parameters
    ----------
    features : int
        Numbers a sample.
    hidden : sequence of int
        Widths of the encoder's layers; the decoder runs back through them.
    activation : type of nn.Module
        Activation after every layer but the last.
    """

    def __init__(self, features: int, hidden: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.encoder = _layers([features, *hidden], activation)
        self.decoder = _layers([*hidden[::-1], features], activation)[:-1]

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct samples, shape (samples, features)."""
        return self.decoder(self.encoder(x))


class MLPClassifier(nn.Module):
    """Encoder and a linear classifier.

    Parameters
    ----------
    features, classes : int
        Numbers a sample, and classes of the target.
    hidden : sequence of int
        Widths of the encoder's layers.
    activation : type of nn.Module
        Activation after every hidden layer.
    """

    def __init__(
        self, features: int, classes: int, hidden: Sequence[int], activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.encoder = _layers([features, *hidden], activation)
        self.classifier = nn.Linear(hidden[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities, shape (samples, classes)."""
        return self.classifier(self.encoder(x))
