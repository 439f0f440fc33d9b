"""nn.Linear: the activation is its input, the adjoint the derivative at its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..hooks import Hook


class LinearRule:
    """nn.Linear with inputs of any number of dimensions, and subclasses that keep its forward pass."""

    parameters: tuple[str, ...] = ("weight",)

    def matches(self, module: nn.Module) -> bool:
        """Whether the module computes nn.Linear's own forward pass."""
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    def attach(self, module: nn.Module, on_use: Callable[[str, Tensor, Tensor], None]) -> list[RemovableHandle]:
        """Report the input and the output of each forward pass."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            on_use("weight", args[0] if args else kwargs["input"], output)

        return [module.register_forward_hook(Hook(hook), with_kwargs=True)]
