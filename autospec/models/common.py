"""What several networks share: activations, and checks of what they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autospec.errors import UserError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def depth_and_width(architecture: str, hidden: Sequence[int]) -> tuple[int, int]:
    """Number of layers and their common width, for networks whose layers are as wide as each other.

    Parameters
    ----------
    architecture : str
        Name of the network, for the error message.
    hidden : sequence of int
        Width of each layer.

    Raises
    ------
    UserError
        If the widths differ.
    """
    if len(set(hidden)) != 1:
        raise UserError(
            f"hidden is {list(hidden)}: all layers of {architecture} have one width, so repeat the same number, "
            f"such as {[max(hidden, default=32)] * max(len(hidden), 1)}."
        )
    return len(hidden), hidden[0]
