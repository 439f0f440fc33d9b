"""Loss scaling: by how much a GradScaler has multiplied the loss of each backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .hooks import Hook

_listeners: list[LossScale] = []
_original: list[Callable[..., Any]] = []


class LossScale:
    """Notices scaled losses while it listens, by standing in front of `torch.amp.GradScaler.scale`.

    What the method returns gets a hook, which autograd calls first of all in a backward pass from there; so a pass
    that does not come from a scaled loss counts as unscaled.
    """

    def __init__(self) -> None:
        self._found: tuple[int, Tensor | None] = (-1, None)

    @property
    def was_used(self) -> bool:
        """Whether any loss has been scaled."""
        return self._found[0] >= 0

    def of(self, backward: int) -> Tensor | None:
        """Scale of a backward pass, a tensor that holds one number; None where it is not scaled."""
        number, scale = self._found
        return scale if number == backward else None

    def listen(self) -> None:
        """Begin to listen."""
        if not _listeners:
            _original.append(torch.amp.GradScaler.scale)
            torch.amp.GradScaler.scale = _scale  # type: ignore[method-assign, assignment]
        _listeners.append(self)

    def stop(self) -> None:
        """Stop listening."""
        if self in _listeners:
            _listeners.remove(self)
            if not _listeners:
                torch.amp.GradScaler.scale = _original.pop()  # type: ignore[method-assign]

    def began(self, scale: Tensor) -> None:
        """Note the scale of the backward pass that is beginning."""
        self._found = (torch._C._current_graph_task_id(), scale)


def _scale(scaler: Any, outputs: Any) -> Any:
    scaled = _original[0](scaler, outputs)
    if scaler.is_enabled():
        scale = scaler._get_scale_async()  # as a number it would have to be waited for
        for tensor in scaled if isinstance(scaled, list | tuple) else [scaled]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(Hook(_hook(scale)))
    return scaled


def _hook(scale: Tensor) -> Callable[[Tensor], None]:
    def begins(_: Tensor) -> None:
        for listener in _listeners:
            listener.began(scale)

    return begins
