"""One file a layer family: which parameters are matrices, and what each forward pass through a layer does with them.

A rule says which modules it is for, names their matrix parameters and registers the hooks that report each
forward pass as a `LayerCall`.  The watcher does the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .attention import AttentionRule, allow_short_cuts
from .call import LayerCall, OnCall
from .convolution import CONVOLUTIONS, TRANSPOSED, ConvolutionRule
from .embedding import EmbeddingRule, LookupCall, SpreadCall
from .followed import layers_noted
from .functional import FunctionalUses
from .linear import LinearRule
from .recurrent import CELLS, RECURRENT, CellRule, RecurrentRule

__all__ = [
    "FAMILIES",
    "NO_MATRIX",
    "FunctionalUses",
    "LayerCall",
    "LayerRule",
    "LookupCall",
    "OnCall",
    "SpreadCall",
    "allow_short_cuts",
    "forward_replaced",
    "layers_noted",
    "rule_for",
    "weights_by_layer",
]


class LayerRule(Protocol):
    """What a layer family provides."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the rule holds for this module."""
        ...

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the matrix parameters, in the module."""
        ...

    def attach(self, module: nn.Module, on_call: OnCall) -> list[RemovableHandle]:
        """Register the hooks that report each forward pass."""
        ...


RULES: tuple[LayerRule, ...] = (
    LinearRule(),
    ConvolutionRule(),
    EmbeddingRule(),
    AttentionRule(),
    RecurrentRule(),
    CellRule(),
)

# Their weights scale features one by one, whatever their shape: no matrices.
NO_MATRIX = (nn.LayerNorm, nn.RMSNorm)


# Classes of torch's that have a rule.
FAMILIES = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding, nn.MultiheadAttention, *RECURRENT, *CELLS)


def forward_replaced(module: nn.Module) -> bool:
    """Whether a module itself has another forward pass than its class.

    What wraps the class's own and says so (functools.wraps), as torch.compile, accelerate and timers do, is thought to change nothing.
    """
    forward = vars(module).get("forward")
    if forward is None or isinstance(module, torch.jit.ScriptModule):
        return False
    wrapped = inspect.unwrap(forward)
    return getattr(wrapped, "__func__", wrapped) is not type(module).forward


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule that holds for a module, or None."""
    if forward_replaced(module):
        return None
    return next((rule for rule in RULES if rule.matches(module)), None)


def weights_by_layer(model: nn.Module, some: Collection[int] | None = None) -> dict[nn.Module, set[int]]:
    """Layers that have a rule, with the identities of their matrices.

    Parameters
    ----------
    model : nn.Module
        The model.
    some : collection of int, optional
        Identities of matrices, of which a layer must hold one; every layer by default.
    """
    found: dict[nn.Module, set[int]] = {}
    for module in model.modules():
        rule = rule_for(module)
        if rule is not None:
            parameters = dict(module.named_parameters(remove_duplicate=False))
            own = {id(parameters[key]) for key in rule.parameters(module) if key in parameters}
            if some is None or not own.isdisjoint(some):
                found[module] = own
    return found
