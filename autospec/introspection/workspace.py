"""Memory that is used again at every step: a large fresh tensor costs more than what is computed in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Larger tensors are made afresh and given up at once: there memory matters more than time.
LARGEST_KEPT = 2**22


class Workspace:
    """Tensors handed out during a step and taken back at its end."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[tuple[int, ...], torch.dtype, torch.device], list[Tensor]] = {}
        self._taken: dict[tuple[tuple[int, ...], torch.dtype, torch.device], int] = {}
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}
        self._lasting: dict[Any, tuple[Tensor, Tensor]] = {}
        self._still: dict[Any, tuple[Tensor, Tensor]] = {}

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
        """Apply a function to a tensor once a step, or, while the tensor stays the same from step to step, once."""
        key = (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), function)
        if key not in self._known:
            before = self._lasting.get(key) if lasting else None
            self._known[key] = before or (tensor, function(tensor, self))
        if lasting:
            self._still[key] = self._known[key]
        return self._known[key][1]

    def forget(self, function: Callable[[Tensor, Workspace], Tensor]) -> None:
        """Let go of what a function was applied to in this step."""
        self._known = {key: pair for key, pair in self._known.items() if key[-1] is not function}

    def take_back(self) -> None:
        """Everything may be handed out again; what was not needed in this step is given up."""
        self._tensors = {key: self._tensors[key][:count] for key, count in self._taken.items()}
        self._taken, self._known = {}, {}
        self._lasting, self._still = self._still, {}

    def release(self) -> None:
        """Give everything up."""
        self._tensors, self._taken, self._known = {}, {}, {}
        self._lasting, self._still = {}, {}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a table that was made on the processor to a device, without waiting for what the device has yet to do."""
    return tensor.to(device, non_blocking=device.type != "mps")
