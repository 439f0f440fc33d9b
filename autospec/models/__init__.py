"""Networks of the paper: small, plain PyTorch modules, each with the head of an autoencoder and of a classifier.

All take ``x`` of shape (samples, *shape), where ``shape`` is that of one sample, and bring it into the form that their
layers want.  An autoencoder returns (samples, *shape), a classifier (samples, classes).  Where the activation acts:

============  ==============================  ============================================================
architecture  one sample                      the activation acts
============  ==============================  ============================================================
mlp           any shape, flattened            after every layer but the last
cnn1d         (time, networks)                after every convolution but the decoder's last
cnn2d         (rows, columns)                 as cnn1d
cnn3d         (x, y, z)                       as cnn1d
rnn           (time, networks)                within the recurrence; sigmoid: on the last layer's outputs
lstm          (time, networks)                on the last layer's outputs
bert          (time, networks)                in the feed-forward blocks
============  ==============================  ============================================================

A user's own network decides for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from autospec.custom_model import is_path
from autospec.errors import UserError

from .bert import BERTAutoencoder, BERTClassifier
from .cnn import CNNAutoencoder, CNNClassifier
from .common import ACTIVATIONS
from .custom import build_custom
from .lstm import LSTMAutoencoder, LSTMClassifier
from .mlp import MLPAutoencoder, MLPClassifier
from .rnn import RNNAutoencoder, RNNClassifier

__all__ = ["ACTIVATIONS", "build_model"]

AUTOENCODERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPAutoencoder,
    "cnn1d": partial(CNNAutoencoder, 1),
    "cnn2d": partial(CNNAutoencoder, 2),
    "cnn3d": partial(CNNAutoencoder, 3),
    "rnn": RNNAutoencoder,
    "lstm": LSTMAutoencoder,
    "bert": BERTAutoencoder,
}
CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPClassifier,
    "cnn1d": partial(CNNClassifier, 1),
    "cnn2d": partial(CNNClassifier, 2),
    "cnn3d": partial(CNNClassifier, 3),
    "rnn": RNNClassifier,
    "lstm": LSTMClassifier,
    "bert": BERTClassifier,
}
_SAMPLE = {
    "cnn1d": ("time", "network"),
    "cnn2d": ("row", "column"),
    "cnn3d": ("x", "y", "z"),
    "rnn": ("time", "network"),
    "lstm": ("time", "network"),
    "bert": ("time", "network"),
}


def build_model(
    architecture: str, task: str, shape: Sequence[int], classes: int, hidden: Sequence[int], activation: str
) -> nn.Module:
    """Build a network.

    Parameters
    ----------
    architecture : {"mlp", "cnn1d", "cnn2d", "cnn3d", "rnn", "lstm", "bert"} or str
        Family of the network, or a user's own as ``package.module:Class``.
    task : {"autoencoder", "classifier"}
        What its head does.
    shape : sequence of int
        Shape of one sample.
    classes : int
        Classes of the target.
    hidden : sequence of int
        Widths of the hidden layers, or channels of the convolutions.
    activation : {"relu", "sigmoid", "tanh"}
        Activation function.

    Raises
    ------
    UserError
        If there is no such architecture, or it does not take such samples or widths.
    """
    if is_path(architecture):
        return build_custom(architecture, task, shape, classes, hidden, activation)
    if architecture not in AUTOENCODERS:
        raise UserError(
            f"there is no architecture '{architecture}': choose one of {list(AUTOENCODERS)}, or give your own as "
            "package.module:Class."
        )
    dims = _SAMPLE.get(architecture)
    if dims is not None and len(dims) != len(shape):
        raise UserError(
            f"{architecture} takes samples of {len(dims)} dimensions, ({', '.join(dims)}), but a sample here has the "
            f"shape {tuple(shape)}: choose another model, or another data set."
        )
    if task == "autoencoder":
        return AUTOENCODERS[architecture](shape, hidden, activation)
    return CLASSIFIERS[architecture](shape, classes, hidden, activation)
