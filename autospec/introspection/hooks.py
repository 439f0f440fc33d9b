"""Hooks that stay with their module when the model is copied or pickled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


def do_nothing(*_: Any) -> None:
    """Stand for a hook in a copy."""


def may_be_compiled() -> bool:
    """Whether torch's compiler has been imported: without it nothing is compiled."""
    return "torch._dynamo" in sys.modules


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make compiled code leave its graph here and call the function as it is.

    What torch has for this imports the compiler at the first call, which takes a second: too long where nothing is
    compiled, and then the compiler has not been imported.
    """
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (disabled if may_be_compiled() else function)(*args, **kwargs)

    return called


class Hook:
    """A hook that belongs to one module: a copy of the model, or a pickled one, carries a hook that does nothing.

    Parameters
    ----------
    function : callable
        What the hook does on the module where it was registered.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @outside_graphs
    def __call__(self, *args: Any) -> Any:
        """Do what the hook is for."""
        return self.function(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[Callable[..., Any]]]:
        return Hook, (do_nothing,)


class LookingOn(TorchFunctionMode):
    """A TorchFunctionMode that a hook before a forward pass enters, and one after it leaves.

    After an interruption from the keyboard torch calls no hook, and modes that others leave take this one from the stack instead of
    their own.
    """

    _below: tuple[TorchFunctionMode, ...] = ()

    def enter(self) -> None:
        """Look on from now."""
        self._below = tuple(_get_current_function_mode_stack())
        _push_mode(self)

    def leave(self) -> None:
        """Look on no longer, and have the stack be what it would be without this mode."""
        stack = _get_current_function_mode_stack()
        if self in stack:
            gone = stack.index(self)
        else:  # one of those below has been left in its stead
            same = [mine is its for mine, its in zip(stack, self._below, strict=False)]
            gone = (same.index(False) if False in same else len(same)) - 1
        if gone < 0:
            return
        above = [_pop_mode() for _ in stack[gone + 1 :]]
        _pop_mode()
        for mode in reversed(above):
            _push_mode(mode)
