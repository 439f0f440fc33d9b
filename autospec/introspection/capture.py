"""What hooks see of a training step, gathered for each parameter."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from .arguments import as_array, content_of, signature_of, whole_numbers
from .audit import Audit
from .copies import partly_compiled
from .errors import WatchError
from .factors import NARROW, Computed, Convolution, Factors, Lookup, Product, shares_by_position, single, walk
from .groups import Assignment, Groups
from .hooks import Hook, may_be_compiled
from .layers import (
    FunctionalUses,
    LayerCall,
    LookupCall,
    OnCall,
    SpreadCall,
    allow_short_cuts,
    layers_noted,
    rule_for,
    weights_by_layer,
)
from .lookups import Place
from .orders import alike
from .pending import Items, Layout, Pending, Sorting
from .probe import OwnUses, weights_at
from .rows import RowMap, map_rows, several_processes
from .scaling import LossScale
from .spectra import column_gram, float64, irregular
from .twins import refused_uses
from .uses import Arrival, ConstantInput, Forward, SortedInput, Source, Use, WatchedLayer, unused_calls
from .workspace import LARGEST_KEPT, Workspace, where

# Row maps of batches of different shapes, before the oldest are given up.
ROW_MAPS_KEPT = 512
# Batches that differ in plain numbers alone and are traced before it is said how to spare that.
NUMBERS_TRACED = 10
# Bytes of one item, a volume say, from which on it is not copied: fresh memory for all of them costs more than the copy.
LARGE_ITEM = 2**18
# Numbers in a matrix up to which one product a sample, for samples of many rows, costs less than sorting the rows.
LARGEST_BY_SAMPLE = 2**15


class Capture:
    """Hooks on a model; what they see is gathered in the layers' `Pending` until the step is closed.

    Parameters
    ----------
    model : nn.Module
        The model.
    layers : sequence of WatchedLayer
        Its watched parameters.
    statistics : sequence of str
        What will be computed of what is gathered.
    rows : mapping of str to ndarray of int
        Rows given by the user, by parameter.
    batch_dim : int or None
        The dimension that indexes samples, where the user gave it.
    unfolded : bool
        Whether rows of a convolution's activation are patches.
    per_position, spatial : bool
        Whether shares are kept for each position in time or of a token, and in space.
    audit : Audit
        Decides which steps are audited.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[WatchedLayer],
        statistics: Sequence[str],
        rows: Mapping[str, np.ndarray],
        batch_dim: int | None,
        unfolded: bool,
        per_position: bool,
        spatial: bool,
        audit: Audit,
    ) -> None:
        self.model, self.layers, self.statistics, self.audit = model, layers, statistics, audit
        self.unfolded, self.per_position, self.spatial = unfolded, per_position, spatial
        self.factor_statistics = [s for s in ("activation", "adjoint") if s in statistics]
        self.shares = set(statistics) != set(self.factor_statistics)
        self.groups: Groups | None = None
        self.assignment: Assignment | None = None
        self.valid: np.ndarray | None = None
        self.recording = False
        self.follows: Callable[[WatchedLayer, Sequence[int], int], bool] | None = None
        self.make_pending: Callable[[tuple[int, int], Workspace], Pending] = Pending
        self.audited: str | None = None
        self.guard_due = False
        self.differentiated = self.returned = False
        self.forwards = self._depth = 0
        self.rows = dict(rows)
        self._batch_dim = batch_dim
        self._row_maps: dict[Any, RowMap] = {}
        self._forms: dict[Any, set[Any]] = {}
        self._in_training_alone: set[tuple[Place, int]] = set()
        self._by_content: dict[Any, tuple[int, ...]] = {}
        self._known: RowMap | None = None
        self._sorts = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._sortings: dict[Any, Sorting] = {}
        self._sortings_used: dict[Any, Sorting] = {}
        self._sorted_for: tuple[Any, ...] = ()
        self._forward: Forward | None = None
        self._handles: list[RemovableHandle] = []
        self._owners: dict[Place, tuple[WatchedLayer, nn.Module, str, torch.device]] = {}
        self._children: dict[str, tuple[nn.Module, str, nn.Module]] = {}
        self._reports: dict[Place, OnCall] = {}
        self._functional: FunctionalUses | None = None
        self._used_functionally: set[Place] | None = None
        self._noted: set[nn.Module] = set()
        self._noted_of: frozenset[int] = frozenset()
        self._refused: dict[Place, str] = {}
        self._spread_tables: set[str] = set()
        self._calls: list[tuple[LayerCall, Arrival]] = []
        self._loss_scale = LossScale()
        self.workspace = Workspace()
        self._active = self._paused = False
        self.seconds = 0.0
        self.masked = False
        self._latest_adjoint: tuple[Tensor, Sorting, Tensor] | None = None
        self._sorted_inputs: dict[Source, SortedInput] = {}
        self._without_groups = functools.lru_cache(ROW_MAPS_KEPT)(Sorting.without_groups)
        self._backward = -1
        self._warned_twice = False
        self._observers: list[RemovableHandle] = []
        self._replaced = False
        self._spread: dict[int, tuple[Tensor, Tensor]] = {}

    # ------------------------------------------------------------------ hooks on and off

    def attach(self) -> None:
        """Register every hook."""
        self._active = True
        self._handles += allow_short_cuts(self.model)
        modules = dict(self.model.named_modules())
        by_place = {place: layer for layer in self.layers for place in layer.places}
        for (module_name, key), layer in by_place.items():
            path, _, own = f"{module_name}.{key}".lstrip(".").rpartition(".")
            self._owners[module_name, key] = layer, modules[path], own, layer.parameter.device
            while path:  # each module on the way is where it was
                above, _, child = path.rpartition(".")
                self._children[path] = modules[above], child, modules[path]
                path = above
        for module_name in dict.fromkeys(name for name, _ in by_place):
            module = modules[module_name]
            wanted = {key: by_place[module_name, key] for name, key in by_place if name == module_name}
            self._reports |= dict.fromkeys([(module_name, key) for key in wanted], self._on_call(module_name, wanted))
            if (rule := rule_for(module)) is not None:
                self._handles += rule.attach(module, self._on_call(module_name, wanted, by_rule=True))
        self._handles.append(self.model.register_forward_pre_hook(Hook(self._forward_begins), with_kwargs=True))
        self._handles.append(
            self.model.register_forward_hook(Hook(self._forward_ends), with_kwargs=True, always_call=True)
        )
        self._loss_scale.listen()

    def detach(self) -> None:
        """Remove every hook, and what is pending."""
        self._loss_scale.stop()
        for handle in (*self._handles, *self._observers):
            handle.remove()
        self._look_away()
        self._handles, self._observers, self._owners, self._children, self._reports = [], [], {}, {}, {}
        self._noted, self._noted_of = set(), frozenset()
        for layer in self.layers:
            for handle in layer.handles:
                handle.remove()
            layer.handles, layer.sorted_input = [], None
        self.clear()
        self.workspace.release()
        self._forward, self._depth = None, 0
        self._active = False

    def clear(self) -> None:
        """Forget what is pending, and let go of what the graph's hooks hold."""
        for layer in self.layers:
            layer.clear()
        for call, arrival in self._calls:
            call.forget()
            arrival.adjoints = []
        self._calls, self._depth = [], 0
        self._latest_adjoint = None
        self._sorted_inputs, self._spread, self._spread_tables = {}, {}, set()
        self.differentiated = self.returned = False
        if self.recording:  # a step between two records needs nothing, and gives nothing up
            self.workspace.take_back()
            self._sortings, self._sortings_used = self._sortings_used, {}  # padding may lie elsewhere at each step

    # ------------------------------------------------------------------ the forward pass

    def _forward_begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused or not self._active:
            return
        self._depth += 1
        if self._depth > 1 and _running_calls(model) > 1:
            return  # a model that calls itself: what it does there belongs to the call from outside
        self._depth = 1  # after an interruption torch calls no hook, so the end of that call was not seen
        self._look_away()
        self.forwards += 1
        if _backward_pass() < 0:
            self._drop_what_was_not_added()
        if not (torch.is_grad_enabled() and self.recording) or _transformed():
            self._forward = None
            return
        self._same_parameters()
        if not any(map(self._is_own, self._owners)):
            self._forward = None  # torch.func.functional_call with other weights, those of a mean teacher say
            return
        for layer in self.layers:
            if not layer.handles and layer.parameter.requires_grad:
                layer.handles = [
                    layer.parameter.register_hook(self._gradient_hook(layer)),
                    layer.parameter.register_post_accumulate_grad_hook(layer.note_gradient),
                ]
        try:
            self._forward = Forward(self.assignment, self._row_map(args, kwargs), self.forwards, self.valid, self.rows)
        except WatchError as error:
            if model.training:
                raise
            # A validation pass may have another batch; it matters only if a gradient comes back from it.
            self._forward = Forward(self.assignment, None, error=error)
        self._look_on(self._forward.row_map, args, kwargs)

    def _look_on(self, row_map: RowMap | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Watch what the model itself does with weights and data, until the forward pass ends, if it does anything."""
        # Without groups no copy has shown that: the first pass does, if the next is as that.
        first = self.assignment is None and self._used_functionally is None and not partly_compiled(self.model)
        self._used_functionally = self._used_functionally or set()
        learned = [layer for layer in self.layers if layer.parameter.requires_grad]
        uses = OwnUses() if row_map is None else row_map.uses
        self._used_functionally |= uses.places
        if not (first or self._used_functionally or any(layer.functional for layer in learned)):
            return
        weights = weights_at(self.model, {place for layer in learned for place in layer.places})
        used = self._used_functionally

        def on_call(place: Place, call: LayerCall, _: Tensor) -> Tensor | None:
            used.add(place)
            return self._reports[place](call)

        samples = None if self.assignment is None else len(self.assignment.cells)
        followed, refused = weights_at(self.model, uses.followed), self._refused.setdefault
        mode = FunctionalUses(self.model, weights, samples, uses.states, on_call, refused, followed, compare=first)
        mode.receive((args, kwargs), row_map.reading.shared_inputs(args, kwargs) if row_map is not None else ())
        self._functional = mode
        self._note_layers(mode, frozenset(map(id, weights)))
        if parametrize._cache:
            raise WatchError(
                "a weight was computed within parametrize.cached() before this forward pass, so what it is made of was not seen: enter "
                "that block for each forward pass anew."
            )
        mode.enter()

    def _note_layers(self, mode: FunctionalUses, weights: frozenset[int]) -> None:
        """Have the layers of some weights, whose own uses are reported by their rules, tell when they run."""
        if weights <= self._noted_of:
            return
        self._noted_of |= weights
        layers = weights_by_layer(self.model, weights)
        new = {layer: own for layer, own in layers.items() if layer not in self._noted}
        self._noted |= set(new)
        self._handles += layers_noted(new, lambda: [] if self._functional is None else self._functional.within)
        if self.model in new:  # its call has begun
            mode.within.append(new[self.model])

    def _look_away(self) -> None:
        self._refused.clear()
        if self._functional is not None:
            self._functional.leave()
            self._functional = None

    def _drop_what_was_not_added(self) -> None:
        """Let go of what backward passes left that have ended without adding to a weight's gradient."""
        for layer in self.layers:
            for use in layer.uses:
                self._let_go(use)
            layer.uses = []
        self._calls = [(call, arrival) for call, arrival in self._calls if arrival.adjoints]

    @staticmethod
    def _let_go(use: Use) -> None:
        use.arrival.adjoints = []
        use.call.forget()
        if use.arrival.inputs_were_held and not use.call.inputs_are_held:
            use.call.release()  # the graph has been freed

    def _is_own(self, place: Place) -> bool:
        """Whether a watched parameter is where it was, and not another in its place for one call."""
        layer, owner, key, _ = self._owners[place]
        return owner._parameters.get(key) is layer.parameter

    def _same_parameters(self) -> None:
        """Refuse parameters and modules that were replaced or moved inside the block: their hooks stayed behind."""
        for path, (above, child, module) in self._children.items():
            if above._modules.get(child) is not module:
                raise WatchError(
                    f"'{path}' was replaced by another module inside the watch() block: change the model before it."
                )
        for layer, owner, key, device in self._owners.values():
            there = owner._parameters.get(key)
            if there is not layer.parameter:
                if _functional_call():
                    if there is not None and there.grad_fn is not None:
                        raise WatchError(
                            f"'{layer.name}' was replaced, for one call, by a tensor computed with gradients, which may come back "
                            "to the watched weight without its rows: detach it, or leave the layer out with layers=."
                        )
                    continue
                raise WatchError(
                    f"'{layer.name}' was replaced by another parameter inside the watch() block: change the model before it."
                )
            if layer.parameter.device != device:
                raise WatchError(
                    f"'{layer.name}' was moved from {device} to {layer.parameter.device} inside the watch() block: "
                    "move the model before it."
                )

    def _forward_ends(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._paused or not self._active:
            return
        self._depth = max(self._depth - 1, 0)
        if self._depth:
            return
        forward, self._forward = self._forward, None
        refused = dict(self._refused)
        self._look_away()
        if refused and output is not None:
            if model.training:
                raise refused_uses(refused)
            if forward is not None:
                forward.error = forward.error or refused_uses(refused)
        self._spread = {}
        for handle in self._observers:
            handle.remove()
        self._observers = []
        # A model that has grown, or that unrolls for longer, by an attribute of its own, was traced as it was; and so was one that
        # goes by numbers which decide more than the first batch showed.
        grown = forward is not None and bool(self._called_more(forward))
        if forward is not None and forward.reshaped:
            self._note_all_content(args, kwargs)
        if forward is not None and output is not None and (self._replaced or grown or forward.reshaped):
            try:
                forward.row_map = self._row_map(args, kwargs, again=True, all_hooks=self._replaced)
                if grown:  # what evaluation mode does not call so often need not be traced again
                    self._in_training_alone |= self._called_more(forward)
            except WatchError as error:
                if model.training:
                    raise
                forward.error = error

    def _traced(self) -> set[Place]:
        """The matrices whose rows are traced."""
        learned = [layer for layer in self.layers if layer.parameter.requires_grad]
        places = (place for layer in learned if layer.name not in self.rows for place in layer.places)
        return set(filter(self._is_own, places))

    def _called_more(self, forward: Forward) -> set[tuple[Place, int]]:
        """Which matrices were used more often than when rows were traced, and how often."""
        more = forward.called_more() - self._in_training_alone
        traced = self._traced() if more else ()
        return {(place, count) for place, count in more if place in traced}

    def _count_numbers(self, form: Any, signature: Any) -> None:
        """Say, once, how to spare that rows are traced anew at each step because a number that counts steps is another one."""
        seen = self._forms.setdefault(form, set())
        if signature in seen or len(seen) == NUMBERS_TRACED:
            return
        seen.add(signature)
        if len(seen) == NUMBERS_TRACED:
            warnings.warn(
                f"rows were traced {NUMBERS_TRACED} times for batches of one form, because a whole number or a text among the "
                "model's arguments was another one each time, and might decide where rows lie: where it does not, as with the "
                "number of a step or the name of a file, give a number as a float, or keep it in an attribute of the model's "
                "(said once).",
                stacklevel=2,
            )

    def _row_map(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], again: bool = False, all_hooks: bool = False
    ) -> RowMap | None:
        if self.assignment is None:
            return None
        watched = self._traced()
        samples = len(self.assignment.cells)
        if not watched:
            return RowMap({})
        signature = self._batch_signature(args, kwargs, samples)
        if len(self._row_maps) > ROW_MAPS_KEPT:
            del self._row_maps[next(iter(self._row_maps))]
            self._forms.clear()
        content = self._content(signature, args, kwargs)
        if again or (signature, content) not in self._row_maps:
            self._count_numbers((samples, signature_of((args, kwargs), self._sorts, samples, numbers=False)), signature)
            self._paused, begin = True, time.perf_counter()
            try:
                found = map_rows(self.model, args, kwargs, samples, watched, self._batch_dim, all_hooks, self._known)
            finally:
                self._paused = False
                self.seconds += time.perf_counter() - begin
            self._known = found if found.certain else self._known
            self._drop_what_was_misread(found)
            if found.by_content:  # what one batch does not show, another has shown
                self._by_content[signature] = tuple(sorted({*self._by_content.get(signature, ()), *found.by_content}))
            content = self._content(signature, args, kwargs)
            self._row_maps[signature, content] = found
            assert self.groups is not None
            self.audit.probed(found, self.groups.missing)
            self._observe(found.without_hooks)
        return self._row_maps[signature, content]

    def _drop_what_was_misread(self, found: RowMap) -> None:
        """Forget maps in which an input holds samples that, as a batch of another size shows, all samples share."""
        wrong = {
            key: dims
            for key, each in self._row_maps.items()
            if len(dims := each.reading.dims) == len(found.reading.dims)
            and any(dims[number] is not None for number in found.reading.shared)
        }
        for key in wrong:
            del self._row_maps[key]
        if wrong:
            sizes = sorted({signature[0] for signature, _ in wrong})
            warnings.warn(
                f"an input that all samples share was taken for one of the samples in batches of {', '.join(map(str, sizes))}, which have as "
                "many: what was recorded of these is wrong. Begin with a batch of another size, or leave out the layers that it enters.",
                stacklevel=2,
            )

    @property
    def shared_inputs(self) -> frozenset[int]:
        """Numbers of the floating-point inputs that hold no samples, as the last batch was read whose rows were traced."""
        dims = list(self._row_maps.values())[-1].reading.dims if self._row_maps else ()
        return frozenset(number for number, dim in enumerate(dims) if dim is None)

    def _note_all_content(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """From now on rows of such a batch are known for what all its whole numbers hold."""
        if self.assignment is not None:
            signature = self._batch_signature(args, kwargs, len(self.assignment.cells))
            self._by_content[signature] = tuple(range(len(whole_numbers(args, kwargs))))

    def _batch_signature(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> tuple[Any, ...]:
        """What batches have in common whose rows may be traced once."""
        return samples, signature_of((args, kwargs), self._sorts, samples), frozenset(self._traced())

    def _observe(self, names: Sequence[str]) -> None:
        """Notice, in the forward pass that begins, hooks that replace something, and so may move rows.

        The copy that traced the rows did not have these hooks, because they act on what is outside of the model.
        """
        self._replaced = False
        modules = dict(self.model.named_modules())
        # Hooks of the model as a whole have been called already, or come after all layers.
        for module in [modules[name] for name in names if name]:
            given: list[Any] = []
            made: list[Any] = []

            def begins(_: nn.Module, args: Any, kwargs: Any, given: list[Any] = given) -> None:
                given[:] = [*args, *kwargs.values()]

            def goes_on(_: nn.Module, args: Any, kwargs: Any, given: list[Any] = given) -> None:
                self._note_replaced(given, [*args, *kwargs.values()])

            def ends(_: nn.Module, __: Any, output: Any, made: list[Any] = made) -> None:
                made[:] = [output]

            def goes_out(_: nn.Module, __: Any, output: Any, made: list[Any] = made) -> None:
                # What the watcher itself put in place is no hook's of the user's.
                self._note_replaced(made, [self._spread[id(output)][1] if id(output) in self._spread else output])

            self._observers += [
                module.register_forward_pre_hook(Hook(begins), prepend=True, with_kwargs=True),
                module.register_forward_pre_hook(Hook(goes_on), with_kwargs=True),
                module.register_forward_hook(Hook(ends), prepend=True),
                module.register_forward_hook(Hook(goes_out)),
            ]

    def _note_replaced(self, before: list[Any], after: list[Any]) -> None:
        same = len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
        self._replaced = self._replaced or not same
        before.clear()

    def _content(self, signature: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What the inputs contain that the rows go by, as far as is known of inputs of this kind."""
        chosen = self._by_content.get(signature, ())
        numbers = whole_numbers(args, kwargs) if chosen else []
        return tuple((i, content_of(as_array(numbers[i]))) for i in chosen)

    def _on_call(self, module_name: str, wanted: Mapping[str, WatchedLayer], by_rule: bool = False) -> OnCall:
        def on_call(call: LayerCall) -> Tensor | None:
            off = self._paused or not self._active or not self.recording
            if off or not torch.is_grad_enabled() or _transformed():
                return None
            forward = self._forward
            parameters = [key for key in call.parameters if key in wanted and self._is_own((module_name, key))]
            if by_rule and forward is not None and forward.row_map is not None:
                parameters = [key for key in parameters if (module_name, key) not in forward.row_map.uses.followed]
            if not parameters:
                return None
            if forward is None:
                if self.assignment is None:
                    forward = Forward(None, None)
                else:
                    name = wanted[parameters[0]].name
                    message = (
                        f"'{name}' was used outside of a call of the watched model: call the model itself."
                        if _backward_pass() < 0
                        else f"'{name}' was used in a backward pass, as reentrant activation checkpointing does: use "
                        "checkpoint(..., use_reentrant=False)."
                    )
                    forward = Forward(self.assignment, None, error=WatchError(message))
            return self._watch_call(call, module_name, {key: wanted[key] for key in parameters}, forward)

        return on_call

    def _watch_call(
        self, call: LayerCall, module_name: str, wanted: Mapping[str, WatchedLayer], forward: Forward
    ) -> Tensor | None:
        """Hook the outputs of one call, which may be replaced by an equal one that samples do not share."""
        numbers = {key: forward.count_call((module_name, key)) for key in wanted}
        if forward.row_map is not None:
            for key, number in numbers.items():
                shapes = forward.row_map.shapes.get((module_name, key), [])[number : number + 1]
                forward.reshaped = forward.reshaped or any(shape != call.inputs[0].shape for shape in shapes)
        learned = {key: layer for key, layer in wanted.items() if layer.parameter.requires_grad}
        outputs = [output for output in call.outputs if output.requires_grad]
        if not outputs or not learned:
            return None
        replacement = None
        if isinstance(call, LookupCall) and forward.row_map is not None:
            along = forward.row_map.shared.get((module_name, "weight"))
            if along is not None:
                assert forward.assignment is not None
                output = call.outputs[0]
                call = call.for_each_sample(len(forward.assignment.cells), along.dim, along.new)
                replacement = call.outputs[0]
                self._spread[id(replacement)] = (replacement, output)
        if replacement is not None or isinstance(call, SpreadCall):
            self._spread_tables |= {layer.name for layer in learned.values()}
        # The first module that a tensor enters sees data; what it computes of them depends on weights.
        constants = {key: self._constant(call.constant(key), forward) for key in learned}
        versions = [tensor._version for tensor in call.inputs]
        source = tuple(map(where, call.inputs))
        forward.readers[source] = forward.readers.get(source, 0) + 1
        kind = call.outputs[0].device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        latest: list[tuple[int, Arrival]] = []

        def arrives(position: int, adjoint: Tensor | None) -> None:
            if not self._active or adjoint is None:  # compiled code calls for outputs that the loss does not use
                return
            backward = _backward_pass()
            # What this pass builds a graph of may come back in a gradient without passing here: a penalty on gradients.
            if torch.is_grad_enabled() and not self.differentiated:
                self.differentiated = True
                self._refuse_spread_tables()
                self._note_what_was_added()
            refusal = forward.error
            if refusal is None and not call.inputs:
                # If it was an earlier backward pass that freed the graph, torch is about to say so itself.
                refusal = WatchError(
                    f"a second backward pass reached '{next(iter(learned.values())).name}', whose input was not kept: only code "
                    "outside the graph held it. Keep the model's activations until the last backward pass, or record one "
                    "backward pass a step."
                )
            if refusal is not None:
                if not all(layer.handles for layer in learned.values()):  # the model has never been called
                    raise refusal
                for layer in learned.values():  # it matters if a gradient comes of it
                    layer.refusal = (backward, refusal)
                return
            if not latest or latest[-1][0] != backward:
                if any(tensor._version != version for tensor, version in zip(call.inputs, versions, strict=True)):
                    name = next(iter(learned.values())).name
                    raise WatchError(
                        f"the input of '{name}' was modified in place before the backward pass: change a copy of it."
                    )
                arrival = Arrival([None] * len(call.outputs), len(learned), computed is None and call.inputs_are_held)
                latest[:] = [(backward, arrival)]
                self._calls.append((call, arrival))
                for key, layer in learned.items():
                    place = (module_name, key)
                    layer.uses.append(
                        Use(
                            call, key, place, numbers[key], source, arrival, forward, constants[key], computed, backward
                        )
                    )
            latest[-1][1].adjoints[position] = adjoint.detach()

        for position, output in enumerate(call.outputs):
            if output.requires_grad:
                output.register_hook(_at(position, arrives))
        call.leave_graph()
        return replacement

    def _refuse_spread_tables(self) -> None:
        """Refuse gradients of gradients of what meets a table that is spread: they add up in another order there."""
        if self._spread_tables:
            names = sorted(self._spread_tables)
            raise WatchError(
                f"gradients of gradients pass by {', '.join(map(repr, names))}, a table that all samples share, and would be rounded "
                f"otherwise: leave it out with layers={[f'!{name}' for name in names]}."
            )

    def _constant(self, tensor: Tensor | None, forward: Forward) -> ConstantInput | None:
        if tensor is None or tensor.requires_grad:
            return None
        return ConstantInput(tensor, tensor._version, _checksum(tensor), forward)

    # ------------------------------------------------------------------ the backward pass

    @property
    def guarded(self) -> bool:
        """Whether the shares of this step are compared with the gradient that arrived."""
        return self.audited is not None or self.differentiated or self.guard_due

    def _note_what_was_added(self) -> None:
        """Begin to compare shares with gradients in the middle of a step, where these are its own sum."""
        if self.masked or self._loss_scale.was_used or several_processes():
            return
        for layer in self.layers:
            pending, gradient = layer.pending, layer.parameter.grad
            if pending is None or gradient is None or gradient.is_sparse:
                continue
            if pending.unnoted and pending.began_empty:
                pending.arrived = float64(gradient).reshape(layer.shape).clone()
                pending.unnoted = False

    def _gradient_hook(self, layer: WatchedLayer) -> Callable[[Tensor], None]:
        def gradient_arrives(gradient: Tensor) -> None:
            if self._active and self.recording:
                if not _accumulates(layer.parameter):
                    self._pass_over(layer)
                    return
                begin = time.perf_counter()
                self._gather(layer, gradient.detach())
                self.seconds += time.perf_counter() - begin

        return gradient_arrives

    def _pass_over(self, layer: WatchedLayer) -> None:
        """Let go of what came with a gradient that is returned instead of added."""
        self.returned = True
        passed = [use for use in layer.uses if use.backward == _backward_pass()]
        layer.uses = [use for use in layer.uses if use.backward != _backward_pass()]
        for use in passed:
            use.arrival.waiting -= 1
            if not use.arrival.waiting:
                self._let_go(use)

    def _gather(self, layer: WatchedLayer, gradient: Tensor) -> None:
        """Add one backward pass to what is pending for a parameter."""
        # Another backward pass, for the inputs' gradient say, may have crossed the layer without reaching here.
        uses, layer.uses = [use for use in layer.uses if use.backward == _backward_pass()], []
        if layer.refusal is not None and layer.refusal[0] == _backward_pass():
            raise layer.refusal[1]
        if not uses and self.differentiated:
            self.audit.penalised(layer.name, layer.parameter, gradient)
            return
        if not uses:
            raise WatchError(
                f"a gradient reached '{layer.name}' that did not come through its layer's forward pass, or another use that can be "
                "watched: it is used outside of a call of the model, or in a torch.autograd.Function, say. Leave it out with "
                f"layers=['!{layer.name}']"
                + (
                    "; or it was compiled before watch() was entered: torch._dynamo.reset()."
                    if may_be_compiled()
                    else "."
                )
            )
        if self._backward < _backward_pass():
            self._backward = _backward_pass()
            self._discard_zeroed()
            for source in list(self._sorted_inputs):  # a reader that the loss does not use never comes
                self._give_up_sorted(source)
        before = layer.pending
        pending = layer.pending = before or self.make_pending(layer.shape, self.workspace)
        pending.began_empty = pending.began_empty or (before is None and layer.parameter.grad is None)
        for use in uses:
            layer.passes.setdefault(id(use.forward), (use.forward, use.backward))
        exact = layer.name == self.audited
        scale = self._loss_scale.of(_backward_pass())
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
                self._let_go(use)
                self.workspace.forget(column_gram, [there.result for there in self._sorted_inputs.values()])
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
            flat = flat if scale is None else flat / scale
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
        types = use.dtype, use.call.outputs[0].dtype, factors.adjoint.dtype, layer.parameter.dtype
        pending.dtype = _coarsest(pending.dtype, *types)
        pending.computed = pending.computed or use.call.computed is not None
        again = (id(use.forward), use.place, use.number) in layer.added
        layer.added.add((id(use.forward), use.place, use.number))
        if again and "adjoint" in self.factor_statistics:
            self._give_up_adjoint(layer, pending)
        layer.inputs.append(use.constant)
        layout = self._layout(factors, use, pending, alone)
        sorting = self._sorting(layer, use, len(factors.activation), layout)
        self.masked = self.masked or sorting.masked
        if sorting.left_out is not None and self.guarded:
            out = sorting.left_out
            left = factors.with_(factors.activation[out], factors.adjoint[out]).converted(single).in_float64()
            share = left.share() if scale is None else left.share() / scale
            pending.arrived = -share if pending.arrived is None else pending.arrived - share
            pending.left_out = share if pending.left_out is None else pending.left_out + share
        if self.guarded and sorting.left_out is None and factors.in_pieces:
            # torch's own sum of so many terms may be further off than the guard admits: the same sum, by the same kernel.
            share = factors.with_(single(factors.activation), single(factors.adjoint)).share()
            share = share if scale is None else share / scale
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
            adjoint = adjoint if scale is None else adjoint / scale
            self._latest_adjoint = (factors.adjoint, sorting, adjoint)
        factors = factors.with_(activation, adjoint)
        if self.guarded:
            pending.walk = pending.walk + walk(factors)
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
                last = pending.add_by_position(factors, sorting, layer.call_position, shares_by_position)
                layer.position = max(layer.position, last)
            else:
                layer.call_position = layer.position
                unused = unused if part is None else (0, 0)
                layer.position = pending.add_by_position(
                    factors, sorting, layer.call_position, shares_by_position, *unused
                )
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

    # ------------------------------------------------------------------ rows

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

    def _sorting(self, layer: WatchedLayer, use: Use, items: int, layout: Layout | None) -> Sorting:
        """How to sort the items of one use by cell; computed once for each assignment of groups."""
        forward = use.forward
        if forward.assignment is None or forward.row_map is None:
            return self._without_groups(items)
        # While the labels and the row map stay, so does the order; packed sequences bring another layout each time.
        given = (forward.assignment, forward.valid, forward.rows)
        if len(self._sorted_for) != len(given) or any(a is not b for a, b in zip(self._sorted_for, given, strict=True)):
            self._sorted_for, self._sortings, self._sortings_used = given, {}, {}
        cache = self._sortings
        uses = use.number, forward.calls.get(use.place)
        key = (layout, *use.call.order_key(use.place), *uses, forward.row_map, items, use.call.layout())
        device = layer.parameter.device
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


def _coarsest(*dtypes: torch.dtype | None) -> torch.dtype:
    """The type with the largest rounding."""
    floating = [dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps)


def _at(position: int, function: Callable[[int, Tensor | None], None]) -> Callable[[Tensor], None]:
    return lambda adjoint: function(position, adjoint)


def _checksum(tensor: Tensor) -> float | None:
    """Notice changes that bypass torch, which only memory shared with numpy can have."""
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return None
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    # Weights without regularity notice rows or columns that change places, which a plain sum would not.  They begin at
    # another number for rows, so that rows and columns which change places with each other are noticed too.
    return float((rows @ irregular(rows.shape[1], tensor.dtype)) @ irregular(len(rows) + 1, tensor.dtype)[1:])


def _accumulates(parameter: nn.Parameter) -> bool:
    """Whether the backward pass that is running adds to a parameter's gradient.

    torch.autograd.grad gives it to its caller instead.
    """
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # which says that torch.autograd.grad is running
        return False


def _running_calls(model: nn.Module) -> int:
    """How many calls of a model are running, one within the other."""
    frame, count = sys._getframe(), 0
    while frame is not None:
        count += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model
        frame = frame.f_back  # type: ignore[assignment]
    return count


def _functional_call() -> bool:
    """Whether a model is being called with other weights, by torch.func.functional_call, which puts its own back."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not nn.utils.stateless._functional_call.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _transformed() -> bool:
    """Whether torch.func differentiates what is running: it returns the gradients."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _backward_pass() -> int:
    """Return the number of the backward pass that is running; later ones have larger numbers."""
    return torch._C._current_graph_task_id()
