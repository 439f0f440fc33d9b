"""Copies of a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def copy_model(model: nn.Module, keep_hooks: Callable[[Callable], bool] = lambda _: True) -> nn.Module:
    """Copy a model, also one that keeps an activation in an attribute, which belongs to a graph that torch does not copy.

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
    return result


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
