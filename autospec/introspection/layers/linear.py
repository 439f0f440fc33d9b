"""nn.Linear: the activation is its input, the adjoint the derivative at its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..convolutions import Convolution
from ..factors import Product
from ..hooks import Hook
from ..workspace import Workspace
from .call import LayerCall, OnCall, hold_nan


class LinearCall(LayerCall):
    """One product of rows with a weight, or with some of its rows.

    Parameters
    ----------
    parameter : str
        Name of the weight in its module.
    activation : Tensor
        Shape (..., inputs).
    output : Tensor
        Shape (..., outputs), or what ``turned`` brings into it.
    outputs : (int, int), optional
        First row and number of rows of the whole parameter, where only some of them were used.
    transposed : bool
        Whether the parameter has its inputs first, as in ``x @ weight``.
    turned : callable, optional
        Brings the output into the shape (..., outputs).
    """

    def __init__(
        self,
        parameter: str,
        activation: Tensor,
        output: Tensor,
        outputs: tuple[int, int] | None = None,
        transposed: bool = False,
        turned: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.parameters = (parameter,)
        self.inputs, self.outputs = (activation,), (output,)
        self.part, self.transposed, self.turned = outputs, transposed, turned
        self._lies: tuple[torch.Size, tuple[int, ...], int] | None = None
        # With more than two dimensions the output is a view of the product's; an operation in place on the view would
        # leave a hook on it behind, but not one on the product.
        base = output._base
        if base is not None and base.grad_fn is not None and base.numel() == output.numel() and base.is_contiguous():
            self.outputs = (base,)
            self._lies = output.shape, output.stride(), int(output.storage_offset() - base.storage_offset())

    def marks(self, parameter: str) -> Tensor:
        """Whether each row holds a NaN."""
        return hold_nan(self.inputs[0], self.inputs[0].ndim - 1)

    def entries(self, parameter: str, output: Tensor) -> Tensor:
        """Rows of the output."""
        return output if self.turned is None else self.turned(output)

    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Product:
        """Rows of the input and of the derivative at the output."""
        activation, adjoint = self.inputs[0], adjoints[0]
        assert adjoint is not None
        if self._lies is not None:
            shape, strides, offset = self._lies
            adjoint = adjoint.contiguous()  # which may be a part of a larger one, as after torch.cat
            adjoint = adjoint.as_strided(shape, strides, adjoint.storage_offset() + offset)
        adjoint = self.entries(parameter, adjoint)
        adjoint = adjoint.reshape(-1, adjoint.shape[-1])
        activation = activation.reshape(-1, activation.shape[-1]).to(adjoint.dtype)
        return Product(activation, adjoint, self.part, self.transposed)


class SeparateCall(LinearCall):
    """Products of parts of each row with a weight for each part, such as of regions or heads: a grouped convolution of one position.

    Parameters
    ----------
    parameter : str
        Name of the weights in their module.
    activation : Tensor
        Shape (..., parts * inputs).
    output : Tensor
        What ``turned`` brings into the shape (..., parts * outputs).
    kernel : (int, int)
        Shape (parts * outputs, inputs) of the weights as one matrix.
    turned : callable
        As for `LinearCall`.
    """

    def __init__(
        self,
        parameter: str,
        activation: Tensor,
        output: Tensor,
        kernel: tuple[int, int],
        turned: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(parameter, activation, output, turned=turned)
        self.kernel, self.parts = kernel, activation.shape[-1] // kernel[1]

    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Convolution:  # type: ignore[override]
        """Rows of the input and of the derivative at the output, as channels."""
        product = super().factors(parameter, adjoints, workspace)
        sides = product.activation.unsqueeze(-1), product.adjoint.unsqueeze(-1)
        return Convolution(*sides, (*self.kernel, 1), (1,), (0,), (1,), self.parts, False, (0,))


class LinearRule:
    """nn.Linear with inputs of any number of dimensions, and subclasses that keep its forward pass."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module computes nn.Linear's own forward pass."""
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """The weight."""
        return ("weight",)

    def attach(self, module: nn.Module, on_call: OnCall) -> list[RemovableHandle]:
        """Report the input and the output of each forward pass."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            on_call(LinearCall("weight", args[0] if args else kwargs["input"], output))

        return [module.register_forward_hook(Hook(hook), with_kwargs=True, prepend=True)]
