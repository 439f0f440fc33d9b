"""nn.Conv1d to 3d and nn.ConvTranspose1d to 3d: rows are the channels at each position in space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..factors import Convolution
from ..hooks import Hook
from ..workspace import Workspace
from .call import LayerCall, OnCall, hold_nan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ConvolutionCall(LayerCall):
    """One forward pass through a convolution."""

    parameters = ("weight",)

    def __init__(self, module: Any, activation: Tensor, output: Tensor) -> None:
        self.module = module
        self.inputs, self.outputs = (activation,), (output,)
        self.dimensions = len(module.kernel_size)

    def _batched(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == self.dimensions + 2 else tensor.unsqueeze(0)

    def marks(self, parameter: str) -> Tensor:
        """Whether each entry of the batch holds a NaN."""
        return hold_nan(self._batched(self.inputs[0]), 1)

    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Convolution:
        """The input and the derivative at the output."""
        module, adjoint = self.module, adjoints[0]
        assert adjoint is not None
        activation = self._batched(self.inputs[0]).to(adjoint.dtype)
        padding, margins = module.padding, None
        if module.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            margins = (tuple(module._reversed_padding_repeated_twice), mode)
            padding = (0,) * self.dimensions
        adjoint, transposed = self._batched(adjoint), isinstance(module, TRANSPOSED)
        return Convolution(
            activation,
            adjoint,
            tuple(module.weight.shape),
            module.stride,
            padding,
            module.dilation,
            module.groups,
            transposed,
            self._output_padding(activation, adjoint) if transposed else module.output_padding,
            margins,
        )

    def _output_padding(self, activation: Tensor, adjoint: Tensor) -> tuple[int, ...]:
        """Of a transposed convolution, as this call had it: with ``output_size=`` the module's own does not hold."""
        module = self.module
        sizes = (activation.shape[2:], adjoint.shape[2:], module.kernel_size)
        return tuple(
            there - ((size - 1) * stride - 2 * padding + dilation * (length - 1) + 1)
            for size, there, length, stride, padding, dilation in zip(
                *sizes, module.stride, module.padding, module.dilation, strict=True
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
            on_call(ConvolutionCall(module, args[0] if args else kwargs["input"], output))

        return [module.register_forward_hook(Hook(hook), with_kwargs=True, prepend=True)]
