"""Weights that a model itself multiplies with data: ``x @ self.weight``, ``F.linear(x, mask * self.layer.weight)``.

Who writes a layer, or gives one of torch's another forward pass or another weight, calls torch's functions with it.  While the
model runs, a TorchFunctionMode looks on at these calls and reports each as a rule reports a layer's.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from ..arguments import replaced, tensors_in
from ..errors import WatchError
from ..generators import restore_random_state, torch_random_state
from ..hooks import Hook, outside_graphs
from ..spectra import float64
from .attention import looked_through
from .call import LayerCall, Place
from .convolution import ConvolutionCall, Geometry
from .embedding import SpreadCall
from .linear import LinearCall

LINEAR = (F.linear, torch.inner, Tensor.inner)
MATMUL = (torch.matmul, Tensor.matmul, torch.linalg.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
ADDMM = (torch.addmm, Tensor.addmm)
# Where each number of a table meets one of data, or several, which broadcasting gives it.
ELEMENTWISE = (
    *(torch.add, Tensor.add, Tensor.add_, torch.sub, Tensor.sub, Tensor.sub_, torch.rsub),
    *(torch.mul, Tensor.mul, Tensor.mul_, torch.div, Tensor.div, Tensor.div_, torch.where, Tensor.where),
)
CONVOLUTION = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
# What autograd does not follow.
DETACHED = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
ASSIGNED = (Tensor.data.__set__,)  # type: ignore[attr-defined]
# Largest deviation of a weight that is computed again in float64, in units of its largest number.
COMPUTED_AGAIN = 1e-3


@dataclass(frozen=True, eq=False)
class Made:
    """What is computed of weights alone: by which function, of what, and as which of its results."""

    tensor: Tensor
    weights: tuple[nn.Parameter, ...]
    by: tuple[Callable, tuple[Any, ...], dict[str, Any], int] | None = None


class FollowedWeights(TorchFunctionMode):
    """Follows weights through a forward pass, and what is computed of them, until they meet data.

    Parameters
    ----------
    weights : iterable of Parameter
        The weights.
    constants : iterable of Tensor
        What is no data, such as the model's buffers.
    tables : iterable of Parameter
        Weights of nn.Embedding that are followed through its lookups, which are made of them and of whole numbers alone.

    Attributes
    ----------
    made : dict of int to Made
        What is made of the weights, by its identity.
    fresh : dict of int to Tensor
        What is made of nothing, by its identity, such as a mask; but where it is multiplied with a weight, as a first state of zeros,
        it is data.
    within : list of collections of int
        For each layer that is running, whose rule reports its uses, the identities of its weights.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], constants: Iterable[Tensor], tables: Iterable[nn.Parameter] = ()
    ) -> None:
        super().__init__()
        self._tables = set(map(id, tables))
        # An identity is only unique while its object lives.
        self.made = {id(weight): Made(weight, (weight,)) for weight in weights}
        self._constants = {id(tensor): tensor for tensor in constants}
        self.fresh: dict[int, Tensor] = {}
        self.within: list[Collection[int]] = []

    @abstractmethod
    def carry_out(
        self,
        func: Callable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: Sequence[nn.Parameter],
        with_data: bool,
    ) -> Any:
        """Call a function with what is made of weights, and maybe with data; return what shall be its result."""

    @outside_graphs
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ASSIGNED:
            return func(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        # Without gradients, as for the target of a moving average, a weight is data; so is a number that is made of weights, such as
        # a penalty, but what is computed of both is made of weights again.
        weights = self._weights([t for t in given if t.ndim]) if torch.is_grad_enabled() else []
        if not weights:
            result = func(*args, **kwargs)
            if all(map(self.holds, given)):
                self.note(func, args, kwargs, result)
            elif isinstance(result, Tensor):
                for known in (self._constants, self.fresh):  # data were written into it
                    known.pop(id(result), None)
            return result
        if func is F.multi_head_attention_forward:
            with self:
                return looked_through()(*args, **kwargs)
        return self.carry_out(func, args, kwargs, weights, any(map(self._is_data, given)))

    def _weights(self, tensors: Iterable[Tensor]) -> list[nn.Parameter]:
        """Of which weights tensors are made, but for those of the layer that is running."""
        own = self.within[-1] if self.within else ()
        weights = dict.fromkeys(w for t in tensors if id(t) in self.made for w in self.made[id(t)].weights)
        return [w for w in weights if id(w) not in own or id(w) in self._tables]

    def _is_data(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and not self.holds(tensor) and not isinstance(tensor, nn.Parameter)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of weights or constants, or of nothing."""
        return any(id(tensor) in known for known in (self.made, self._constants, self.fresh))

    def note(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note what a function has made of weights, or of constants, as weights are where autograd does not follow."""
        given = list(tensors_in((args, kwargs)))
        weights = tuple(self._weights(given))
        if not weights or func in DETACHED or not torch.is_grad_enabled():
            known = self._constants if any(id(t) not in self.fresh for t in given) else self.fresh
            known |= {id(t): t for t in tensors_in(result) if not self.holds(t)}
            return
        for number, tensor in enumerate(tensors_in(result)):
            self.made.setdefault(id(tensor), Made(tensor, weights, (func, args, kwargs, number)))

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


class FunctionalUses(FollowedWeights):
    """Reports products and convolutions of data with some weights, or with what is computed of them.

    Parameters
    ----------
    weights : mapping of Parameter to (str, str)
        The matrices, and the place under which uses of each are reported.
    constants : iterable of Tensor
        What is no data, such as the model's buffers.
    on_call : callable
        Takes the place, what a rule would report, and what the function returned; may return what shall stand in for it.
    on_other : callable, optional
        Takes the place of a weight that meets data in another way, and the name of the function.  With it weights that are computed
        again, of which the shares are made, are compared with those that the model computed.
    tables : iterable of Parameter
        As for `FollowedWeights`.
    """

    def __init__(
        self,
        weights: Mapping[nn.Parameter, Place],
        constants: Iterable[Tensor],
        on_call: Callable[[Place, LayerCall, Tensor], Tensor | None],
        on_other: Callable[[Place, str], object] | None = None,
        tables: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__(weights, constants, tables)
        self.places, self.on_call, self.on_other = weights, on_call, on_other

    def carry_out(
        self,
        func: Callable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: Sequence[nn.Parameter],
        with_data: bool,
    ) -> Any:
        """Call the function, and report it."""
        readings = list(_readings(func, args, kwargs))
        spread = self._spread(func, args, kwargs)
        if spread is not None:
            placed, reading = spread
            others = {id(reading.weight): placed}
            args, kwargs, readings = replaced(args, others), replaced(kwargs, others), [reading]
        result = func(*args, **kwargs)
        calls = list(self._reported(readings, result))
        for place, call in calls:
            replacement = self.on_call(place, call, result)
            result = result if replacement is None else replacement
        if calls:
            return result
        if not with_data:
            self.note(func, args, kwargs, result)
        elif self.on_other is not None:
            for weight in weights:
                self.on_other(self.places[weight], getattr(func, "__name__", str(func)))
        return result

    def _spread(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Reading] | None:
        """A table that meets data elementwise, spread over these as broadcasting would spread it, and how to read that."""
        given = [t for t in tensors_in((args, kwargs)) if t.ndim]
        tables = {id(t): t for t in given if id(t) in self.made}
        data = [t for t in given if self._is_data(t) and t.is_floating_point()]
        if func not in ELEMENTWISE or len(tables) != 1 or not data:
            return None
        (table,) = tables.values()
        try:
            shape = torch.broadcast_shapes(*(t.shape for t in given))
        except RuntimeError:  # torch is about to say so itself
            return None
        changed = func.__name__.endswith("_") and args[0] is table
        return None if changed or table.shape[-1] != shape[-1] else _spread_over(shape, data[0], table)

    def _reported(self, readings: Iterable[Reading], result: Any) -> Iterator[tuple[Place, LayerCall]]:
        """What a rule would report for each weight, if one tensor that is made of weights meets data in such a way."""
        for reading in readings if isinstance(result, Tensor) else ():
            data, weight = reading.data, reading.weight
            if not (isinstance(data, Tensor) and isinstance(weight, Tensor)) or data.layout != torch.strided:
                continue
            if id(weight) not in self.made or (self.holds(data) and id(data) not in self.fresh):
                continue
            made = self.made[id(weight)]
            lies = reading.lies(made.weights[0]) if len(made.weights) == 1 else None
            if lies is not None:
                place = self.places[made.weights[0]]
                call = reading.report(place[1], reading.form(weight).shape, *lies, result)
                yield from [] if call is None else [(place, call)]
                return
            formed, leaves = self._computed_again(reading)
            for parameter, leaf in leaves.items():
                place = self.places[parameter]
                call = reading.report(place[1], formed.shape, None, False, result)
                if call is not None:
                    call.computed = functools.partial(_pulled_back, formed, leaf)
                    yield place, call
            return

    def _computed_again(self, reading: Reading) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """A weight as it enters a product, computed again in float64 of leaves of a graph of its own; no leaves if that fails."""
        weight = reading.weight
        made = self.made[id(weight)]
        leaves = {w: float64(w.detach()).clone().requires_grad_() for w in made.weights}
        again: dict[int, Tensor] = {}

        def computed(tensor: Tensor) -> Tensor:
            if id(tensor) not in again:
                known = self.made.get(id(tensor))
                if known is None or set(leaves).isdisjoint(known.weights):
                    wide = tensor.is_floating_point()
                    again[id(tensor)] = float64(tensor.detach()).clone() if wide else tensor.detach().clone()
                elif known.by is None:
                    again[id(tensor)] = leaves[known.weights[0]]
                else:
                    func, args, kwargs, number = known.by
                    others = {id(t): computed(t) for t in tensors_in((args, kwargs))}
                    results = tensors_in(func(*replaced(args, others), **replaced(kwargs, others)))
                    again[id(tensor)] = list(results)[number]
            return again[id(tensor)]

        before = torch_random_state(weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            formed = reading.form(computed(weight))
        after = torch_random_state(weight.device)
        if not all(torch.equal(before[name], after[name]) for name in before):
            restore_random_state(before, weight.device)
            names = [".".join(filter(None, self.places[w])) for w in made.weights]
            raise WatchError(
                f"the model draws parts of {', '.join(map(repr, names))} at random before it multiplies with it, so its shares "
                f"cannot be told: leave it out with layers={[f'!{name}' for name in names]}."
            )
        if self.on_other is not None:
            seen = float64(reading.form(weight.detach()))
            if not (formed.detach() - seen).abs().max() <= COMPUTED_AGAIN * seen.abs().max():
                return formed, {}
        return formed, leaves


def _pulled_back(formed: Tensor, leaf: Tensor, share: Tensor) -> Tensor:
    """Share of a parameter, of which a weight was computed, from that of the weight: as a matrix, shape of the parameter."""
    outside = share.reshape(formed.shape).to(formed)
    (gradient,) = torch.autograd.grad(formed, leaf, outside, retain_graph=True, allow_unused=True)
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    return (gradient.to_dense() if gradient.is_sparse else gradient).reshape(len(leaf), -1).to(share)


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
    """

    data: Any
    weight: Any
    form: Callable[[Tensor], Tensor]
    lies: Callable[[nn.Parameter], tuple[tuple[int, int] | None, bool] | None]
    report: Callable[[str, torch.Size, tuple[int, int] | None, bool, Tensor], LayerCall | None]


def _named(names: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _readings(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Reading]:
    if func in CONVOLUTION or func in TRANSPOSED:
        names = "input weight bias stride padding dilation groups"
        if func in TRANSPOSED:
            names = "input weight bias stride padding output_padding groups dilation"
        yield _convolution(func in TRANSPOSED, _named(names, args, kwargs))
    elif func in LINEAR:
        given = _named("input weight" if func is F.linear else "input other", args, kwargs)
        yield _product(given["input"], given["weight"] if func is F.linear else given["other"])
    elif func in MATMUL or func in ADDMM:
        given = _named("input mat2" if func in MATMUL else "bias input mat2", args, kwargs)
        left, right = given.get("input", given.get("mat1")), given.get("mat2", given.get("other"))
        if kwargs.get("alpha", 1) != 1 or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return
        if right.ndim > 1:
            yield _product(left, right, _turned)
            yield _product(right.mT, left, turned=_turned, data=right)
        else:
            yield _product(right, left)
    elif func is torch.einsum:
        yield from _readings_of_einsum(args)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    return tensor.mT


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

    return Reading(given["input"], weight, _as_it_is, lies, report)


def _product(
    rows: Any,
    weight: Any,
    form: Callable[[Tensor], Tensor] = _as_it_is,
    turned: Callable[[Tensor], Tensor] | None = None,
    data: Any = None,
) -> Reading:
    """``rows @ form(weight).T``; turned, the result has the shape (..., outputs).  The rows may be a view of the data."""

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

    return Reading(rows if data is None else data, weight, matrix, lies, report)


def _spread_over(shape: torch.Size, data: Tensor, table: Tensor) -> tuple[Tensor, Reading]:
    """A table as broadcasting spreads it, and that as a lookup of its rows, of which each row of data meets one."""
    width = shape[-1]
    rows = table.numel() // max(width, 1)
    index = torch.arange(rows, device=table.device).view(table.shape[:-1]).expand(shape[:-1])
    placed = table.expand(shape)

    def lies(parameter: nn.Parameter) -> tuple[tuple[int, int] | None, bool] | None:
        found = _rows_of(parameter.detach().reshape(len(parameter), -1), table.detach().reshape(rows, width))
        return None if found is None or found[1] else found

    def report(name: str, _: torch.Size, part: tuple[int, int] | None, __: bool, ___: Tensor) -> SpreadCall:
        first, total = part or (0, rows)
        return SpreadCall(name, data.expand(shape), index + first, placed, total)

    return placed, Reading(data, table, _as_it_is, lies, report)


def _rows_of(whole: Tensor, matrix: Tensor) -> tuple[tuple[int, int] | None, bool] | None:
    """Which rows of a matrix another one is, or, transposed, its transpose is, by where they lie."""
    if matrix.ndim != 2 or matrix.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    for transposed, seen in ((False, matrix), (True, matrix.T)):
        strides = zip(seen.shape, seen.stride(), whole.stride(), strict=True)
        lies = all(mine == its for size, mine, its in strides if size > 1) and seen.shape[1] == whole.shape[1]
        offset = int(seen.storage_offset() - whole.storage_offset())
        first, between = divmod(offset, max(whole.stride(0), 1))
        if lies and not between and 0 <= first <= len(whole) - len(seen):
            return None if len(seen) == len(whole) else (first, len(whole)), transposed
    return None


def _readings_of_einsum(args: Sequence[Any]) -> Iterator[Reading]:
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
            yield _product(
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
