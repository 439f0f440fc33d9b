"""What torch's functions do with data and a weight, as far as they are products, convolutions or sums of these."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .call import LayerCall
from .convolution import ConvolutionCall, Geometry
from .embedding import SpreadCall
from .followed import Call
from .linear import LinearCall

LINEAR = (F.linear, torch.inner, Tensor.inner)
MATMUL = (
    *(torch.matmul, Tensor.matmul, torch.linalg.matmul, torch.mm, Tensor.mm),
    *(torch.bmm, Tensor.bmm, torch.mv, Tensor.mv),
)
ADDMM = (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
CONVOLUTION = (F.conv1d, F.conv2d, F.conv3d)
CONVOLUTION_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True, eq=False)
class Reading:
    """A way to read a call as one of data with a weight.

    Attributes
    ----------
    data, weight : Tensor
        The two.
    form : callable
        Brings the weight into the form in which it is used: a matrix (outputs, inputs), or a kernel.
    lies : callable
        Takes a parameter; returns which rows of it that form has, None for all, and whether it has them transposed; or None, where it
        is no such part of the parameter.
    report : callable
        Makes what a rule would report, of the parameter's name, the shape of the form, the two of ``lies``, and what was returned.
    bias : Tensor or None
        What is added to each row of what is returned.
    """

    data: Any
    weight: Any
    form: Callable[[Tensor], Tensor]
    lies: Callable[[nn.Parameter], tuple[tuple[int, int] | None, bool] | None]
    report: Callable[[str, torch.Size, tuple[int, int] | None, bool, Tensor], LayerCall | None]
    bias: Any = None


def _named(names: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def readings_of(call: Call) -> Iterator[Reading]:
    """Ways to read a call as a product or a convolution, of which the weight of the first that is made of weights holds."""
    func, args, kwargs = call.func, call.args, call.kwargs
    if func in CONVOLUTION or func in CONVOLUTION_TRANSPOSED:
        names = "input weight bias stride padding dilation groups"
        if func in CONVOLUTION_TRANSPOSED:
            names = "input weight bias stride padding output_padding groups dilation"
        yield _convolution(func in CONVOLUTION_TRANSPOSED, _named(names, args, kwargs))
    elif func in LINEAR:
        given = _named("input weight bias" if func is F.linear else "input other", args, kwargs)
        yield from _product(given["input"], given["weight" if func is F.linear else "other"], bias=given.get("bias"))
    elif func in MATMUL or func in ADDMM:
        tensors = [t for t in call.tensors if t is not kwargs.get("out")]
        factors = [
            *(each for each in args if not isinstance(each, Tensor)),
            kwargs.get("alpha", 1),
            kwargs.get("beta", 1),
        ]
        if any(factor != 1 for factor in factors) or len(tensors) < 2:
            return
        left, right = tensors[-2:]
        bias = tensors[0] if func in ADDMM else None
        if right.ndim > 1:
            yield from _product(left, right, _turned, bias=bias)
            yield from _product(right.mT, left, turned=_turned, data=right)
        else:
            yield from _product(left, right, _as_row, _as_column)
            yield from _product(right, left)
    elif func is torch.einsum:
        yield from _readings_of_einsum(args)


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor."""
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    return tensor.mT


def _as_row(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0)


def _as_column(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1)


def _convolution(transposed: bool, given: Mapping[str, Any]) -> Reading:
    weight = given["weight"]

    def lies(parameter: nn.Parameter) -> tuple[None, bool] | None:
        # Another shape of the kernel is the same matrix, if its rows are.
        same = weight.data_ptr() == parameter.data_ptr() and len(weight) == len(parameter)
        whole = weight.numel() == parameter.numel() and weight.is_contiguous() and parameter.is_contiguous()
        return (None, False) if same and whole else None

    def report(name: str, shape: torch.Size, _: Any, __: bool, result: Tensor) -> ConvolutionCall:
        stride, padding, dilation = given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)
        geometry = Geometry.of_function(tuple(shape), stride, padding, dilation, given.get("groups", 1), transposed)
        return ConvolutionCall(geometry, given["input"], result, name)

    return Reading(given["input"], weight, as_it_is, lies, report, given.get("bias"))


def _product(
    rows: Any,
    weight: Any,
    form: Callable[[Tensor], Tensor] = as_it_is,
    turned: Callable[[Tensor], Tensor] | None = None,
    data: Any = None,
    bias: Any = None,
) -> Iterator[Reading]:
    """``rows @ form(weight).T``, if that is a matrix; turned, the result has the shape (..., outputs).

    The rows may be a view of the data.
    """

    def matrix(tensor: Tensor) -> Tensor:
        tensor = form(tensor)
        while tensor.ndim > 2 and (len(tensor) == 1 or tensor.stride(0) == 0):  # spread over a batch
            tensor = tensor[0]
        return tensor

    def lies(parameter: nn.Parameter) -> tuple[tuple[int, int] | None, bool] | None:
        return _rows_of(parameter.detach().reshape(len(parameter), -1), matrix(weight.detach()))

    def report(
        name: str, shape: torch.Size, part: tuple[int, int] | None, transposed: bool, result: Tensor
    ) -> LinearCall | None:
        made = result if turned is None else turned(result)
        fits = len(shape) == 2 and made.shape == (*rows.shape[:-1], shape[0])
        return LinearCall(name, rows, result, part, transposed, turned) if fits else None

    if isinstance(weight, Tensor) and matrix(weight.detach()).ndim == 2:
        yield Reading(rows if data is None else data, weight, matrix, lies, report, bias)


def mask_of_scores(call: Call) -> tuple[Tensor, torch.Size, Tensor] | None:
    """The mask of an attention, the shape of the scores to which it is added, and the queries, which tell whose they are."""
    given = _named("query key value attn_mask", call.args, call.kwargs)
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    if mask is None:
        return None
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    return mask, torch.Size((*batch, query.shape[-2], key.shape[-2])), query[..., :1]


def spread_over(shape: torch.Size, data: Tensor, table: Tensor) -> tuple[Tensor, Reading]:
    """A table as broadcasting spreads it, and that as a lookup of its rows, of which each row of data meets one."""
    spread = [dim for dim, size in enumerate(table.shape[:-1]) if size > 1 and not table.stride(dim)]  # already

    def form(tensor: Tensor) -> Tensor:
        for dim in spread:
            tensor = tensor.narrow(dim, 0, 1)
        return tensor

    own = form(table.detach())
    width = own.shape[-1] if own.ndim else 1  # 1 where one number meets whole rows
    rows = own.numel() // max(width, 1)
    index = torch.arange(rows, device=own.device).view(own.shape[:-1]).expand(shape[:-1])
    placed = table.expand(shape)

    def lies(parameter: nn.Parameter) -> tuple[tuple[int, int] | None, bool] | None:
        found = _rows_of(parameter.detach().reshape(len(parameter), -1), own.reshape(rows, width))
        return None if found is None or found[1] else found

    def report(name: str, _: torch.Size, part: tuple[int, int] | None, __: bool, ___: Tensor) -> SpreadCall:
        first, total = part or (0, rows)
        return SpreadCall(name, data.expand(shape), index + first, placed, total, width != shape[-1])

    return placed, Reading(data, table, form, lies, report)


def _rows_of(whole: Tensor, matrix: Tensor) -> tuple[tuple[int, int] | None, bool] | None:
    """Which rows of a matrix another one is, or, transposed, its transpose is, by where they lie."""
    if matrix.ndim != 2 or matrix.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    (many, width), (over_rows, over_columns) = whole.shape, whole.stride()
    first, between = divmod(int(matrix.storage_offset() - whole.storage_offset()), max(over_rows, 1))
    for transposed, seen in ((False, matrix), (True, matrix.T)):
        (rows, columns), (rows_apart, columns_apart) = seen.shape, seen.stride()
        apart = rows > 1 and rows_apart != over_rows, columns > 1 and columns_apart != over_columns
        if columns == width and not any(apart) and not between and 0 <= first <= many - rows:
            return None if rows == many else (first, many), transposed
    return None


def _readings_of_einsum(args: Sequence[Any]) -> Iterator[Reading]:
    """``torch.einsum("...i,io->...o", x, weight)`` and the like: what is summed over are inputs, what is left of a weight outputs."""
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    left, arrow, right = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    terms = left.split(",")
    if not arrow:
        alone = sorted(each for each in left if left.count(each) == 1 and each.isalpha())
        right = ("..." if "..." in left else "") + "".join(alone)
    if not right or len(terms) != 2 or len(operands) != 2 or not all(isinstance(each, Tensor) for each in operands):
        return
    for data, weight, seen, letters in (operands + terms, operands[::-1] + terms[::-1]):
        dots = "0123456789"[: data.ndim - len(seen.replace("...", ""))]  # a letter for each dimension that has none
        seen, letters, made = seen.replace("...", dots), letters.replace("...", ""), right.replace("...", dots)
        inputs, outputs = ([each for each in letters if (each in made) == kept] for kept in (False, True))
        rows = [each for each in made if each not in outputs]
        once = all(len(set(term)) == len(term) for term in (seen, letters, made))
        if once and inputs and outputs and len(letters) == weight.ndim and sorted(seen) == sorted(rows + inputs):
            yield from _product(
                _permuted(data, [seen.index(each) for each in rows + inputs], len(rows)),
                weight,
                functools.partial(
                    _as_matrix, order=[letters.index(each) for each in outputs + inputs], first=len(outputs)
                ),
                functools.partial(_permuted, order=[made.index(each) for each in rows + outputs], first=len(rows)),
                data,
            )


def _permuted(tensor: Tensor, order: list[int], first: int) -> Tensor:
    """Dimensions in an order, and those after the first ones as one."""
    return tensor.permute(order).flatten(first)


def _as_matrix(tensor: Tensor, order: list[int], first: int) -> Tensor:
    tensor = tensor.permute(order)
    return tensor.reshape(math.prod(tensor.shape[:first]), -1)
