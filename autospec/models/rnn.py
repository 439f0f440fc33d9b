"""Elman's recurrent networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .common import ACTIVATIONS, depth_and_width


def _recurrent_layers(networks: int, hidden: Sequence[int], activation: str) -> tuple[nn.RNN, nn.Module]:
    """The recurrent layers, and what acts on their outputs."""
    depth, width = depth_and_width("rnn", hidden)
    nonlinearity = "relu" if activation == "relu" else "tanh"
    rnn = nn.RNN(networks, width, depth, nonlinearity=nonlinearity, batch_first=True)
    # nn.RNN has tanh and ReLU within its recurrence; anything else can only act on what leaves it.
    return rnn, nn.Identity() if activation == nonlinearity else ACTIVATIONS[activation]()


class RNNAutoencoder(nn.Module):
    """Recurrent layers, and a linear layer at each time step.

    Each time point is rebuilt from the hidden state after it was read, so the bottleneck is the width of the state.

    Parameters
    ----------
    shape : (int, int)
        Time points and networks of one sample.
    hidden : sequence of int
        Width of each recurrent layer, all the same.
    activation : {"relu", "sigmoid", "tanh"}
        Nonlinearity of the recurrence.  ``nn.RNN`` has no sigmoid: its recurrence keeps tanh, and the sigmoid acts on the
        last layer's outputs.

    Raises
    ------
    UserError
        If the widths differ.
    """

    def __init__(self, shape: Sequence[int], hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.rnn, self.activation = _recurrent_layers(shape[1], hidden, activation)
        self.decoder = nn.Linear(hidden[-1], shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct samples, shape (samples, time, networks)."""
        states, _ = self.rnn(x)
        return self.decoder(self.activation(states))


class RNNClassifier(nn.Module):
    """Recurrent layers, and a linear classifier of the last hidden state.

    Parameters
    ----------
    shape : (int, int)
        Time points and networks of one sample.
    classes : int
        Classes of the target.
    hidden, activation
        As for `RNNAutoencoder`.

    Raises
    ------
    UserError
        If the widths differ.
    """

    def __init__(self, shape: Sequence[int], classes: int, hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.rnn, self.activation = _recurrent_layers(shape[1], hidden, activation)
        self.classifier = nn.Linear(hidden[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities, shape (samples, classes)."""
        states, _ = self.rnn(x)
        return self.classifier(self.activation(states[:, -1]))
