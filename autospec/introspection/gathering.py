"""What a backward pass brings, sorted by cell and put into the layers' `Pending`."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .audit import Audit
from .convolutions import Convolution
from .errors import WatchError
from .factors import NARROW, Computed, Factors, Lookup, Product, single
from .groups import Assignment
from .hooks import backward_pass, may_be_compiled, several_processes
from .pending import Pending
from .rows import alike
from .scaling import LossScale
from .shares import wide_on_a_gpu
from .sorting import Items, Layout, Sorting
from .spectra import column_gram, float64, has_float64
from .uses import SortedInput, Source, Use, WatchedLayer, unused_calls
from .workspace import LARGEST_KEPT, Workspace

# Ways to sort items without groups that are kept, before the oldest are given up.
SORTINGS_KEPT = 512
# Bytes of one item, a volume say, from which on it is not copied: fresh memory for all of them costs more than the copy.
LARGE_ITEM = 2**18
# Numbers in a matrix up to which one product a sample, for samples of many rows, costs less than sorting the rows.
LARGEST_BY_SAMPLE = 2**15


class Gathering:
    """Takes the uses of parameters of which adjoints have arrived, and gathers their factors until the step is closed.

    Parameters
    ----------
    layers : sequence of WatchedLayer
        The watched parameters.
    statistics : sequence of str
        What will be computed of what is gathered.
    unfolded : bool
        Whether rows of a convolution's activation are patches.
    per_position, spatial : bool
        Whether shares are kept for each position in time or of a token, and in space.
    audit : Audit, optional
        Decides which steps are audited, and is told what is found.

    Attributes
    ----------
    follows : callable or None
        Says whether the tracked solver follows rows of a layer; see `Pending.add`.
    make_pending : callable
        Makes a `Pending` of a shape and the workspace.
    audited : str or None
        The parameter that is audited in this step.
    guard_due : bool
        Whether shares are compared with gradients in this step.
    differentiated : bool
        Whether a backward pass of this step builds a graph.
    masked : bool
        Whether a mask of positions was applied in this step.
    loss_scale : LossScale
        What losses were multiplied with.
    workspace : Workspace
        Memory that is used again.
    """

    def __init__(
        self,
        layers: Sequence[WatchedLayer],
        statistics: Sequence[str],
        unfolded: bool = False,
        per_position: bool = False,
        spatial: bool = False,
        audit: Audit | None = None,
    ) -> None:
        self.layers, self.audit = layers, audit or Audit(None)
        self.unfolded, self.per_position, self.spatial = unfolded, per_position, spatial
        self.factor_statistics = [s for s in ("activation", "adjoint") if s in statistics]
        self.shares = set(statistics) != set(self.factor_statistics)
        self.follows: Callable[[WatchedLayer, Sequence[int], int], bool] | None = None
        self.make_pending: Callable[[tuple[int, int], Workspace], Pending] = Pending
        self.audited: str | None = None
        self.guard_due = self.differentiated = self.masked = False
        self.loss_scale = LossScale()
        self.workspace = Workspace()
        self._sortings: dict[Any, Sorting] = {}
        self._sortings_used: dict[Any, Sorting] = {}
        self._sorted_for: tuple[Any, ...] = ()
        self._without_groups = functools.lru_cache(SORTINGS_KEPT)(Sorting.without_groups)
        self._latest_adjoint: tuple[Tensor, Sorting, Tensor] | None = None
        self._sorted_inputs: dict[Source, SortedInput] = {}
        self._backward = -1
        self._warned_twice = False

    def clear(self, recorded: bool) -> None:
        """Forget what is pending; a step between two records needs nothing, and gives nothing up."""
        for layer in self.layers:
            layer.clear()
        self._latest_adjoint = None
        self._sorted_inputs = {}
        self.differentiated = self.masked = False
        if recorded:
            self.workspace.take_back()
            self._sortings, self._sortings_used = self._sortings_used, {}  # padding may lie elsewhere at each step

    @property
    def guarded(self) -> bool:
        """Whether the shares of this step are compared with the gradient that arrived."""
        return self.audited is not None or self.differentiated or self.guard_due

    def note_what_was_added(self) -> None:
        """Begin to compare shares with gradients in the middle of a step, where these are its own sum."""
        if self.masked or self.loss_scale.was_used or several_processes():
            return
        for layer in self.layers:
            pending, gradient = layer.pending, layer.parameter.grad
            if pending is None or gradient is None or gradient.is_sparse:
                continue
            if pending.unnoted and pending.began_empty:
                pending.arrived = float64(gradient).reshape(layer.shape).clone()
                pending.unnoted = False

    def gather(self, layer: WatchedLayer, gradient: Tensor) -> None:
        """Add one backward pass to what is pending for a parameter."""
        # Another backward pass, for the inputs' gradient say, may have crossed the layer without reaching here.
        uses, layer.uses = [use for use in layer.uses if use.backward == backward_pass()], []
        if layer.refusal is not None and layer.refusal[0] == backward_pass():
            raise layer.refusal[1]
        if not uses and self.differentiated:
            self.audit.penalised(layer.name, layer.parameter, gradient)
            return
        if not uses:
            raise WatchError(
                f"a gradient reached '{layer.name}' that did not come through its layer's forward pass since the last step(), or another "
                "use that can be watched: it is used outside of a call of the model, or in a torch.autograd.Function, say. Leave it out "
                f"with layers=['!{layer.name}']; or call step() before the next forward pass"
                + (
                    "; or it was compiled before watch() was entered: torch._dynamo.reset()."
                    if may_be_compiled()
                    else "."
                )
            )
        if self._backward < backward_pass():
            self._backward = backward_pass()
            self._discard_zeroed()
            for source in list(self._sorted_inputs):  # a reader that the loss does not use never comes
                self._give_up_sorted(source)
        before = layer.pending
        pending = layer.pending = before or self.make_pending(layer.shape, self.workspace)
        pending.began_empty = pending.began_empty or (before is None and layer.parameter.grad is None)
        for use in uses:
            layer.passes.setdefault(id(use.forward), (use.forward, use.backward))
        exact = layer.name == self.audited
        scale = self.loss_scale.of(backward_pass())
        # Positions count from the first use in a forward pass, but adjoints arrive from the last one on.
        reached, begun = False, None
        uses.sort(key=lambda use: (use.forward.number, use.place, use.number))
        counts = unused_calls(uses) if self.per_position else itertools.repeat((0, 0), len(uses))
        for use, unused in zip(uses, counts, strict=True):
            layer.position = layer.position if use.forward is begun else 0
            begun = use.forward
            reached |= self._gather_use(layer, pending, use, scale, exact, len(uses) == 1, unused)
            use.arrival.waiting -= 1
            if not use.arrival.waiting:
                self._input_was_read(use)
                use.let_go()
                sorted_inputs = [there.result for there in self._sorted_inputs.values()]
                self.workspace.forget((column_gram, _double, _on_the_processor), sorted_inputs)
                if (
                    self._latest_adjoint is not None
                    and self._latest_adjoint[1].order is not None
                    and not use.arrival.kept
                ):
                    self.workspace.give_back(self._latest_adjoint[2])
                self._latest_adjoint = None
        if not reached:
            layer.pending = before
            return
        if self.shares and len(uses) == 1 and scale is None and not gradient.is_sparse:
            pending.shares.note_gradient(gradient)
        pending.unnoted = pending.unnoted or not self.guarded
        if self.guarded:
            flat = float64(gradient.to_dense() if gradient.is_sparse else gradient).reshape(layer.shape)
            flat = _unscaled(flat, scale)
            # Of float64 that is the user's own .grad, which clipping or zeroing would change until the step is closed.
            pending.arrived = flat.clone() if pending.arrived is None else pending.arrived + flat

    def _gather_use(
        self,
        layer: WatchedLayer,
        pending: Pending,
        use: Use,
        scale: Tensor | None,
        exact: bool,
        alone: bool,
        unused: tuple[int, int],
    ) -> bool:
        """Add one use of the parameter; False where it has no items, as an expert to which no sample was sent."""
        factors = use.call.factors(use.parameter, use.arrival.adjoints, self.workspace)
        if isinstance(factors, Convolution) and self.unfolded:
            factors = replace(factors, unfolded=True)
        if use.call.computed is not None:
            none = factors.adjoint.new_empty(0)
            factors = Computed(factors.activation, factors.adjoint, factors.with_(none, none), use.call.computed)
        if not len(factors.adjoint):
            return False
        if not has_float64(factors.adjoint.device):  # in which shares and Gram matrices are summed up
            factors = factors.converted(lambda side: self.workspace.memo(side, _on_the_processor))
        types = use.dtype, use.call.outputs[0].dtype, factors.adjoint.dtype, layer.parameter.dtype
        pending.dtype = _coarsest(pending.dtype, *types)
        pending.computed = pending.computed or use.call.computed is not None
        again = (id(use.forward), use.place, use.number) in layer.added
        layer.added.add((id(use.forward), use.place, use.number))
        if again and "adjoint" in self.factor_statistics:
            self._give_up_adjoint(layer, pending)
        layer.inputs.append(use.constant)
        layout = self._layout(factors, use, pending, alone)
        sorting = self._sorting(layer, use, factors, layout)
        self.masked = self.masked or sorting.masked
        if sorting.left_out is not None and self.guarded:
            out = sorting.left_out
            left = factors.with_(factors.activation[out], factors.adjoint[out]).converted(single).in_float64()
            share = _unscaled(left.share(), scale)
            pending.arrived = -share if pending.arrived is None else pending.arrived - share
            pending.left_out = share if pending.left_out is None else pending.left_out + share
        if self.guarded and sorting.left_out is None and factors.in_pieces and layer.parameter.is_cpu:
            # torch's own sum of so many terms may be further off than the guard admits: the same sum, by the same kernel.
            share = factors.with_(single(factors.activation), single(factors.adjoint)).share()
            share = _unscaled(share, scale)
            pending.by_kernel = share if pending.by_kernel is None else pending.by_kernel + share
        kept = layer.sorted_input
        if use.constant is not None and kept is not None and kept[1] is sorting and kept[0].same(use.constant):
            activation = kept[2]
        elif use.constant is not None:
            activation = sorting.sort(single(factors.activation))
            if sorting.order is None and (layout is None or activation.nbytes <= LARGEST_KEPT):
                activation = activation.clone()  # a buffer of the user's may be filled again before the step is closed
            layer.sorted_input = (use.constant, sorting, activation)
        else:
            activation = self._sorted_activation(use, factors.activation, sorting)
        # Input-to-hidden and hidden-to-hidden weights of a layer have one adjoint: sorted once.
        latest = self._latest_adjoint
        if latest is not None and latest[0] is factors.adjoint and latest[1] is sorting:
            adjoint = latest[2]
        else:
            adjoint = sorting.sort(single(factors.adjoint), self.workspace)
            adjoint = _unscaled(adjoint, scale)
            self._latest_adjoint = (factors.adjoint, sorting, adjoint)
        factors = factors.with_(activation, adjoint)
        if self.guarded:
            pending.walk = pending.walk + factors.walk()
        if wide_on_a_gpu(factors, layer.shape):
            factors = factors.converted(lambda side: self.workspace.memo(side, _double))
        constant = use.constant is not None and len(layer.inputs) == 1
        shares = self.shares or self.guarded
        follows = None if self.follows is None else functools.partial(self.follows, layer)
        statistics = [] if again else self.factor_statistics
        pending.add(factors, sorting, shares, statistics, constant, follows, use.backward, counted=not again)
        layer.note_widths(pending.widths())
        transposed = use.call.inputs_first or (isinstance(factors, Product | Convolution) and factors.transposed)
        layer.inputs_first = transposed and layer.inputs_first is not False
        layer.computed = layer.computed or isinstance(factors, Computed)
        layer.true_factor &= isinstance(factors, Product | Lookup) or (
            isinstance(factors, Convolution) and factors.unfolded and factors.groups == 1 and not factors.transposed
        )
        used = factors.of_weight if isinstance(factors, Computed) else factors
        if self.per_position and (isinstance(used, Product) or (self.spatial and isinstance(used, Convolution))):
            # A convolution's items are whole images, whose positions the factors know.
            layer.has_positions = layer.has_positions or isinstance(used, Convolution) or use.call.inputs[0].ndim > 2
            part = used.outputs if isinstance(used, Product) else None
            if part is not None and part[0]:  # keys and values of an attention have the queries' positions
                last = pending.add_by_position(factors, sorting, layer.call_position)
                layer.position = max(layer.position, last)
            else:
                layer.call_position = layer.position
                unused = unused if part is None else (0, 0)
                layer.position = pending.add_by_position(factors, sorting, layer.call_position, *unused)
        if exact:
            pending.add_exact(factors, sorting)
        use.arrival.kept = use.arrival.kept or pending.keeps_rows
        there = self._sorted_inputs.get(use.source)
        if there is not None and there.result is activation:
            there.kept = there.kept or pending.keeps_rows
        elif sorting.order is not None and use.constant is None and not pending.keeps_rows:
            self.workspace.give_back(activation)
        return True

    def _give_up_adjoint(self, layer: WatchedLayer, pending: Pending) -> None:
        """The adjoint of a forward pass is the sum over its backward passes, of which the first is no longer there."""
        pending.give_up("adjoint")
        if not self._warned_twice:
            self._warned_twice = True
            warnings.warn(
                f"two backward passes went through one forward pass of '{layer.name}', whose adjoint is the sum of both: it is "
                "recorded as NaN (said once). Add the losses and call backward() once.",
                stacklevel=2,
            )

    def _sorted_activation(self, use: Use, activation: Tensor, sorting: Sorting) -> Tensor:
        """Sort an activation, once for all layers that see it."""
        there = self._sorted_inputs.get(use.source)
        if there is not None and there.is_of(activation, sorting):
            return there.result
        result = sorting.sort(single(activation), self.workspace)
        # What was computed of an input, a recurrent layer's states say, or converted for this layer, no other layer sees.
        seen = any(activation.data_ptr() == tensor[0] for tensor in use.source)
        if seen and there is None and use.forward.readers[use.source] > 1:
            self._sorted_inputs[use.source] = SortedInput(activation, sorting, result)
        return result

    def _input_was_read(self, use: Use) -> None:
        """Note that a call has given its activation; after the last that sees the same, what was sorted is given back."""
        use.forward.readers[use.source] -= 1
        if use.forward.readers[use.source] <= 0:
            self._give_up_sorted(use.source)

    def _give_up_sorted(self, source: Source) -> None:
        there = self._sorted_inputs.pop(source, None)
        if there is not None and there.sorting.order is not None and not there.kept:
            self.workspace.give_back(there.result)

    def _discard_zeroed(self) -> None:
        """Forget, at the first gradient of a backward pass, what zero_grad() has discarded since the last one."""
        found = {layer: layer.was_zeroed() for layer in self.layers if layer.pending is not None}
        # Clipping writes to a gradient of zero, too: what others say holds for those of which it cannot be told.
        others = all(each for each in found.values() if each is not None)
        zeroed = [layer for layer, each in found.items() if each or (each is None and others)]
        for layer in zeroed:
            layer.forget_added()
        # A line search evaluates the loss many times a step.
        if zeroed and all(layer.pending is None for layer in self.layers):
            self.workspace.begin_again()

    def group_sizes(self) -> np.ndarray | None:
        """Samples in each group from which a gradient has arrived at any layer; None without groups.

        Several losses of one forward pass have the same samples, and so have its forward passes in one backward pass.
        """
        first: dict[int, tuple[int, Assignment]] = {}
        for layer in self.layers:
            for key, (forward, backward) in layer.passes.items() if layer.pending is not None else ():
                if forward.assignment is not None:
                    first[key] = min(backward, first.get(key, (backward,))[0]), forward.assignment
        counted = {(backward, id(assignment)): assignment.sizes for backward, assignment in first.values()}
        return np.sum(list(counted.values()), axis=0) if counted else None

    def _layout(self, factors: Factors, use: Use, pending: Pending, alone: bool) -> Layout | None:
        """How items may stay where they came: where sorting them by cell costs more than it spares."""
        if factors.adjoint.device.type != "cpu" or self.factor_statistics:
            return None
        if isinstance(factors, Convolution):
            largest = max(side.nbytes for side in (factors.activation, factors.adjoint))
            return "runs" if largest >= LARGE_ITEM * len(factors.adjoint) else None
        if not isinstance(factors, Product) or factors.outputs is not None or not pending.takes_grids:
            return None
        # Data are sorted once; the audit and positions ask for the items of each cell; shares of several uses may cancel.
        first = use.constant is None and not self.guarded and not self.per_position and alone
        shape = factors.adjoint.shape[1], factors.activation.shape[1]
        return "grid" if first and min(shape) >= NARROW and math.prod(shape) <= LARGEST_BY_SAMPLE else None

    def _sorting(self, layer: WatchedLayer, use: Use, factors: Factors, layout: Layout | None) -> Sorting:
        """How to sort the items of one use by cell; computed once for each assignment of groups."""
        forward, items, device = use.forward, len(factors.activation), factors.adjoint.device
        if forward.assignment is None or forward.row_map is None:
            return self._without_groups(items)
        # While the labels and the row map stay, so does the order; packed sequences bring another layout each time.
        given = (forward.assignment, forward.valid, forward.rows)
        if len(self._sorted_for) != len(given) or any(a is not b for a, b in zip(self._sorted_for, given, strict=True)):
            self._sorted_for, self._sortings, self._sortings_used = given, {}, {}
        cache = self._sortings
        uses = use.number, forward.calls.get(use.place)
        key = (layout, *use.call.order_key(use.place), *uses, forward.row_map, items, use.call.layout())
        if key not in cache:
            found = self._items(layer, use, items)
            there = None
            if layout is not None:
                there = Sorting.as_they_lie(found, forward.assignment, forward.valid, device, layout)
            if there is None:
                content = device, *found.content  # layers whose items lie alike have the same
                there = cache.get(content) or Sorting.by_cell(found, forward.assignment, forward.valid, device)
                cache[content] = there
            cache[key] = there
        self._sortings_used[key] = cache[key]
        return cache[key]

    def _items(self, layer: WatchedLayer, use: Use, items: int) -> Items:
        """Sample of each item, and its position where the layer knows it."""
        forward, known = use.forward, None
        assert forward.assignment is not None
        assert forward.row_map is not None
        if layer.name in forward.rows:
            samples = forward.rows[layer.name]
            if len(samples) and (samples.min() < 0 or samples.max() >= len(forward.assignment.cells)):
                raise WatchError(f"rows= names a sample that the batch does not have, for '{layer.name}'.")
        else:
            calls = forward.row_map.samples.get(use.place, [])
            if use.number >= len(calls):
                more = {place for place, _ in forward.called_more()}
                names = [
                    each.name
                    for each in self.layers
                    if more.intersection(each.places) and each.name not in forward.rows
                ]
                was, uses = ("was", "that use") if len(names) == 1 else ("were", "these uses")
                raise WatchError(
                    f"{', '.join(map(repr, names))} {was} used more often in training than in evaluation mode, so the rows of "
                    f"{uses} are not known: give rows=, such as rows={{{names[0]!r}: range({len(forward.assignment.cells)})}} "
                    f"for a row of each sample, or leave out with layers={[f'!{name}' for name in names]}."
                )
            if forward.calls.get(use.place) != len(calls) and not alike(calls):
                raise WatchError(
                    f"'{layer.name}' was used less often in training than in evaluation mode, where its uses have their rows in "
                    "different orders, so which of them this one is is not known: give rows=, or leave it out with layers=."
                )
            samples = use.call.samples_of_items(use.parameter, calls[use.number])
            known = use.call.positions_of_items(use.parameter, calls[use.number])
        if len(samples) != items:
            raise WatchError(
                f"'{layer.name}' received {items} rows, but {len(samples)} are known: "
                "give rows= with the sample of each row, to set_groups() where it changes from batch to batch."
            )
        return Items(layer.name, samples, known)


def _unscaled(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """Derivatives of the loss itself, from those of what it was multiplied to; they may be on the processor, for float64."""
    return tensor if scale is None else tensor / scale.to(tensor.device)


def _double(tensor: Tensor, _: Workspace) -> Tensor:
    return tensor.double()


def _on_the_processor(tensor: Tensor, _: Workspace) -> Tensor:
    return tensor.cpu()


def _coarsest(*dtypes: torch.dtype | None) -> torch.dtype:
    """The type with the largest rounding."""
    floating = [dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps)
