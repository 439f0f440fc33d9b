"""Networks of the paper: small, plain PyTorch modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .mlp import MLPAutoencoder, MLPClassifier

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def build_model(
    architecture: str, task: str, features: int, classes: int, hidden: Sequence[int], activation: str
) -> nn.Module:
    """Build a network.

    Parameters
    ----------
    architecture : {"mlp"}
        Family of the network.
    task : {"autoencoder", "classifier"}
        What its head does.
    features : int
        Numbers a sample.
    classes : int
        Classes of the target.
    hidden : sequence of int
        Widths of the hidden layers.
    activation : {"relu", "sigmoid", "tanh"}
        Activation function.
    """
    if architecture != "mlp":
        raise ValueError(f"there is no architecture '{architecture}'")
    if task == "autoencoder":
        return MLPAutoencoder(features, hidden, ACTIVATIONS[activation])
    return MLPClassifier(features, classes, hidden, ACTIVATIONS[activation])
