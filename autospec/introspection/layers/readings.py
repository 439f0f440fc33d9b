"""What torch's functions do with data and a weight, as far as they are products, convolutions or sums of these."""

from __future__ import annotations

import functools
import math
import string
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
from .linear import LinearCall, SeparateCall

LINEAR = (F.linear, torch.inner, Tensor.inner)
MATMUL = (
    *(torch.matmul, Tensor.matmul, torch.linalg.matmul, torch.mm, Tensor.mm),
    *(torch.bmm, Tensor.bmm, torch.mv, Tensor.mv),
)
ADDMM = (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
SELECT = (torch.index_select, Tensor.index_select)
GATHER = (torch.gather, Tensor.gather)
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
    separate : bool
        Whether the weight has a matrix for each of several parts of the data.
    """

    data: Any
    weight: Any
    form: Callable[[Tensor], Tensor]
    lies: Callable[[nn.Parameter], tuple[tuple[int, int] | None, bool] | None]
    report: Callable[[str, torch.Size, tuple[int, int] | None, bool, Tensor], LayerCall | None]
    bias: Any = None
    separate: bool = False


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
            yield from _readings_of_matmul(left, right) if bias is None else ()
        else:
            yield from _product(left, right, _as_row, _as_column)
            yield from _product(right, left)
    elif func is torch.einsum:
        yield from _readings_of_einsum(args)
    elif func is torch.tensordot:
        given = _named("a b dims", args, kwargs)
        yield from _readings_of_tensordot(given["a"], given["b"], given.get("dims", 2))
    elif func is F.bilinear:
        yield _bilinear(**_named("input1 input2 weight bias", args, kwargs))


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


def rows_looked_up(call: Call) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """The table in which a call looks up rows by an index, and the same call for another table of that form."""
    func, args, kwargs = call.func, call.args, call.kwargs
    if func is F.embedding:
        given = _named("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs)
        rest = {key: each for key, each in given.items() if key not in ("input", "weight", "norm_type")}
        # With any of these not all that is looked up has a share.
        if any(each is not None and each is not False for each in rest.values()):
            return None
        return given["weight"], lambda table: F.embedding(given["input"], table)
    given = _named("input dim index", args, kwargs)
    table, dim, index = (given.get(name) for name in ("input", "dim", "index"))
    if func is Tensor.__getitem__:
        whole = _takes_whole_rows(args[1] if isinstance(args[1], tuple) else (args[1],), args[0].ndim)
        return (args[0], lambda other: other[args[1]]) if whole else None
    if not (isinstance(table, Tensor) and isinstance(dim, int) and isinstance(index, Tensor)):
        return None
    whole = dim % max(table.ndim, 1) < table.ndim - 1
    if func in SELECT and whole:
        return table, lambda other: torch.index_select(other, dim, index)
    if func in GATHER and whole and index.ndim and index.stride(-1) == 0 and index.shape[-1] == table.shape[-1]:
        return table, lambda other: torch.gather(other, dim, index[..., :1])
    return None


def _takes_whole_rows(key: tuple[Any, ...], ndim: int) -> bool:
    """Whether an index into a tensor leaves its last dimension as it is, and last."""
    taken = sum(
        each.ndim
        if isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)
        else each is not None and each is not Ellipsis
        for each in key
    )
    last, shortened = key[-1], any(each is Ellipsis for each in key)
    whole = isinstance(last, slice) and last == slice(None)
    return whole or (taken < ndim and (last is Ellipsis or not shortened))


def looked_up(table: Tensor, result: Tensor, again: Callable[[Tensor], Tensor]) -> Reading | None:
    """A lookup of whole rows of a table, as `rows_looked_up` has found it."""
    numbers = torch.arange(table[..., 0].numel(), device=table.device).view(*table.shape[:-1], 1)
    index = again(numbers)[..., 0] if table.ndim > 1 else numbers
    if index.shape != result.shape[:-1] or result.shape[-1] != table.shape[-1]:
        return None
    return _rows_met(table, as_it_is, index, lambda made: (made, made))


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
    rows, width = _in_rows(own).shape
    index = torch.arange(rows, device=own.device).view(own.shape[:-1]).expand(shape[:-1])
    placed = table.expand(shape)
    return placed, _rows_met(table, form, index, lambda _: (data.expand(shape), placed), width != shape[-1])


def _in_rows(table: Tensor) -> Tensor:
    """A table as a matrix, whose rows have one number where a single one meets whole rows."""
    return table.reshape(math.prod(table.shape[:-1]), table.shape[-1] if table.ndim else 1)


def _rows_met(
    table: Tensor,
    form: Callable[[Tensor], Tensor],
    index: Tensor,
    met: Callable[[Tensor], tuple[Tensor, Tensor]],
    narrow: bool = False,
) -> Reading:
    """Rows of a table that meet data, each at some places.

    Parameters
    ----------
    table : Tensor
        The table.
    form : callable
        Leaves each row of it once.
    index : Tensor of int
        Which row there is at each place.
    met : callable
        Takes what was returned; returns the data, and the rows where they are met.
    narrow : bool
        As for `SpreadCall`.
    """
    own = _in_rows(form(table.detach()))

    def lies(parameter: nn.Parameter) -> tuple[tuple[int, int] | None, bool] | None:
        found = _rows_of(parameter.detach().reshape(len(parameter), -1), own)
        return None if found is None or found[1] else found

    def report(name: str, _: torch.Size, part: tuple[int, int] | None, __: bool, result: Tensor) -> SpreadCall:
        first, total = part or (0, len(own))
        data, placed = met(result)
        return SpreadCall(name, data, index + first, placed, total, narrow)

    return Reading(table, table, form, lies, report)


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
        yield from _by_letters(
            data, data, weight, seen.replace("...", dots), letters.replace("...", ""), right.replace("...", dots)
        )


def _readings_of_tensordot(left: Tensor, right: Tensor, dims: Any) -> Iterator[Reading]:
    """``torch.tensordot``: over the last dimensions of the one and the first of the other, so many, or over those that are named."""
    if isinstance(dims, int):
        dims = list(range(left.ndim - dims, left.ndim)), list(range(dims))
    if not (isinstance(dims, list | tuple) and len(dims) == 2 and all(isinstance(some, list | tuple) for some in dims)):
        return
    of_left = string.ascii_lowercase[: left.ndim]
    of_right = list(string.ascii_uppercase[: right.ndim])
    for one, other in zip(*dims, strict=True):
        of_right[other] = of_left[one]
    made = "".join(each for each in (*of_left, *of_right) if (each in of_left) != (each in of_right))
    yield from _by_letters(left, left, right, of_left, "".join(of_right), made)
    yield from _by_letters(right, right, left, "".join(of_right), of_left, made)


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Reading:
    """``torch.nn.functional.bilinear``: a product with all products of a number of the one and one of the other."""

    def lies(parameter: nn.Parameter) -> tuple[None, bool] | None:
        return (None, False) if parameter is weight else None

    def report(name: str, _: torch.Size, __: Any, ___: bool, result: Tensor) -> LinearCall:
        products = input1.detach().unsqueeze(-1) * input2.detach().unsqueeze(-2)
        return LinearCall(name, products.flatten(-2), result)

    return Reading(input1, weight, lambda kernel: kernel.flatten(1), lies, report, bias)


def _readings_of_matmul(left: Tensor, right: Tensor) -> Iterator[Reading]:
    """Products of matrices where the weight has several, such as one for each region."""
    many = max(left.ndim, right.ndim) - 2
    batch = "abcdefgh"[:many]
    for data, weight, rows, matrix in ((left, right, "xy", "yz"), (right, left, "yz", "xy")):
        of_data, of_weight = (batch[many - each.ndim + 2 :] for each in (data, weight))
        if data.ndim > 1 and weight.ndim > 2 and 1 not in weight.shape[:-2]:
            # What the data have once for all parts has no letter for these.
            once = [dim for dim, each in enumerate(of_data) if data.shape[dim] == 1 and each in of_weight]
            of_data = "".join(each for dim, each in enumerate(of_data) if dim not in once)
            yield from _by_letters(data, data.squeeze(once), weight, of_data + rows, of_weight + matrix, batch + "xz")


def _by_letters(given: Tensor, data: Tensor, weight: Tensor, seen: str, letters: str, made: str) -> Iterator[Reading]:
    """``torch.einsum(f"{seen},{letters}->{made}", data, weight)``; letters that all three have are parts with weights of their own.

    The data are a view of what was given.
    """
    inputs, outputs = ([each for each in letters if (each in made) == kept] for kept in (False, True))
    parts = [each for each in outputs if each in seen]
    outputs = [each for each in outputs if each not in parts]
    rows = [each for each in made if each not in letters]
    once = all(len(set(term)) == len(term) for term in (seen, letters, made))
    fits = len(letters) == weight.ndim and sorted(seen) == sorted(rows + parts + inputs)
    if not (once and inputs and fits):
        return
    sizes = dict(zip(seen, data.shape, strict=True))
    if any(sizes.get(letter, size) != size for letter, size in zip(letters, weight.shape, strict=True)):
        return  # what is one for all is broadcast
    as_rows = _permuted(data, [seen.index(each) for each in rows + parts + inputs], len(rows))
    form = functools.partial(
        _as_matrix,
        order=[letters.index(each) for each in parts + outputs + inputs],
        first=len(parts + outputs),
    )
    turned = functools.partial(_permuted, order=[made.index(each) for each in rows + parts + outputs], first=len(rows))
    if not parts and outputs:
        yield from _product(as_rows, weight, form, turned, given)
    elif parts:

        def report(name: str, kernel: torch.Size, _: Any, __: bool, result: Tensor) -> SeparateCall:
            return SeparateCall(name, as_rows, result, (kernel[0], kernel[1]), turned)

        yield Reading(given, weight, form, lambda _: None, report, separate=True)


def _permuted(tensor: Tensor, order: list[int], first: int) -> Tensor:
    """Dimensions in an order, and those after the first ones as one."""
    return tensor.permute(order).flatten(first)


def _as_matrix(tensor: Tensor, order: list[int], first: int) -> Tensor:
    tensor = tensor.permute(order)
    return tensor.reshape(math.prod(tensor.shape[:first]), -1)
