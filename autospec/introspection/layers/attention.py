"""nn.MultiheadAttention: its products are seen as torch's own function carries them out.

The module calls one function that projects, attends and projects again.  While it runs, a TorchFunctionMode looks on
at its calls of `torch.nn.functional.linear` and reports those with the module's weights.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..hooks import Hook, LookingOn, outside_graphs
from .call import OnCall
from .linear import LinearCall

WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


@functools.cache
def looked_through() -> Callable[..., Any]:
    """Torch's attention function, which under a mode goes on with its own body instead of asking the mode again."""
    function = F.multi_head_attention_forward
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


class _Products(LookingOn):
    """Reports products with the module's weights."""

    def __init__(self, weights: Mapping[str, Tensor], on_call: OnCall) -> None:
        super().__init__()
        self.weights, self.on_call = weights, on_call

    @outside_graphs  # compiled code runs the attention as it is while somebody looks on
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return looked_through()(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is F.linear:
            activation = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            for name, whole in self.weights.items():
                if weight.data_ptr() == whole.data_ptr() and len(weight) == len(whole):
                    self.on_call(LinearCall(name, activation, output))
                elif weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                    first = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
                    self.on_call(LinearCall(name, activation, output, (first, len(whole))))
        return output


class _Last(RemovableHandle):
    """Stands among the handles for what is still to be done when they are removed.

    After an interruption from the keyboard torch calls no hook, not even one that it always calls.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__(OrderedDict())
        self.function = function

    def remove(self) -> None:
        """Do it."""
        self.function()


def takes_short_cut(module: nn.Module) -> bool:
    """Whether torch may compute attention, or a whole layer of it, in one call, of which no gradient can come."""
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
    return not (module.training or learns) and torch.backends.mha.get_fastpath_enabled()


def allow_short_cuts(model: nn.Module) -> list[RemovableHandle]:
    """Take the watcher's hooks off each nn.TransformerEncoderLayer while it can take its short cut.

    Torch does not take it where there are hooks, and the other way differs in the last digits: a validation loss would
    not be what it is without a watcher.

    Parameters
    ----------
    model : nn.Module
        The model, whose layers are called by other modules of it.

    Returns
    -------
    list of RemovableHandle
        To be removed before the hooks of the layers.
    """
    lifted: list[list[tuple[dict[int, Callable], dict[int, Callable]]]] = []

    def put_back(*_: Any) -> None:
        for hooks, before in lifted.pop() if lifted else ():
            now = dict(hooks)
            hooks.clear()
            hooks.update({key: hook for key, hook in before.items() if isinstance(hook, Hook) or key in now} | now)

    def put_all_back(*_: Any) -> None:
        while lifted:
            put_back()

    def lift(layers: Sequence[nn.Module], *_: Any) -> None:
        modules = [module for layer in layers if takes_short_cut(layer) for module in layer.modules()]
        lifted.append([])
        for hooks in (hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)):
            lifted[-1].append((hooks, dict(hooks)))
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]

    callers: dict[nn.Module, list[nn.Module]] = {}
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        if name and isinstance(layer, nn.TransformerEncoderLayer):
            caller = name.rpartition(".")[0]
            while caller and isinstance(modules[caller], nn.ModuleList | nn.ModuleDict):
                caller = caller.rpartition(".")[0]
            callers.setdefault(modules[caller], []).append(layer)
    handles: list[RemovableHandle] = [_Last(put_all_back)]
    if callers:  # after an interruption no hook is called that would have put them back
        handles.append(model.register_forward_pre_hook(Hook(put_all_back)))
    for module, layers in callers.items():
        handles.append(module.register_forward_pre_hook(Hook(functools.partial(lift, layers))))
        handles.append(module.register_forward_hook(Hook(put_back), always_call=True))
    return handles


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters(remove_duplicate=False) if name in WEIGHTS}


class AttentionRule:
    """nn.MultiheadAttention in all its forms: the packed or separate projections, and the output's."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module computes nn.MultiheadAttention's own forward pass."""
        return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """The projections' weights, but for those that are computed from others."""
        return tuple(_weights(module))

    def attach(self, module: nn.Module, on_call: OnCall) -> list[RemovableHandle]:
        """Look on from before each forward pass until after it."""
        running: list[_Products] = []

        def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
            end()
            if takes_short_cut(module):
                return
            mode = _Products(_weights(module), on_call)
            mode.enter()
            running.append(mode)

        def end(*_: Any) -> None:
            if running:
                running.pop().leave()

        return [
            module.register_forward_pre_hook(Hook(begin)),
            module.register_forward_hook(Hook(end), always_call=True, prepend=True),
            _Last(end),
        ]
