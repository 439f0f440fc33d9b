"""Hooks that stay with their module when the model is copied or pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def do_nothing(*_: Any) -> None:
    """Stand for a hook in a copy."""


class Hook:
    """A hook that belongs to one module: a copy of the model, or a pickled one, carries a hook that does nothing.

    Parameters
    ----------
    function : callable
        What the hook does on the module where it was registered.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @torch._disable_dynamo  # compiled code leaves the graph here and calls the hook as it is
    def __call__(self, *args: Any) -> Any:
        """Do what the hook is for."""
        return self.function(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[Callable[..., Any]]]:
        return Hook, (do_nothing,)
