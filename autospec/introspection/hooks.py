"""What looks on while a model runs: hooks, and modes that see torch's calls; and what torch says of a pass that is running."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle


def do_nothing(*_: Any) -> None:
    """Stand for a hook in a copy."""


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def may_be_compiled() -> bool:
    """Whether torch's compiler has been imported: without it nothing is compiled."""
    return "torch._dynamo" in sys.modules


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Have nothing rounded to half precision that is computed beside a training, though its backward pass is within autocast."""
    kinds = [kind for kind in {"cpu", device.type} if torch.amp.is_autocast_available(kind)]
    kinds = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    stack = ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack if kinds else nullcontext()


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
    """A hook that compiled code leaves its graph for, and that belongs to one module or tensor.

    A copy of the model, or a pickled one, carries a hook that does nothing; what is pickled can be loaded where autospec is not.

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

    def __deepcopy__(self, _: Any) -> Hook:
        return Hook(do_nothing)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # The standard library's method that takes anything and does nothing.
        return getattr, (nullcontext(), "__exit__")


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


class Replacements:
    """Notices other hooks of modules that replace what these receive or return.

    Attributes
    ----------
    seen : bool
        Whether there was any since `observe`.
    """

    def __init__(self) -> None:
        self.seen = False
        self._handles: list[RemovableHandle] = []

    def observe(self, modules: Iterable[nn.Module], returned: Callable[[Any], Any]) -> None:
        """Begin to look.

        Parameters
        ----------
        modules : iterable of Module
            The modules.
        returned : callable
            Takes what a module's hooks leave as its output; returns what stood there before the watcher put that in its place.
        """
        self.stop()
        self.seen = False
        for module in modules:
            given: list[Any] = []
            made: list[Any] = []

            def begins(_: nn.Module, args: Any, kwargs: Any, given: list[Any] = given) -> None:
                given[:] = [*args, *kwargs.values()]

            def goes_on(_: nn.Module, args: Any, kwargs: Any, given: list[Any] = given) -> None:
                self._compare(given, [*args, *kwargs.values()])

            def ends(_: nn.Module, __: Any, output: Any, made: list[Any] = made) -> None:
                made[:] = [output]

            def goes_out(_: nn.Module, __: Any, output: Any, made: list[Any] = made) -> None:
                self._compare(made, [returned(output)])

            self._handles += [
                module.register_forward_pre_hook(Hook(begins), prepend=True, with_kwargs=True),
                module.register_forward_pre_hook(Hook(goes_on), with_kwargs=True),
                module.register_forward_hook(Hook(ends), prepend=True),
                module.register_forward_hook(Hook(goes_out)),
            ]

    def stop(self) -> None:
        """Look no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _compare(self, before: list[Any], after: list[Any]) -> None:
        same = len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
        self.seen = self.seen or not same
        before.clear()


def backward_pass() -> int:
    """Return the number of the backward pass that is running; later ones have larger numbers."""
    return torch._C._current_graph_task_id()


def transformed() -> bool:
    """Whether torch.func is running the call, with tensors of its own, whose gradients it returns; or a graph is being exported."""
    exported = torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    return exported or torch._C._functorch.peek_interpreter_stack() is not None
