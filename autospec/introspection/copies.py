"""Copies of a model, what keeps them apart from the model itself, and what a pass through them must leave as it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize

from .arguments import instances_in, tensors_in
from .errors import WatchError
from .hooks import Hook

# What torch itself keeps in every module.
OF_TORCH = frozenset(vars(nn.Module()))


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
    kept = [{key: hook for key, hook in each.items() if keep_hooks(hook)} for each in hooks]
    copied = [copy.deepcopy(each, memo) for each in kept]
    functions = _Functions(memo)
    for each, of_copy in zip(hooks, copied, strict=True):
        memo[id(each)].update(functions.mended(of_copy))
    for module in result.modules():
        if not hasattr(module, "_orig_mod"):  # what torch.compile made is made again by the copy itself
            own = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
            vars(module).update(functions.mended(own))
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
        self._private = {id(each) for each in memo.values()}
        self._made: dict[int, tuple[Any, Any]] = {}  # an identity is only unique while its object lives
        self._cells: dict[int, types.CellType] = {}

    def mended(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """What a copied module holds, with functions that hold the copy; in lists and dicts, which are the copy's own, in place."""
        return {name: self._mended(value) for name, value in values.items()}

    def _mended(self, value: Any) -> Any:
        if isinstance(value, dict | list) and id(value) in self._private:
            self._private.discard(id(value))  # once is enough, and it may hold itself
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if (found := self._mended(item)) is not item:
                    value[key] = found
            return value
        if type(value) is tuple:
            found = tuple(map(self._mended, value))
            return found if any(a is not b for a, b in zip(found, value, strict=True)) else value
        return self._of(value)

    def _of(self, value: Any) -> Any:
        """The copy of a value; the value itself where it holds nothing that was copied."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if id(value) in self._made:
            return self._made[id(value)][1]
        if not self._holds_copied(value, set()):
            return value
        if isinstance(value, types.MethodType):
            return types.MethodType(self._of(value.__func__), self._of(value.__self__))
        if isinstance(value, types.FunctionType):
            # torch.compile's: the copy runs as it is written.
            compiled = vars(value).get("_torchdynamo_orig_callable")
            return self._of(compiled) if compiled is not None else self._function(value)
        if isinstance(value, functools.partial):
            return functools.partial(self._of(value.func), *map(self._of, value.args), **self._items(value.keywords))
        if isinstance(value, tuple):
            return tuple(map(self._of, value))
        made: Any = type(value)()
        self._made[id(value)] = value, made  # it may hold itself
        if isinstance(value, dict):
            made.update(self._items(value))
        else:
            made.extend(map(self._of, value))
        return made

    def _holds_copied(self, value: Any, seen: set[int]) -> bool:
        """Whether a function, or a container in one, leads to anything that was copied."""
        if id(value) in self._memo:
            return self._memo[id(value)] is not value
        if id(value) in seen:
            return False
        seen.add(id(value))
        return any(self._holds_copied(each, seen) for each in _held(value))

    def _items(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._of(item) for key, item in values.items()}

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = function.__closure__ or ()
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
                content = cell.cell_contents
            except ValueError:  # nothing is in it yet
                continue
            # A log, or a counter, is not to see what the copy does.
            counts = type(content) in (dict, list) and id(content) not in self._memo
            self._cells[id(cell)].cell_contents = self._of(copy.copy(content) if counts else content)
        made.__defaults__ = None if function.__defaults__ is None else tuple(map(self._of, function.__defaults__))
        made.__kwdefaults__ = None if function.__kwdefaults__ is None else self._items(function.__kwdefaults__)
        vars(made).update(self._items(vars(function)))
        return made


def _held(value: Any) -> Iterator[Any]:
    """What a function, a method or a plain container holds."""
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # nothing is in it yet
                yield cell.cell_contents
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif type(value) is dict:
        yield from value.values()
    elif type(value) in (list, tuple):
        yield from value


@contextmanager
def kept_apart(model: nn.Module, evaluated: bool = False) -> Iterator[set[nn.Module]]:
    """Let copies of a model run without a change of anything else.

    What the model calls that is no part of it is put back, too, but not where a part of the model is compiled.

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
    names = {
        module: name
        for name, module in model.named_modules()
        if _holds_tensors(module) and not isinstance(module, torch.jit.ScriptModule)
    }
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
    if not partly_compiled(model):
        handles.append(register_module_forward_pre_hook(Hook(any_begins)))
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0  # copies have the names of the model's own
    try:
        yield copied
    finally:
        parametrize._cache_enabled = cached
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for module, (training, buffers) in outside.items():
                module.training = training
                for buffer, value in buffers:
                    buffer.copy_(value)


def partly_compiled(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is compiled when it is called."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _holds_tensors(module: nn.Module) -> bool:
    """Whether a module has weights or statistics of its own."""
    return any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))


@contextmanager
def unchanged(twin: nn.Module) -> Iterator[None]:
    """Put back what a forward pass leaves in a model: a recurrent layer's last state for the next batch, or generators."""
    own = ("_buffers", "_modules", "_parameters")
    modules = [m for m in twin.modules() if not isinstance(m, torch.jit.ScriptModule)]  # they hold theirs elsewhere
    attributes = [each for m in modules for each in (vars(m), *(vars(m)[name] for name in own))]
    before = [dict(each) for each in attributes]
    lists = [(item, list(item)) for items in before for item in items.values() if type(item) is list]
    dicts = [(item, dict(item)) for items in before for item in items.values() if type(item) is dict]
    held = list(instances_in(_kept(twin), (Tensor, torch.Generator, np.random.Generator)))
    tensors = {
        id(t): t for t in held if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and not t.is_inference()
    }
    values = [(tensor, tensor._version, tensor.clone()) for tensor in tensors.values()]
    generators = [(each, each.get_state()) for each in held if isinstance(each, torch.Generator)]
    of_numpy = [
        (each.bit_generator, each.bit_generator.state) for each in held if isinstance(each, np.random.Generator)
    ]
    try:
        yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        for bits, drawn in of_numpy:
            bits.state = drawn
        for each, items in (*zip(attributes, before, strict=True), *dicts):
            each.clear()
            each.update(items)
        for each, kept in lists:
            each[:] = kept
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)


def _kept(model: nn.Module) -> list[Any]:
    """What the modules of a model hold: attributes that are not torch's, and buffers."""
    own = [value for m in model.modules() for name, value in vars(m).items() if name not in OF_TORCH]
    return [*own, *(buffer for m in model.modules() for buffer in m._buffers.values())]


def constants_of(model: nn.Module) -> list[Tensor]:
    """Tensors that a model holds in buffers and attributes."""
    held = [each for m in model.modules() for each in (*m._buffers.values(), *vars(m).values())]
    tensors = [each for each in held if isinstance(each, Tensor) and not isinstance(each, nn.Parameter)]
    return [each for each in tensors if not each.requires_grad]


def moves_on(twin: nn.Module, forward: Callable[[], object]) -> bool:
    """Whether generators or numbers that a model holds are others after a forward pass, which is made."""

    def state() -> str:
        kept = _kept(twin)
        generators: Iterator[Any] = instances_in(kept, (torch.Generator, np.random.Generator))
        drawn = [
            g.get_state().tolist() if isinstance(g, torch.Generator) else g.bit_generator.state for g in generators
        ]
        return str([drawn, *map(_numbers, kept)])

    before = state()
    forward()
    return state() != before


def _numbers(value: Any) -> Any:
    """Single numbers in an attribute, in lists and dicts too, and in tensors of whole numbers."""
    if isinstance(value, Mapping | list | tuple):
        return [_numbers(item) for item in (value.values() if isinstance(value, Mapping) else value)]
    if isinstance(value, Tensor):
        single = value.layout == torch.strided and value.numel() == 1 and not value.is_floating_point()
        return value.item() if single else None
    return value if isinstance(value, int | float | np.number) else None


@contextmanager
def without_short_cuts() -> Iterator[None]:
    """Keep attention from the short cut that it takes in evaluation without gradients, which no hook sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def without_validation() -> Iterator[None]:
    """Keep torch.distributions from refusing parameters that are NaN."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)
