"""Spectral introspection of neural network training, group by group.

``autospec.watch`` records spectra around your own training loop; ``autospec.open_trajectories`` opens what was
recorded.  Both are loaded when first used, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autospec.trajectories import open_trajectories
    from autospec.watching import watch

__all__ = ["open_trajectories", "watch"]

_HOMES = {"watch": "autospec.watching", "open_trajectories": "autospec.trajectories"}


_PACKAGES = ("ica", "introspection", "testing")


def __getattr__(name: str) -> Any:
    """Load a public name from its home, or a part of the package, when it is first asked for."""
    if name in _PACKAGES:
        return import_module(f"autospec.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'autospec' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
