"""Generators of random numbers that everybody draws from: torch's, Python's and numpy's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_random_numbers(seed: int) -> None:
    """Seed torch, and Python and numpy, from which a user's network may draw."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002, the generator that is everybody's


def torch_random_state(device: torch.device) -> dict[str, Any]:
    """State of torch's random numbers, on the CPU and on the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def random_state(device: torch.device) -> dict[str, Any]:
    """The same with Python's and numpy's, in thirty times the time; plain, as a file can hold it."""
    version, words, gauss = random.getstate()
    name, keys, *others = np.random.get_state()  # noqa: NPY002
    of_numpy = [name, np.asarray(keys).tolist(), *others]
    return {**torch_random_state(device), "python": [version, list(words), gauss], "numpy": of_numpy}


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what one of these returned; that of another kind of device is left out."""
    torch.set_rng_state(state["cpu"])
    if "python" in state:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, *others = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *others))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def undone_draws(before: dict[str, Any], device: torch.device) -> bool:
    """Put torch's random numbers back to what `torch_random_state` returned, if some have been drawn since; whether some have."""
    after = torch_random_state(device)
    drew = not all(torch.equal(before[name], after[name]) for name in before)
    if drew:
        restore_random_state(before, device)
    return drew


@contextmanager
def generators_kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put every random number generator back as it was, also of the devices of the tensors."""
    devices = sorted({t.device.index or 0 for t in tensors if t.is_cuda})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
