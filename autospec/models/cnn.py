"""Convolutional networks in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .common import ACTIVATIONS

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

# Each convolution halves the size, rounded up.
OPTIONS = {"kernel_size": 3, "stride": 2, "padding": 1}
# What the classifier sees of each dimension, at most.
CELLS = 4


def _channels_and_size(dimensions: int, shape: Sequence[int]) -> tuple[int, list[int]]:
    """Channels of a sample, and its size in the dimensions along which kernels move."""
    if dimensions == 1:  # (time, networks)
        return shape[1], [shape[0]]
    return 1, list(shape)


def _to_channels(dimensions: int, x: Tensor) -> Tensor:
    """Bring samples into PyTorch's order (samples, channels, *size)."""
    return x.transpose(1, 2) if dimensions == 1 else x.unsqueeze(1)


def _from_channels(dimensions: int, x: Tensor) -> Tensor:
    """Bring samples back."""
    return x.transpose(1, 2) if dimensions == 1 else x.squeeze(1)


def _sizes(size: list[int], layers: int) -> list[list[int]]:
    """Size of a sample before each convolution, and after the last."""
    sizes = [size]
    for _ in range(layers):
        sizes.append([(n + 1) // 2 for n in sizes[-1]])
    return sizes


def _encoder(dimensions: int, channels: Sequence[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [CONVOLUTIONS[dimensions](inputs, outputs, **OPTIONS), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


def _block(size: int) -> int:
    """Width of the blocks into which a dimension is cut."""
    return math.ceil(size / CELLS)


def average_blocks(x: Tensor) -> Tensor:
    """Average over at most 4 blocks in each dimension.

    What average pooling with windows side by side does, in operations whose derivatives are deterministic on GPUs too.

    Parameters
    ----------
    x : Tensor, shape (samples, channels, *size)

    Returns
    -------
    Tensor, shape (samples, channels, *cells)
        The last block of a dimension may be smaller than the others.
    """
    for dim in range(2, x.ndim):
        blocks = x.split(_block(x.shape[dim]), dim)
        x = torch.stack([block.mean(dim) for block in blocks], dim)
    return x


class CNNAutoencoder(nn.Module):
    """Strided convolutions, mirrored transposed convolutions, linear output.

    Parameters
    ----------
    dimensions : {1, 2, 3}
        Along how many dimensions kernels move.  In one dimension a sample is (time, networks), and networks are
        channels; in two and three a sample is an image with one channel.
    shape : sequence of int
        Shape of one sample; the decoder gives back exactly this, odd sizes included.
    hidden : sequence of int
        Channels after each of the encoder's convolutions; the decoder runs back through them.
    activation : {"relu", "sigmoid", "tanh"}
        Activation after every layer but the last.
    """

    def __init__(self, dimensions: int, shape: Sequence[int], hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.dimensions = dimensions
        channels, size = _channels_and_size(dimensions, shape)
        widths = [channels, *hidden]
        self.encoder = _encoder(dimensions, widths, activation)
        decoder: list[nn.Module] = []
        for before, outputs, inputs in list(zip(_sizes(size, len(hidden)), widths, hidden, strict=False))[::-1]:
            # An even and the odd size below it are halved to the same: the padding tells which it was.
            padding = [(n + 1) % 2 for n in before]
            decoder += [
                TRANSPOSED[dimensions](inputs, outputs, **OPTIONS, output_padding=padding),
                ACTIVATIONS[activation](),
            ]
        self.decoder = nn.Sequential(*decoder[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct samples, shape (samples, *shape)."""
        return _from_channels(self.dimensions, self.decoder(self.encoder(_to_channels(self.dimensions, x))))


class CNNClassifier(nn.Module):
    """Strided convolutions, average pooling, a linear classifier.

    A global average would forget where in a sample something is; with all positions of a brain map the classifier would
    have many times the weights of the convolutions.  So the pooling leaves at most 4 cells in each dimension, which are
    flattened.

    Parameters
    ----------
    dimensions : {1, 2, 3}
        As for `CNNAutoencoder`.
    shape : sequence of int
        Shape of one sample.
    classes : int
        Classes of the target.
    hidden : sequence of int
        Channels after each convolution.
    activation : {"relu", "sigmoid", "tanh"}
        Activation after every convolution.
    """

    def __init__(
        self,
        dimensions: int,
        shape: Sequence[int],
        classes: int,
        hidden: Sequence[int],
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.dimensions = dimensions
        channels, size = _channels_and_size(dimensions, shape)
        self.encoder = _encoder(dimensions, [channels, *hidden], activation)
        cells = math.prod(math.ceil(n / _block(n)) for n in _sizes(size, len(hidden))[-1])
        self.classifier = nn.Linear(hidden[-1] * cells, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities, shape (samples, classes)."""
        features = self.encoder(_to_channels(self.dimensions, x))
        return self.classifier(average_blocks(features).flatten(1))
