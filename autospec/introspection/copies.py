"""Copies of a model, and what keeps them apart from the model itself."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .errors import WatchError
from .hooks import Hook

T = TypeVar("T")

# What torch itself keeps in every module.
TORCHS = frozenset(vars(nn.Module()))


def copy_model(model: nn.Module, keep_hooks: Callable[[Callable], bool] = lambda _: True) -> nn.Module:
    """Copy a model, also one that keeps an activation in an attribute, which belongs to a graph that torch does not copy.

    Functions in attributes that hold the model, as ``lambda x: self.norm(x)`` or a wrapper around its forward pass, are made
    to hold the copy, which Python's own copy does not do.

    Parameters
    ----------
    model : nn.Module
        The model.
    keep_hooks : callable
        Says of each forward hook, before or after, whether the copy has it too.
    """
    memo: dict[int, Any] = {}
    hooks: list[Mapping[int, Callable]] = []
    for module in model.modules():
        hooks += [module._forward_hooks, module._forward_pre_hooks]
        for tensor in tensors_in(list(vars(module).values())):
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    memo |= {id(each): OrderedDict() for each in hooks}
    result = copy.deepcopy(model, memo)
    for each in hooks:
        kept = {key: hook for key, hook in each.items() if keep_hooks(hook)}
        memo[id(each)].update(copy.deepcopy(kept, memo))
    functions = _Functions(memo)
    for module in result.modules():
        if not hasattr(module, "_orig_mod"):  # what torch.compile made is made again by the copy itself
            vars(module).update({name: functions.of(item) for name, item in vars(module).items() if name not in TORCHS})
    return result


class _Functions:
    """Copies functions that hold a model which has been copied.

    Parameters
    ----------
    memo : dict of int to object
        What each object of the model has been copied to, by its identity.
    """

    def __init__(self, memo: Mapping[int, Any]) -> None:
        self._memo = memo
        self._made: dict[int, tuple[Any, Any]] = {}  # an identity is only unique while its object lives
        self._cells: dict[int, types.CellType] = {}

    def of(self, value: Any) -> Any:
        """The copy of a value; the value itself where it holds nothing that was copied."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, types.MethodType):
            owner, function = self.of(value.__self__), self.of(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(value, types.FunctionType):
            # torch.compile's: the copy runs as it is written.
            compiled = vars(value).get("_torchdynamo_orig_callable")
            return self.of(compiled) if compiled is not None else self._function(value)
        if isinstance(value, functools.partial):
            return functools.partial(self.of(value.func), *map(self.of, value.args), **self._items(value.keywords))
        if type(value) in (dict, list):  # a log, or a counter, which is not to see what the copy does
            made = type(value)()
            self._made[id(value)] = value, made  # it may hold itself
            if isinstance(value, dict):
                made.update(self._items(value))
            else:
                made.extend(map(self.of, value))
            return made
        if type(value) is tuple:
            found = tuple(map(self.of, value))
            return found if any(a is not b for a, b in zip(found, value, strict=True)) else value
        return value

    def _items(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.of(item) for key, item in values.items()}

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = function.__closure__ or ()
        if not (cells or function.__defaults__ or function.__kwdefaults__):
            return function
        fresh = [cell for cell in cells if id(cell) not in self._cells]
        self._cells |= {id(cell): types.CellType() for cell in fresh}
        made = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            closure=tuple(self._cells[id(cell)] for cell in cells) or None,
        )
        self._made[id(function)] = function, made  # it may hold itself
        for cell in fresh:
            try:
                self._cells[id(cell)].cell_contents = self.of(cell.cell_contents)
            except ValueError:  # nothing is in it yet
                continue
        made.__defaults__ = None if function.__defaults__ is None else tuple(map(self.of, function.__defaults__))
        made.__kwdefaults__ = None if function.__kwdefaults__ is None else self._items(function.__kwdefaults__)
        vars(made).update(self._items(vars(function)))
        return made


@contextmanager
def kept_apart(model: nn.Module, evaluated: bool = False) -> Iterator[set[nn.Module]]:
    """Let copies of a model run without a change of anything else.

    Parameters
    ----------
    model : nn.Module
        The model itself, of which a copy may hold a layer all the same: that is refused.
    evaluated : bool
        Whether modules outside of the model, which the copies call too, are in evaluation mode meanwhile.

    Yields
    ------
    set of nn.Module
        To which the copies' modules are to be added.

    Raises
    ------
    WatchError
        If a copy calls a layer of the model that has weights or statistics.
    """
    copied: set[nn.Module] = set()
    names = {module: name for name, module in model.named_modules() if _holds_tensors(module)}
    outside: dict[nn.Module, tuple[bool, list[tuple[Tensor, Tensor]]]] = {}

    def own_begins(module: nn.Module, args: Any) -> None:
        if module not in copied:
            raise WatchError(
                f"a copy of the model, with which samples are followed through it, calls '{names[module]}' of the model itself: "
                "something in an attribute holds that layer where a copy cannot be made to hold its own. Call the layer in a "
                "method of the model, or give rows= for all watched layers."
            )

    def any_begins(module: nn.Module, args: Any) -> None:
        if module in copied or module in names or module in outside or not _holds_tensors(module):
            return
        outside[module] = module.training, [(b, b.clone()) for b in module._buffers.values() if b is not None]
        module.training = module.training and not evaluated

    handles = [module.register_forward_pre_hook(Hook(own_begins), prepend=True) for module in names]
    # A hook for all modules has compiled parts compiled for it alone.
    if not any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        handles.append(register_module_forward_pre_hook(Hook(any_begins)))
    try:
        yield copied
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for module, (training, buffers) in outside.items():
                module.training = training
                for buffer, value in buffers:
                    buffer.copy_(value)


def _holds_tensors(module: nn.Module) -> bool:
    """Whether a module has weights or statistics of its own."""
    return any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in arguments, in containers of any depth."""
    return instances_in(value, Tensor)


def instances_in(value: Any, kind: type[T]) -> Iterator[T]:
    """Everything of a kind in arguments, in containers of any depth."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from instances_in(item, kind)
