"""Memory that is used again at every step: a large fresh tensor costs more than what is computed in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

# Larger tensors are not kept until the step's end, each for its use: there memory matters.  They are handed out again as
# soon as they are given back.
LARGEST_KEPT = 2**22
# Bytes of the largest allocation that teaches glibc to keep freed memory (its 32 MiB, less what it adds itself).
TEACHES = 2**25 - 2**16

Where = tuple[int, int, torch.Size, tuple[int, ...]]
Form = tuple[tuple[int, ...], torch.dtype, torch.device]


class Workspace:
    """Tensors handed out during a step and taken back at its end."""

    def __init__(self) -> None:
        self._tensors: dict[Form, list[Tensor]] = {}
        self._taken: dict[Form, int] = {}
        self._large: dict[Form, list[Tensor]] = {}
        self._scratch: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._scratched: dict[tuple[str, torch.dtype, torch.device], int] = {}
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}
        self._lasting: dict[Any, tuple[Tensor, Tensor]] = {}
        self._still: dict[Any, tuple[Tensor, Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with any content, not handed out before in this step, or given back since."""
        key = (shape, dtype, device)
        position = self._taken.get(key, 0)
        self._taken[key] = position + 1
        if math.prod(shape) * dtype.itemsize > LARGEST_KEPT:
            there = self._large.get(key)
            return there.pop() if there else torch.empty(shape, dtype=dtype, device=device)
        tensors = self._tensors.setdefault(key, [])
        if position == len(tensors):
            tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return tensors[position]

    def give_back(self, tensor: Tensor) -> None:
        """Take a tensor back before the step's end, to which nobody holds on; small ones are used once a step all the same."""
        if tensor.nbytes > LARGEST_KEPT:
            self._large.setdefault((tuple(tensor.shape), tensor.dtype, tensor.device), []).append(tensor)

    def scratch(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with any content, until one for the same purpose is asked for."""
        size, key = math.prod(shape), (purpose, dtype, device)
        room = self._scratch.get(key)
        if room is None or room.numel() < size:
            room = self._scratch[key] = torch.empty(size, dtype=dtype, device=device)
        self._scratched[key] = max(size, self._scratched.get(key, 0))
        return room[:size].view(shape)

    def memo(self, tensor: Tensor, function: Callable[[Tensor, Workspace], Tensor], lasting: bool = False) -> Tensor:
        """Apply a function to a tensor once a step, or, while the tensor stays the same from step to step, once."""
        key = (*where(tensor), function)
        if key not in self._known:
            before = self._lasting.get(key) if lasting else None
            self._known[key] = before or (tensor, function(tensor, self))
        if lasting:
            self._still[key] = self._known[key]
        return self._known[key][1]

    def forget(self, functions: Collection[Callable[[Tensor, Workspace], Tensor]], but: Sequence[Tensor] = ()) -> None:
        """Let go of what some functions were applied to in this step, but for parts of some tensors."""
        kept = {tensor.untyped_storage().data_ptr() for tensor in but}
        self._known = {
            key: pair
            for key, pair in self._known.items()
            if key[-1] not in functions or pair[0].untyped_storage().data_ptr() in kept
        }

    def begin_again(self) -> None:
        """Everything may be handed out again within a step, whose beginning has been discarded."""
        self._taken, self._known = {}, {}

    def take_back(self) -> None:
        """Everything may be handed out again; what was not needed in this step is given up."""
        self._tensors = {key: tensors[: self._taken.get(key, 0)] for key, tensors in self._tensors.items()}
        self._large = {key: tensors for key, tensors in self._large.items() if key in self._taken}
        self._scratch = {
            key: room for key, room in self._scratch.items() if room.numel() <= 2 * self._scratched.get(key, 0)
        }
        self._taken, self._known, self._scratched = {}, {}, {}
        self._lasting, self._still = self._still, {}

    def release(self) -> None:
        """Give everything up."""
        self._tensors, self._taken, self._large, self._known = {}, {}, {}, {}
        self._lasting, self._still, self._scratch, self._scratched = {}, {}, {}, {}


def where(tensor: Tensor) -> Where:
    """Which tensor it is among those that live: its place, version and form."""
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, up to 64 MB at the heap's top, as it does once a tensor of 32 MB has been freed.

    Otherwise it may hand the matrices of every step back to the system and fetch them again, which is worth up to half a
    training step.  glibc draws the line at twice the largest mapping that has been freed, up to 32 MB (man mallopt,
    M_MMAP_THRESHOLD); this one is never written to.  Other libraries, and settings of the user's own, do not care.
    """
    torch.UntypedStorage(TEACHES)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a table that was made on the processor to a device, without waiting for what the device has yet to do."""
    return tensor.to(device, non_blocking=device.type != "mps")
