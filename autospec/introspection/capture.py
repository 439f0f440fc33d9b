"""Hooks on a model: what goes into its layers, and what derivatives come back."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from .copies import partly_compiled
from .errors import FailedCopy, WatchError
from .gathering import Gathering
from .groups import Assignment, Groups
from .hooks import Hook, Replacements, backward_pass, full_precision, transformed
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
from .layers.call import Place
from .rows import OwnUses, RowMap, RowMaps, refused_uses, weights_at
from .spectra import irregular
from .uses import Arrival, ConstantInput, Forward, Use, WatchedLayer
from .workspace import where


class Capture:
    """Hooks on a model, which hand what they see to a `Gathering`.

    Parameters
    ----------
    model : nn.Module
        The model.
    gathering : Gathering
        With the model's watched parameters.
    rows : mapping of str to ndarray of int
        Rows given by the user, by parameter.
    batch_dim : int or None
        The dimension that indexes samples, where the user gave it.

    Attributes
    ----------
    groups : Groups or None
        The groups, if there are any.
    assignment : Assignment or None
        The groups of the samples of the next batch.
    valid : ndarray of bool or None
        Positions of its samples that count.
    recording : bool
        Whether this step is recorded.
    returned : bool
        Whether a gradient of this step was returned instead of added.
    forwards : int
        Forward passes of the model so far.
    seconds : float
        Time spent on what is seen, outside of `Watcher.step`.
    """

    def __init__(
        self,
        model: nn.Module,
        gathering: Gathering,
        rows: Mapping[str, np.ndarray],
        batch_dim: int | None,
    ) -> None:
        self.model, self.gathering, self.layers = model, gathering, gathering.layers
        self.rows = dict(rows)
        self.groups: Groups | None = None
        self.assignment: Assignment | None = None
        self.valid: np.ndarray | None = None
        self.recording = self.returned = False
        self.forwards = self._depth = 0
        self.seconds = 0.0
        self._active = self._paused = False
        self._row_maps = RowMaps(model, batch_dim)
        self._in_training_alone: set[tuple[Place, int]] = set()
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
        self._spread: dict[int, tuple[Tensor, Tensor]] = {}
        self._calls: list[tuple[LayerCall, Arrival]] = []
        self._replacements = Replacements()

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
        self.gathering.loss_scale.listen()

    def detach(self) -> None:
        """Remove every hook, and what is pending."""
        self.gathering.loss_scale.stop()
        self._replacements.stop()
        for handle in self._handles:
            handle.remove()
        self._look_away()
        self._handles, self._owners, self._children, self._reports = [], {}, {}, {}
        self._noted, self._noted_of = set(), frozenset()
        for layer in self.layers:
            for handle in layer.handles:
                handle.remove()
            layer.handles, layer.sorted_input = [], None
        self.clear()
        self.gathering.workspace.release()
        self._forward, self._depth = None, 0
        self._active = False

    def clear(self) -> None:
        """Forget what is pending, and let go of what the graph's hooks hold."""
        self.gathering.clear(self.recording)
        for call, arrival in self._calls:
            call.forget()
            arrival.adjoints = []
        self._calls, self._depth = [], 0
        self._spread, self._spread_tables = {}, set()
        self.returned = False

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
        if backward_pass() < 0:
            self._drop_what_was_not_added()
        if not (torch.is_grad_enabled() and self.recording) or transformed():
            self._forward = None
            return
        self._same_parameters()
        if not any(map(self._is_own, self._owners)):
            self._forward = None  # torch.func.functional_call with other weights, those of a mean teacher say
            return
        for layer in self.layers:
            if not layer.handles and layer.parameter.requires_grad:
                layer.handles = [
                    layer.parameter.register_hook(Hook(self._gradient_hook(layer))),
                    layer.parameter.register_post_accumulate_grad_hook(Hook(layer.note_gradient)),
                ]
        try:
            self._forward = Forward(self.assignment, self._row_map(args, kwargs), self.forwards, self.valid, self.rows)
        except WatchError as error:
            # What a copy fails on the model itself may, and its loop go on: it has to run.
            if model.training and not isinstance(error, FailedCopy):
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
                use.let_go()
            layer.uses = []
        self._calls = [(call, arrival) for call, arrival in self._calls if arrival.adjoints]

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
        self._replacements.stop()
        if model.training and output is not None and forward is not None and isinstance(forward.error, FailedCopy):
            raise forward.error
        # A model that has grown, or that unrolls for longer, by an attribute of its own, was traced as it was; and so was one that
        # goes by numbers which decide more than the first batch showed.
        grown = forward is not None and bool(self._called_more(forward))
        if forward is not None and forward.reshaped and self.assignment is not None:
            self._row_maps.note_all_content(args, kwargs, len(self.assignment.cells), self._traced())
        if forward is not None and output is not None and (self._replacements.seen or grown or forward.reshaped):
            try:
                forward.row_map = self._row_map(args, kwargs, again=True, all_hooks=self._replacements.seen)
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

    def _row_map(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], again: bool = False, all_hooks: bool = False
    ) -> RowMap | None:
        """Whose rows are whose in a batch, if there are groups."""
        if self.assignment is None:
            return None
        watched = self._traced()
        if not watched:
            return RowMap({})
        self._paused, begin = True, time.perf_counter()
        try:
            samples = len(self.assignment.cells)
            found, new = self._row_maps.of_batch(args, kwargs, samples, watched, again, all_hooks)
        finally:
            self._paused = False
            self.seconds += time.perf_counter() - begin
        if new:
            assert self.groups is not None
            self.gathering.audit.probed(found, self.groups.missing)
            self._look_for_replacements(found.without_hooks)
        return found

    def _look_for_replacements(self, names: Sequence[str]) -> None:
        """Notice, in the forward pass that begins, hooks that replace something, and so may move rows.

        The copy that traced the rows did not have these hooks, because they act on what is outside of the model.
        """
        modules = dict(self.model.named_modules())

        def returned(output: Any) -> Any:
            # What the watcher itself put in place is no hook's of the user's.
            return self._spread[id(output)][1] if id(output) in self._spread else output

        # Hooks of the model as a whole have been called already, or come after all layers.
        self._replacements.observe([modules[name] for name in names if name], returned)

    @property
    def shared_inputs(self) -> frozenset[int]:
        """As of `RowMaps`."""
        return self._row_maps.shared_inputs

    def _on_call(self, module_name: str, wanted: Mapping[str, WatchedLayer], by_rule: bool = False) -> OnCall:
        def on_call(call: LayerCall) -> Tensor | None:
            off = self._paused or not self._active or not self.recording
            if off or not torch.is_grad_enabled() or transformed():
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
                        if backward_pass() < 0
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
            backward = backward_pass()
            # What this pass builds a graph of may come back in a gradient without passing here: a penalty on gradients.
            if torch.is_grad_enabled() and not self.gathering.differentiated:
                self.gathering.differentiated = True
                self._refuse_spread_tables()
                self.gathering.note_what_was_added()
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
                output.register_hook(Hook(_at(position, arrives)))
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

    def _gradient_hook(self, layer: WatchedLayer) -> Callable[[Tensor], None]:
        def gradient_arrives(gradient: Tensor) -> None:
            if self._active and self.recording:
                if not _accumulates(layer.parameter):
                    self._pass_over(layer)
                    return
                begin = time.perf_counter()
                with full_precision(gradient.device):
                    self.gathering.gather(layer, gradient.detach())
                self.seconds += time.perf_counter() - begin

        return gradient_arrives

    def _pass_over(self, layer: WatchedLayer) -> None:
        """Let go of what came with a gradient that is returned instead of added."""
        self.returned = True
        passed = [use for use in layer.uses if use.backward == backward_pass()]
        layer.uses = [use for use in layer.uses if use.backward != backward_pass()]
        for use in passed:
            use.arrival.waiting -= 1
            if not use.arrival.waiting:
                use.let_go()


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
