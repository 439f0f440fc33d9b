"""One rule a layer family: which parameters are matrices, and where their two factors appear.

A rule is an object with ``matches(module)``, ``parameters`` (names of the matrix parameters) and
``attach(module, on_use)``, which registers hooks that call ``on_use(parameter, activation, output)`` at each
forward pass.  The watcher does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .linear import LinearRule

OnUse = Callable[[str, Tensor, Tensor], None]


class LayerRule(Protocol):
    """What a layer family provides."""

    parameters: tuple[str, ...]

    def matches(self, module: nn.Module) -> bool:
        """Whether the rule holds for this module."""
        ...

    def attach(self, module: nn.Module, on_use: OnUse) -> list[RemovableHandle]:
        """Register the hooks that report each use of the module's matrix parameters."""
        ...


RULES: tuple[LayerRule, ...] = (LinearRule(),)


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule that holds for a module, or None."""
    return next((rule for rule in RULES if rule.matches(module)), None)
