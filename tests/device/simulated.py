"""Builds the simulated device, and makes torch know it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import types
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autospec.introspection import spectra

NAME = "simulated"
SOURCE = Path(__file__).with_name("simulated.cpp")


@functools.cache
def library() -> ctypes.CDLL:
    """Compile the device once for this version of torch, and register it for the rest of this process."""
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    torch_folder = Path(torch.__file__).parent
    folders = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    content = SOURCE.read_bytes() + f"{torch.__version__} {flags}".encode()
    built = Path(__file__).parent / "__pycache__" / f"simulated-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        part = built.with_suffix(f".{os.getpid()}")
        command = ["g++", *flags, str(SOURCE), "-o", str(part), *folders, "-lc10", "-ltorch_cpu", "-ltorch"]
        subprocess.run(command, check=True)
        part.replace(built)
    found = ctypes.CDLL(str(built))
    for function in (found.simulated_may_wait, found.simulated_has_float64):
        function.argtypes, function.restype = [ctypes.c_bool], None
    found.simulated_waits.restype = ctypes.c_long
    module = types.ModuleType(NAME)
    module.is_available, module.device_count, module.current_device = lambda: True, lambda: 1, lambda: 0
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return found


def waits() -> int:
    """How often the processor would have waited for a GPU so far."""
    return library().simulated_waits()


@contextlib.contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Refuse whatever would wait for a GPU."""
    library().simulated_may_wait(False)
    try:
        yield
    finally:
        library().simulated_may_wait(True)


@contextlib.contextmanager
def without_float64() -> Iterator[None]:
    """Refuse float64 on the device, as Apple's do, and have autospec know it."""
    library().simulated_has_float64(False)
    spectra.WITHOUT_FLOAT64.add(NAME)
    try:
        yield
    finally:
        spectra.WITHOUT_FLOAT64.remove(NAME)
        library().simulated_has_float64(True)


def moved(model: nn.Module) -> nn.Module:
    """Bring a model to the device; `nn.Module.to` would untie weights there."""
    there: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                own = nn.Parameter(parameter.detach().to(NAME), parameter.requires_grad)
                module._parameters[key] = there.setdefault(id(parameter), own)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(NAME)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return model


class Operations(TorchDispatchMode):
    """Counts what is asked of the device.

    Parameters
    ----------
    but : collection of str
        Names of operations that do not count.
    """

    def __init__(self, but: Collection[str] = ()) -> None:
        super().__init__()
        self.but, self.count = but, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in self.but
        return func(*args, **(kwargs or {}))
