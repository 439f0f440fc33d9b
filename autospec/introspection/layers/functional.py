"""Weights that a model itself multiplies with data: ``x @ self.weight``, ``F.linear(x, self.layer.weight)``.

Who writes a layer, or gives one of torch's another forward pass, calls torch's functions with its weight.  While the model runs,
a TorchFunctionMode looks on at these calls and reports each as a rule reports a layer's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from ..arguments import tensors_in
from ..hooks import Hook, outside_graphs
from .attention import looked_through
from .call import LayerCall
from .convolution import ConvolutionCall, Geometry
from .linear import LinearCall

LINEAR = (F.linear, torch.inner, Tensor.inner)
MATMUL = (torch.matmul, Tensor.matmul, torch.linalg.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
ADDMM = (torch.addmm, Tensor.addmm)
CONVOLUTION = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
# What autograd does not follow.
DETACHED = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
ASSIGNED = (Tensor.data.__set__,)  # type: ignore[attr-defined]

Report = Callable[[str, nn.Parameter, Tensor], LayerCall | None]
"""Makes what a rule would report, of the parameter's name in its module, the parameter, and what the function returned."""


class FunctionalUses(TorchFunctionMode):
    """Reports products and convolutions with some weights, and what else is done with one of them and data.

    Parameters
    ----------
    weights : mapping of Parameter to (str, str)
        The matrices, and for each the module's name and its own in that module under which its uses are reported.
    on_call : callable
        Takes these names, what a rule would report, and what the function returned; may return what shall stand in for it.
    on_other : callable, optional
        Takes these names and the name of a function in which the weight, or what is made of it, meets data in another way.

    Attributes
    ----------
    within : list of collections of int
        For each layer that is running, whose rule reports its uses, the identities of its weights.
    """

    def __init__(
        self,
        weights: Mapping[nn.Parameter, tuple[str, str]],
        on_call: Callable[[tuple[str, str], LayerCall, Tensor], Tensor | None],
        on_other: Callable[[tuple[str, str], str], object] | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.on_call, self.on_other = weights, on_call, on_other
        # What is made of which weight; an identity is only unique while its object lives.
        self._made: dict[int, tuple[Tensor, nn.Parameter]] = {id(weight): (weight, weight) for weight in weights}
        self.within: list[Collection[int]] = []

    @outside_graphs
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = self.within[-1] if self.within else ()
        given = list(tensors_in((args, kwargs)))
        used = [self._made[id(t)][1] for t in given if id(t) in self._made and id(self._made[id(t)][1]) not in own]
        # Without gradients, as for the target of a moving average, a weight is data.
        if not used or not torch.is_grad_enabled() or func in ASSIGNED:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return looked_through()(*args, **kwargs)
        result = func(*args, **kwargs)
        call = self._reported(func, args, kwargs, result)
        if call is not None:
            replacement = self.on_call(*call, result)
            return result if replacement is None else replacement
        if any(id(t) not in self._made and not isinstance(t, nn.Parameter) and t.ndim for t in given):
            if self.on_other is not None:
                for weight in used:
                    self.on_other(self.weights[weight], getattr(func, "__name__", str(func)))
        elif func not in DETACHED:
            for tensor in tensors_in(result):
                if tensor.ndim:  # a number, such as a penalty, is no weight any more
                    self._made.setdefault(id(tensor), (tensor, used[0]))
        return result

    def _reported(
        self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> tuple[tuple[str, str], LayerCall] | None:
        """What a rule would report, if the call is a product or a convolution of data with a weight."""
        for data, weight, report in _readings(func, args, kwargs) if isinstance(result, Tensor) else ():
            strided = isinstance(data, Tensor) and isinstance(weight, Tensor) and data.layout == torch.strided
            if strided and id(weight) in self._made and id(data) not in self._made:
                parameter = self._made[id(weight)][1]
                place = self.weights[parameter]
                call = report(place[1], parameter, result)
                return None if call is None else (place, call)
        return None

    def leave(self) -> None:
        """Look on no longer, also where an interruption has kept modes that were entered later from being left."""
        above: list[TorchFunctionMode] = []
        while torch._C._len_torch_function_stack():
            mode = _pop_mode()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)


def layers_noted(
    layers: Mapping[nn.Module, Collection[int]], within: Callable[[], list[Collection[int]]]
) -> list[RemovableHandle]:
    """Note which layers are running whose rules report their uses.

    Parameters
    ----------
    layers : mapping of Module to collection of int
        Each layer with the identities of its weights.
    within : callable
        Returns the list on which the weights of each layer that is running are to stand, the innermost last.
    """

    def begins(own: Collection[int], *_: Any) -> None:
        within().append(own)

    def ends(*_: Any) -> None:
        if running := within():
            running.pop()

    handles: list[RemovableHandle] = []
    for module, own in layers.items():
        handles.append(module.register_forward_pre_hook(Hook(functools.partial(begins, own))))
        handles.append(module.register_forward_hook(Hook(ends), always_call=True))
    return handles


# ---------------------------------------------------------------------- what torch's functions do


def _named(names: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _readings(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Report]]:
    """Ways to read a call as one of data with a weight: both, and what makes a report of it."""
    if func in CONVOLUTION or func in TRANSPOSED:
        names = "input weight bias stride padding dilation groups"
        if func in TRANSPOSED:
            names = "input weight bias stride padding output_padding groups dilation"
        given = _named(names, args, kwargs)
        yield given["input"], given["weight"], functools.partial(_convolution, func in TRANSPOSED, given)
    elif func in LINEAR:
        given = _named("input weight" if func is F.linear else "input other", args, kwargs)
        rows, weight = given["input"], given["weight"] if func is F.linear else given["other"]
        yield rows, weight, lambda *seen: _product(rows, weight, None, *seen)
    elif func in MATMUL or func in ADDMM:
        given = _named("input mat2" if func in MATMUL else "bias input mat2", args, kwargs)
        left, right = given.get("input", given.get("mat1")), given.get("mat2", given.get("other"))
        if kwargs.get("alpha", 1) != 1 or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return
        yield left, right, lambda *seen: _product(left, right.mT, None, *seen) if right.ndim > 1 else None
        if right.ndim == 1:
            yield right, left, lambda *seen: _product(right, left, None, *seen)
        else:
            yield right, left, lambda *seen: _product(right.mT, left, _turned, *seen)
    elif func is torch.einsum:
        yield from _readings_of_einsum(args)


def _turned(tensor: Tensor) -> Tensor:
    return tensor.mT


def _convolution(
    transposed: bool, given: Mapping[str, Any], name: str, parameter: nn.Parameter, result: Tensor
) -> ConvolutionCall | None:
    weight = given["weight"]
    # Another shape of the kernel is the same matrix, if its rows are.
    same = weight.data_ptr() == parameter.data_ptr() and weight.shape[:1].numel() == len(parameter)
    if not same or weight.numel() != parameter.numel() or not (weight.is_contiguous() and parameter.is_contiguous()):
        return None
    geometry = Geometry.of_function(
        tuple(weight.shape),
        given.get("stride", 1),
        given.get("padding", 0),
        given.get("dilation", 1),
        given.get("groups", 1),
        transposed,
    )
    return ConvolutionCall(geometry, given["input"], result, name)


def _product(
    rows: Tensor,
    weight: Tensor,
    turned: Callable[[Tensor], Tensor] | None,
    name: str,
    parameter: nn.Parameter,
    result: Tensor,
) -> LinearCall | None:
    """Report ``rows @ weight.T``; turned, the result has the shape (..., outputs)."""
    weight = weight.detach()
    while weight.ndim > 2 and (len(weight) == 1 or weight.stride(0) == 0):  # spread over a batch
        weight = weight[0]
    if weight.ndim != 2:
        return None
    shape = (result if turned is None else turned(result)).shape
    whole = parameter.detach().reshape(len(parameter), -1)
    if (
        shape != (*rows.shape[:-1], len(weight))
        or weight.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    ):
        return None
    for transposed, seen in ((False, weight), (True, weight.T)):
        strides = zip(seen.shape, seen.stride(), whole.stride(), strict=True)
        first, between = divmod(int(seen.storage_offset() - whole.storage_offset()), max(whole.stride(0), 1))
        lies = all(mine == its for size, mine, its in strides if size > 1) and seen.shape[1] == whole.shape[1]
        if lies and not between and 0 <= first <= len(whole) - len(seen):
            part = None if len(seen) == len(whole) else (first, len(whole))
            return LinearCall(name, rows, result, part, transposed, turned)
    return None


def _readings_of_einsum(args: Sequence[Any]) -> Iterator[tuple[Any, Any, Report]]:
    """``torch.einsum("...i,io->...o", x, weight)`` and the like: what is summed over are inputs, what is left of a weight outputs."""
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    left, _, right = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    terms = left.split(",")
    if not right or len(terms) != 2 or len(operands) != 2 or not all(isinstance(each, Tensor) for each in operands):
        return
    for data, weight, seen, letters in (operands + terms, operands[::-1] + terms[::-1]):
        dots = "0123456789"[: data.ndim - len(seen.replace("...", ""))]  # a letter for each dimension that has none
        seen, letters, made = seen.replace("...", dots), letters.replace("...", ""), right.replace("...", dots)
        inputs, outputs = ([each for each in letters if (each in made) == kept] for kept in (False, True))
        rows = [each for each in made if each not in outputs]
        once = all(len(set(term)) == len(term) for term in (seen, letters, made))
        if once and inputs and outputs and len(letters) == weight.ndim and sorted(seen) == sorted(rows + inputs):
            yield data, weight, functools.partial(_summed, data, weight, seen, letters, made, rows, inputs, outputs)


def _summed(
    data: Tensor,
    weight: Tensor,
    seen: str,
    letters: str,
    made: str,
    rows: list[str],
    inputs: list[str],
    outputs: list[str],
    *of_parameter: Any,
) -> LinearCall | None:
    matrix = weight.detach().permute([letters.index(each) for each in outputs + inputs])
    sizes = (math.prod(matrix.shape[: len(outputs)]), math.prod(matrix.shape[len(outputs) :]))
    order = [made.index(each) for each in rows + outputs]
    activation = data.permute([seen.index(each) for each in rows + inputs]).flatten(len(rows))
    return _product(
        activation, matrix.reshape(sizes), lambda result: result.permute(order).flatten(len(rows)), *of_parameter
    )
