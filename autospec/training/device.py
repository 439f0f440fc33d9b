"""Where a network is trained: the device, its random numbers, its memory, and what makes it deterministic."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autospec.errors import UserError


def chosen_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises
    ------
    UserError
        If the device is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name, False):
        there = [kind for kind, yes in available.items() if yes]
        raise UserError(f"the device '{name}' is not available here: choose one of {['auto', *there]}.")
    return torch.device(name)


def host() -> dict[str, Any]:
    """Where a training ran: for the file beside the results, since it would change their bytes."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"host": platform.node(), "processor": platform.machine(), "cores": os.cpu_count(), "cuda_device": cuda}


def environment(device: torch.device) -> dict[str, Any]:
    """What the last bit of a result depends on, beside the code and the versions of libraries."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms in float32 as it is, and put torch's settings back afterwards."""
    # Read when the first matrix product is computed on CUDA, and when something is compiled first.
    variables = {"TORCHINDUCTOR_DETERMINISTIC": "1"}
    if device.type == "cuda":
        variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    # torch.use_deterministic_algorithms does the same but for importing the compiler, which takes a second.
    mode = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    memory.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
        for name in new:
            os.environ.pop(name, None)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def free_memory(device: torch.device) -> None:
    """Give back memory that torch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "mps":
        torch.mps.empty_cache()
