"""What a rule reports of one forward pass through a layer."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..factors import Factors
from ..workspace import Workspace

Place = tuple[str, str]
"""A module's name and the parameter's name in it."""


def qualified_name(place: Place) -> str:
    """Name of a parameter in the model, such as ``encoder.0.weight``."""
    return ".".join(filter(None, place))


class LayerCall(ABC):
    """One forward pass through a layer.

    Attributes
    ----------
    inputs : tuple of Tensor
        What the factors are made of; it may not change before the backward pass.
    outputs : tuple of Tensor
        The tensors whose derivatives the adjoint is made of.
    parameters : tuple of str
        The matrix parameters that were used, by their names in the module.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: tuple[str, ...]
    reads_outputs: ClassVar[bool] = False
    """Whether `factors` reads the outputs' values."""
    computed: Callable[[Tensor], Tensor] | None = None
    """Where the weight was computed of the parameter: the parameter's share from that of the weight."""
    inputs_first: bool = False
    """Whether the parameter has its inputs first then."""
    _originals: tuple[weakref.ref[Tensor], ...] = ()

    @abstractmethod
    def marks(self, parameter: str) -> Tensor:
        """Whether each entry of the batch holds a NaN, in the dimensions in which they lie: how entries are traced to samples."""

    def entries(self, parameter: str, output: Tensor) -> Tensor:
        """A view of the output whose first dimensions are those of `marks`."""
        return output

    @abstractmethod
    def factors(self, parameter: str, adjoints: Sequence[Tensor | None], workspace: Workspace) -> Factors:
        """Activation and adjoint, given the derivatives at the outputs (None: not used by the loss)."""

    def samples_of_items(self, parameter: str, samples: np.ndarray) -> np.ndarray:
        """Sample of each item of the factors, given the sample of each entry; by default items are entries."""
        return samples

    def positions_of_items(self, parameter: str, samples: np.ndarray) -> tuple[np.ndarray, int] | None:
        """Position of each item in its sample, and how many there are, given the sample of each entry.

        None where all entries are items: these lie in order.
        """
        return None

    def order_key(self, place: tuple[str, str]) -> tuple[str, ...]:
        """What has the same items in the same order: a place is a module's and a parameter's name."""
        return place

    def layout(self) -> Any:
        """What the sample of each item depends on, beside the sample of each entry; to be compared with that of other calls."""
        return None

    def constant(self, parameter: str) -> Tensor | None:
        """The tensor that alone makes the activation: where it is data and stays the same, so does the activation."""
        return self.inputs[0]

    def leave_graph(self) -> None:
        """Hold values alone: what hooks on the graph hold must not hold the graph, or it would never be freed."""
        self._originals = tuple(weakref.ref(tensor) for tensor in self.inputs)
        self.inputs = tuple(tensor.detach() for tensor in self.inputs)
        self.outputs = tuple(tensor.detach() if self.reads_outputs else tensor.new_empty(0) for tensor in self.outputs)

    @property
    def inputs_are_held(self) -> bool:
        """Whether somebody else holds an input of the forward pass: the graph, which lets go of it in a backward pass, say."""
        return any(original() is not None for original in self._originals)

    def release(self) -> None:
        """Let go of the inputs; there are no factors any more."""
        self.inputs = ()

    def forget(self) -> None:  # noqa: B027 (most keep nothing)
        """Let go of what was computed in `factors`."""


def hold_nan(tensor: Tensor, entries: int) -> Tensor:
    """Whether each entry of the first dimensions holds a NaN; shape ``tensor.shape[:entries]``.

    The largest value is NaN where one of them is, and takes a tenth of the time that asking each of them takes.
    """
    rest = tensor.flatten(entries)
    if rest.is_complex():
        return rest.isnan().any(-1)
    return rest.amax(-1).isnan() if rest.shape[-1] else rest.new_zeros(rest.shape[:-1], dtype=torch.bool)


OnCall = Callable[[LayerCall], Tensor | None]
"""Takes a call; may return what shall stand in for the layer's output (see `LookupCall.for_each_sample`)."""
