"""Memory that is used again at every step: a large fresh tensor costs more than what is computed in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MEMO_SIZE = 256
# Larger tensors are made afresh and given up at once: there memory matters more than time.
LARGEST_KEPT = 2**22


class Workspace:
    """Tensors handed out during a step and taken back at its end."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[tuple[int, ...], torch.dtype, torch.device], list[Tensor]] = {}
        self._taken: dict[tuple[tuple[int, ...], torch.dtype, torch.device], int] = {}
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}
        self._lasting: dict[Any, tuple[Tensor, Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with any content, not handed out before in this step."""
        if math.prod(shape) * dtype.itemsize > LARGEST_KEPT:
            return torch.empty(shape, dtype=dtype, device=device)
        key = (shape, dtype, device)
        position = self._taken.get(key, 0)
        self._taken[key] = position + 1
        tensors = self._tensors.setdefault(key, [])
        if position == len(tensors):
            tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return tensors[position]

    def memo(self, tensor: Tensor, function: Callable[[Tensor, Workspace], Tensor], lasting: bool = False) -> Tensor:
        """Apply a function to a tensor once a step, or, where the tensor stays the same, once for all."""
        known = self._lasting if lasting else self._known
        key = (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), function)
        if key not in known:
            if len(known) > MEMO_SIZE:
                known.clear()
            known[key] = (tensor, function(tensor, self))
        return known[key][1]

    def forget(self, function: Callable[[Tensor, Workspace], Tensor]) -> None:
        """Let go of what a function was applied to in this step."""
        self._known = {key: pair for key, pair in self._known.items() if key[-1] is not function}

    def take_back(self) -> None:
        """Everything may be handed out again; shapes that were not needed in this step are given up."""
        self._tensors = {key: self._tensors[key][:count] for key, count in self._taken.items()}
        self._taken, self._known = {}, {}

    def release(self) -> None:
        """Give everything up."""
        self._tensors, self._taken, self._known, self._lasting = {}, {}, {}, {}
