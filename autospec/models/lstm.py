"""Networks of long short-term memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .common import ACTIVATIONS, depth_and_width


class LSTMAutoencoder(nn.Module):
    """Recurrent layers, and a linear layer at each time step.

    Each time point is rebuilt from the hidden state after it was read, so the bottleneck is the width of the state.

    Parameters
    ----------
    shape : (int, int)
        Time points and networks of one sample.
    hidden : sequence of int
        Width of each recurrent layer, all the same.
    activation : {"relu", "sigmoid", "tanh"}
        Acts on what leaves the last recurrent layer; the cell keeps its own gates.

    Raises
    ------
    UserError
        If the widths differ.
    """

    def __init__(self, shape: Sequence[int], hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        depth, width = depth_and_width("lstm", hidden)
        self.lstm = nn.LSTM(shape[1], width, depth, batch_first=True)
        self.activation = ACTIVATIONS[activation]()
        self.decoder = nn.Linear(width, shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct samples, shape (samples, time, networks)."""
        states, _ = self.lstm(x)
        return self.decoder(self.activation(states))


class LSTMClassifier(nn.Module):
    """Recurrent layers, and a linear classifier of the last hidden state.

    Parameters
    ----------
    shape : (int, int)
        Time points and networks of one sample.
    classes : int
        Classes of the target.
    hidden, activation
        As for `LSTMAutoencoder`.

    Raises
    ------
    UserError
        If the widths differ.
    """

    def __init__(self, shape: Sequence[int], classes: int, hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        depth, width = depth_and_width("lstm", hidden)
        self.lstm = nn.LSTM(shape[1], width, depth, batch_first=True)
        self.activation = ACTIVATIONS[activation]()
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities, shape (samples, classes)."""
        states, _ = self.lstm(x)
        return self.classifier(self.activation(states[:, -1]))
