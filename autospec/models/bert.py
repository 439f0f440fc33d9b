"""BERT (Devlin et al. 2019) on time courses: time points are the tokens.

A linear projection of a time point's networks stands in place of the word embedding, and there are no segments.
Dropout is 0, so that training draws no random numbers.  Everything else is BERT's: learned positions, normalised
embeddings, normalisation after each block, a feed-forward block four times as wide, weights drawn with a standard
deviation of 0.02.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .common import ACTIVATIONS, depth_and_width

LAYER_NORM_EPS = 1e-12
INITIAL_SCALE = 0.02


def attention_heads(width: int) -> int:
    """The most of 8, 4 and 2 heads that divide the width and have at least 4 features each; else 1."""
    return next((heads for heads in (8, 4, 2) if width % heads == 0 and width // heads >= 4), 1)


class BERTEncoder(nn.Module):
    """Embeddings and encoder layers.

    Parameters
    ----------
    shape : (int, int)
        Time points and networks of one sample.
    hidden : sequence of int
        Width of each layer, all the same.
    activation : {"relu", "sigmoid", "tanh"}
        Activation of the feed-forward blocks.

    Raises
    ------
    UserError
        If the widths differ.
    """

    def __init__(self, shape: Sequence[int], hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        depth, width = depth_and_width("bert", hidden)
        time_points, networks = shape
        self.projection = nn.Linear(networks, width)
        self.positions = nn.Embedding(time_points, width)
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width,
                    attention_heads(width),
                    4 * width,
                    dropout=0.0,
                    activation=ACTIVATIONS[activation](),
                    layer_norm_eps=LAYER_NORM_EPS,
                    batch_first=True,
                )
                for _ in range(depth)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states of the last layer, shape (samples, time, width)."""
        places = torch.arange(x.shape[1], device=x.device)
        return self.layers(self.norm(self.projection(x) + self.positions(places)))


class BERTAutoencoder(nn.Module):
    """Encoder, and a linear layer at each token.

    Parameters
    ----------
    shape, hidden, activation
        As for `BERTEncoder`.
    """

    def __init__(self, shape: Sequence[int], hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.encoder = BERTEncoder(shape, hidden, activation)
        self.decoder = nn.Linear(hidden[-1], shape[1])
        _draw_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct samples, shape (samples, time, networks)."""
        return self.decoder(self.encoder(x))


class BERTClassifier(nn.Module):
    """Encoder, BERT's pooler (linear layer and tanh) of the first token, and a linear classifier.

    There is no token of its own for the whole sequence: the first time point serves, and attends to all others.

    Parameters
    ----------
    shape, hidden, activation
        As for `BERTEncoder`.
    classes : int
        Classes of the target.
    """

    def __init__(self, shape: Sequence[int], classes: int, hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.encoder = BERTEncoder(shape, hidden, activation)
        self.pooler = nn.Linear(hidden[-1], hidden[-1])
        self.classifier = nn.Linear(hidden[-1], classes)
        _draw_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities, shape (samples, classes)."""
        first = self.encoder(x)[:, 0]
        return self.classifier(torch.tanh(self.pooler(first)))


def _draw_weights(model: nn.Module) -> None:
    """Draw all matrices as BERT's, and let biases begin at 0; the scales of normalisations stay 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=INITIAL_SCALE)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
