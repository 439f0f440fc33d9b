"""What a watched layer has seen of a step: the uses of its parameter, their inputs and derivatives, and what is pending."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .audit import cancels, sum_of_shares
from .errors import WatchError
from .groups import Assignment
from .layers import LayerCall
from .layers.call import Place
from .parameters import WatchedParameter
from .pending import Pending
from .rows import RowMap
from .sorting import Sorting
from .workspace import Where, where


@dataclass
class ConstantInput:
    """Identifies a layer input that is data, so that an unchanged one is sorted and decomposed once."""

    tensor: Tensor
    version: int
    checksum: float | None
    forward: Forward
    everywhere: tuple[Any, ...] = ()
    """What `told` gave in each of several processes."""

    def told(self) -> tuple[Any, ...]:
        """What tells it from others while it is held; to be compared in other processes, too."""
        there = self.tensor.data_ptr(), tuple(self.tensor.shape), self.tensor.stride(), self.version, self.checksum
        return (*there, *map(id, (self.forward.assignment, self.forward.valid, self.forward.rows)))

    def same(self, other: ConstantInput) -> bool:
        """Whether the other is the same data, of the same groups."""
        return self.told() == other.told()


Source = tuple[Where, ...]
"""Which tensors the inputs of a call are."""


@dataclass
class SortedInput:
    """An activation in the order of its cells, for the other layers that see the same, as an attention's q, k and v do.

    Attributes
    ----------
    activation : Tensor
        As it lies; what is held cannot give its place to another.
    sorting : Sorting
        The order.
    result : Tensor
        Sorted.
    kept : bool
        Whether one of the layers keeps rows of it until the step is closed.
    """

    activation: Tensor
    sorting: Sorting
    result: Tensor
    kept: bool = False

    def is_of(self, activation: Tensor, sorting: Sorting) -> bool:
        """Whether it is this activation in this order."""
        return self.sorting is sorting and where(self.activation) == where(activation)


@dataclass
class Forward:
    """One forward pass of the model: whose rows are whose, and how often each layer was called."""

    assignment: Assignment | None
    row_map: RowMap | None
    number: int = -1
    valid: np.ndarray | None = None
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    error: WatchError | None = None
    calls: dict[Place, int] = field(default_factory=dict)
    readers: dict[Source, int] = field(default_factory=dict)
    """How many calls have yet to give the activation that is made of these inputs."""
    reshaped: bool = False
    """Whether a layer received something of another shape than when rows were traced."""

    def count_call(self, place: Place) -> int:
        """How often a layer has been called before this call."""
        number = self.calls.get(place, 0)
        self.calls[place] = number + 1
        return number

    def called_more(self) -> set[tuple[Place, int]]:
        """Which parameters were used more often than when rows were traced, and how often."""
        if self.row_map is None:
            return set()
        known = self.row_map.samples
        return {(place, count) for place, count in self.calls.items() if count > len(known.get(place, ()))}


@dataclass
class Arrival:
    """The derivatives at a call's outputs in one backward pass; given up when the last parameter has used them."""

    adjoints: list[Tensor | None]
    waiting: int
    inputs_were_held: bool
    kept: bool = False


@dataclass
class Use:
    """One use of a parameter in a forward pass, of which an adjoint has arrived."""

    call: LayerCall
    parameter: str
    place: Place
    number: int
    source: Source
    arrival: Arrival
    forward: Forward
    constant: ConstantInput | None
    dtype: torch.dtype | None
    backward: int

    def let_go(self) -> None:
        """Let go of what the graph's hooks hold."""
        self.arrival.adjoints = []
        self.call.forget()
        if self.arrival.inputs_were_held and not self.call.inputs_are_held:
            self.call.release()  # the graph has been freed


class WatchedLayer(WatchedParameter):
    """A watched parameter with what its hooks have seen."""

    def __init__(self, found: WatchedParameter) -> None:
        super().__init__(found.name, found.parameter)
        self.also, self.places, self.functional = found.also, found.places, found.functional
        self.uses: list[Use] = []
        self.pending: Pending | None = None
        self.handles: list[RemovableHandle] = []
        self.left: tuple[int, int] | None = None
        self.inputs: list[ConstantInput | None] = []
        self.sorted_input: tuple[ConstantInput, Sorting, Tensor] | None = None
        self.rank_limit: np.ndarray | None = None
        self.true_factor, self.computed = True, False
        self.inputs_first: bool | None = None
        self.call_position = self.position = 0
        self.has_positions = False
        self.refusal: tuple[int, WatchError] | None = None
        self.added: set[tuple[int, Place, int]] = set()
        self.passes: dict[int, tuple[Forward, int]] = {}
        self.widths_seen: dict[str, int] = {}

    def note_widths(self, widths: Mapping[str, int]) -> None:
        """Two uses of a weight may have rows of different widths, and not both at each step: keep the larger sum."""
        self.widths_seen |= {name: max(width, self.widths_seen.get(name, 0)) for name, width in widths.items()}

    @property
    def widths(self) -> dict[str, int]:
        """How many singular values the factors can have, at the step at which they had most."""
        return self.widths_seen or {"activation": self.shape[1], "adjoint": self.shape[0]}

    def clear(self) -> None:
        """Forget what is pending."""
        self.uses, self.refusal = [], None
        self.forget_added()

    def forget_added(self) -> None:
        """Forget what earlier backward passes added."""
        self.inputs, self.pending, self.added, self.passes = [], None, set(), {}

    def note_gradient(self, parameter: Tensor) -> None:
        """Note in which state a backward pass left the parameter's gradient."""
        gradient = parameter.grad  # a hook of the user's may already have used it up
        self.left = None if gradient is None else (id(gradient), gradient._version)

    def was_zeroed(self) -> bool | None:
        """Whether zero_grad() has discarded the gradient since the last backward pass; None where that cannot be told."""
        gradient = self.parameter.grad
        if gradient is None or self.pending is None:
            return True
        if (gradient.coalesce().values() if gradient.is_sparse else gradient).any():
            return False
        if not cancels(self.pending):
            return True
        # It came as zero, or nearly.  If nobody has written to it since, it stays; writing to .data leaves no trace there.
        if self.left == (id(gradient), gradient._version):
            return False
        return True if self.pending.shares.counts and sum_of_shares(self.pending)[0].any() else None


def unused_calls(uses: Sequence[Use]) -> Iterator[tuple[int, int]]:
    """How many calls of the layer before each use, back to the last, and after it, if it is the last, the loss does not use."""
    for last, use, following in zip([None, *uses[:-1]], uses, [*uses[1:], None], strict=True):
        goes_on, not_last = (
            each is not None and each.forward is use.forward and each.place == use.place for each in (last, following)
        )
        row_map = use.forward.row_map
        calls = len(row_map.samples.get(use.place, [])) if row_map is not None else 0
        before = use.number - (last.number + 1 if last is not None and goes_on else 0)
        yield before, 0 if not_last else max(calls - use.number - 1, 0)
