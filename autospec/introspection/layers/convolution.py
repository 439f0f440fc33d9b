"""nn.Conv1d to 3d and nn.ConvTranspose1d to 3d: rows are the channels at each position in space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..convolutions import Convolution
from ..hooks import Hook
from ..workspace import Workspace
from .call import LayerCall, OnCall, hold_nan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over its input; attributes as of `Convolution`."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    margins: tuple[tuple[int, ...], str] | None = None

    @classmethod
    def of_module(cls, module: Any) -> Self:
        """Of one of torch's layers."""
        padding, margins = module.padding, None
        if module.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            margins = (tuple(module._reversed_padding_repeated_twice), mode)
            padding = (0,) * len(module.kernel_size)
        transposed = isinstance(module, TRANSPOSED)
        return cls(
            tuple(module.weight.shape), module.stride, padding, module.dilation, module.groups, transposed, margins
        )

    @classmethod
    def of_function(
        cls, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool
    ) -> Self:
        """Of the arguments of one of torch's functions: numbers, or one for each dimension; padding may be a word."""

        def each(value: Any) -> tuple[int, ...]:
            value = tuple(value) if isinstance(value, Iterable) else (value,)
            return value * (len(kernel) - 2) if len(value) == 1 else value

        margins = None
        if isinstance(padding, str):
            beyond = [
                by * (size - 1) * (padding == "same") for size, by in zip(kernel[2:], each(dilation), strict=True)
            ]
            sides = [(total // 2, total - total // 2) for total in reversed(beyond)]
            padding, margins = 0, (tuple(margin for side in sides for margin in side), "constant")
        return cls(kernel, each(stride), each(padding), each(dilation), groups, transposed, margins)


class ConvolutionCall(LayerCall):
    """One convolution.

    Parameters
    ----------
    geometry : Geometry
        How the kernel moves.
    activation, output : Tensor
        What it moves over, and what comes of that.
    parameter : str
        Name of the kernel in its module.
    """

    def __init__(self, geometry: Geometry, activation: Tensor, output: Tensor, parameter: str = "weight") -> None:
        self.geometry, self.parameters = geometry, (parameter,)
        self.inputs, self.outputs = (activation,), (output,)

    def _batched(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == len(self.geometry.kernel) else tensor.unsqueeze(0)

    def marks(self, parameter: str) -> Tensor:
        """Whether each entry of the batch holds a NaN."""
        return hold_nan(self._batched(self.inputs[0]), 1)

    def entries(self, parameter: str, output: Tensor) -> Tensor:
        """The entries of the batch."""
        return self._batched(output)

    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Convolution:
        """The input and the derivative at the output."""
        geometry, adjoint = self.geometry, adjoints[0]
        assert adjoint is not None
        activation, adjoint = self._batched(self.inputs[0]).to(adjoint.dtype), self._batched(adjoint)
        return Convolution(
            activation,
            adjoint,
            **vars(geometry),
            output_padding=self._output_padding(activation, adjoint)
            if geometry.transposed
            else (0,) * len(geometry.stride),
        )

    def _output_padding(self, activation: Tensor, adjoint: Tensor) -> tuple[int, ...]:
        """Of a transposed convolution, as this call had it: with ``output_size=`` the module's own does not hold."""
        geometry = self.geometry
        sizes = (activation.shape[2:], adjoint.shape[2:], geometry.kernel[2:])
        return tuple(
            there - ((size - 1) * stride - 2 * padding + dilation * (length - 1) + 1)
            for size, there, length, stride, padding, dilation in zip(
                *sizes, geometry.stride, geometry.padding, geometry.dilation, strict=True
            )
        )


class ConvolutionRule:
    """Convolutions in one to three dimensions, with any stride, padding, dilation and groups."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module computes the forward pass of one of torch's convolutions."""
        own = ("forward", "_conv_forward")
        return any(
            isinstance(module, family)
            and all(getattr(type(module), name, None) is getattr(family, name, None) for name in own)
            for family in CONVOLUTIONS + TRANSPOSED
        )

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """The kernels."""
        return ("weight",)

    def attach(self, module: nn.Module, on_call: OnCall) -> list[RemovableHandle]:
        """Report the input and the output of each forward pass."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            activation = args[0] if args else kwargs["input"]
            on_call(ConvolutionCall(Geometry.of_module(module), activation, output))

        return [module.register_forward_hook(Hook(hook), with_kwargs=True, prepend=True)]
