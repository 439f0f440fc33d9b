"""How large the rank of a gradient can be, from the architecture and the number of samples alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from torch import nn

from .errors import WatchError
from .layers import rule_for
from .layers.convolution import CONVOLUTIONS, TRANSPOSED


def rank_bound(
    module: nn.Module,
    parameter: str = "weight",
    *,
    samples: int,
    positions: int | tuple[int, ...] = 1,
    activation_rank: int | None = None,
    adjoint_rank: int | None = None,
    initial_state: bool = True,
) -> int:
    r"""Largest rank that the gradient of a weight matrix, or of a group's share, can have.

    The gradient is a sum of one outer product for each row, :math:`\Delta^\top A`, so its rank is at most the number of
    rows, the ranks of the two factors, and the matrix's own sides.

    Parameters
    ----------
    module : nn.Module
        A layer that `autospec.watch` supports.
    parameter : str
        Name of the matrix in it, such as ``"weight_hh_l0"``.
    samples : int
        Samples of the batch, or of the group.
    positions : int or tuple of int
        Tokens of a linear layer, time steps of a recurrent one (as many as the loss is propagated back through, where
        that is truncated), size of the input's space for a convolution, which stride, dilation and padding turn into the
        number of rows.  For an attention's packed weight, the tokens of all its different inputs together.
    activation_rank, adjoint_rank : int, optional
        Ranks of the factors where they are known to be lower: before a bottleneck without activation function the
        adjoint's is at most the bottleneck's width, and after it the activation's is, with biases one more.
    initial_state : bool
        Whether a recurrent layer starts from a state other than zero, as it does where the state is carried from one
        piece of a sequence to the next.  From zero, the first step gives no row to the hidden-to-hidden weight.

    Returns
    -------
    int

    Raises
    ------
    WatchError
        If there is no such matrix, a number is not a whole one of at least 1, or the space does not fit the convolution.

    Notes
    -----
    Own derivation of bounds whose subject is Baker et al., "Low-rank learning by design: the role of network
    architecture and activation linearity in gradient rank collapse" (arXiv:2402.06751).
    """
    rule = rule_for(module)
    if rule is None or parameter not in rule.parameters(module):
        raise WatchError(f"{type(module).__name__} has no matrix '{parameter}' that can be watched.")
    matrix = module.get_parameter(parameter)
    sizes = tuple(positions) if isinstance(positions, Iterable) else (positions,)
    for name, numbers in (("samples", (samples,)), ("positions", sizes)):
        if not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 1 for n in numbers):
            raise WatchError(
                f"{name}={numbers[0] if len(numbers) == 1 else numbers!r}: give whole numbers of at least 1."
            )
    blocks = 1
    if isinstance(module, CONVOLUTIONS + TRANSPOSED):
        blocks = module.groups
        rows = samples * (math.prod(sizes) if isinstance(module, TRANSPOSED) else _output_positions(module, sizes))
    elif "weight_hh" in parameter and isinstance(module, nn.RNNBase | nn.RNNCellBase) and not initial_state:
        rows = samples * max(sizes[0] - 1, 0)
    else:
        rows = samples * math.prod(sizes)
    # A grouped convolution stacks the blocks' matrices.
    limits = [rows * blocks, matrix.shape[0], matrix[0].numel()]
    limits += [rank * blocks for rank in (activation_rank, adjoint_rank) if rank is not None]
    return min(limits)


def _output_positions(module: Any, sizes: tuple[int, ...]) -> int:
    dimensions = module.weight.ndim - 2
    if len(sizes) != dimensions:
        raise WatchError(f"positions={sizes}: give the {dimensions} sizes of the convolution's input.")
    if isinstance(module.padding, str):
        padding = [0 if module.padding == "valid" else None] * dimensions
    else:
        padding = list(module.padding)
    count = 1
    for size, kernel, stride, dilation, pad in zip(
        sizes, module.kernel_size, module.stride, module.dilation, padding, strict=True
    ):
        length = size if pad is None else (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        if length < 1:
            raise WatchError(f"positions={sizes}: the kernel does not fit into the convolution's input.")
        count *= length
    return count
