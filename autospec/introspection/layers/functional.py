"""Weights that a model itself multiplies with data: ``x @ self.weight``, ``F.linear(x, mask * self.layer.weight)``.

Who writes a layer, or gives one of torch's another forward pass or another weight, calls torch's functions with it.  Each such
call is reported as a rule reports a layer's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from ..arguments import can_be_nan, instances_in
from ..errors import WatchError
from ..generators import torch_random_state, undone_draws
from ..hooks import transformed
from ..spectra import float64
from .call import LayerCall, Place, qualified_name
from .embedding import BiasCall
from .followed import ELEMENTWISE, SUMS, Call, FollowedWeights, Made
from .readings import Reading, as_it_is, looked_up, mask_of_scores, readings_of, rows_looked_up, spread_over

# Largest deviation of a weight that is computed again, in units of its largest number: that, or so many roundings.
COMPUTED_AGAIN, ROUNDINGS = 1e-3, 16


class FunctionalUses(FollowedWeights):
    """Reports products, convolutions and sums of data with some weights, or with what is computed of them.

    Parameters
    ----------
    model, samples, states, followed
        As for `FollowedWeights`.
    weights : mapping of Parameter to (str, str)
        The matrices, and the place under which uses of each are reported.
    on_call : callable
        Takes the place, what a rule would report, and what the function returned; may return what shall stand in for it.
    on_other : callable
        Takes the place of a weight that meets data in another way, and the name of the function.
    compare : bool
        Whether weights that are computed again, of which the shares are made, are compared with those that the model computed.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[nn.Parameter, Place],
        samples: int | None,
        states: bool,
        on_call: Callable[[Place, LayerCall, Tensor], Tensor | None],
        on_other: Callable[[Place, str], object],
        followed: Iterable[nn.Parameter] = (),
        compare: bool = False,
    ) -> None:
        super().__init__(model, weights, samples, states, followed)
        self.places, self.on_call, self.on_other, self.compare = weights, on_call, on_other, compare
        self._again: dict[Made, tuple[Tensor, dict[nn.Parameter, Tensor]]] = {}

    def carry_out(self, call: Call, weights: Sequence[nn.Parameter]) -> Any:
        """Carry out the call, and report it."""
        given = [t for t in self.taken(call) if t.ndim or id(t) in self.made]
        looked_up = call.func is F.embedding and any(id(t) in self.followed for t in given)
        with_data = not looked_up and any(map(self.is_data, given))
        placed, reading = self._spread(call, given) or ({}, self._reading(call))
        if reading is None and with_data:
            result, done = self._look_up(call)
            return result if done else self._carry_out_with_rows(call, given)
        if reading is None:
            result, call = self.drawn(call)
            self.note(call, result)
            return result
        result = call.made(placed)
        calls = self._calls(reading, result) if isinstance(result, Tensor) else None
        if calls is None and not with_data:
            self.note(call, result)
            return result
        reported = []
        if calls is not None:
            reported, bias = [reading.weight], reading.bias
            if isinstance(bias, Tensor) and bias.ndim == 1 and self._weights([bias]):
                added = self._bias(reading, bias, result)
                calls, reported = calls + added, [*reported, bias] if added else reported
            result = self._report(calls, result)
        self._refuse(call, (t for t in given if all(t is not each for each in reported)))
        return result

    def _carry_out_with_rows(self, call: Call, given: Sequence[Tensor]) -> Any:
        """Carry out a call that is no product, where what is made of weights lies there for each sample, as tokens that join its own."""
        placed: dict[int, Tensor] = {}
        written = call.args[0] if call.in_place else None
        for table in given:
            if table is not written and self._weights([table]) and self._lies_for_samples(table):
                spread, reading = spread_over(table.shape, table, table)
                calls = None if transformed() else self._calls(reading, spread)
                if calls is not None:
                    placed[id(table)] = self._report(calls, spread)
        self._refuse(call, (t for t in given if id(t) not in placed))
        return call.made(placed)

    def _lies_for_samples(self, table: Tensor) -> bool:
        """Whether what is made of weights may lie there for each sample, having been spread."""
        # As many of each sample may lie one after the other, as heads of an attention.
        counts = self.samples is None or any(size % self.samples == 0 for size in table.shape[:-1])
        return table.ndim > 1 and counts and self.made[id(table)].spread

    def _look_up(self, call: Call) -> tuple[Any, bool]:
        """Carry out a lookup of a table's rows by an index of data; return what it returns, and whether it was one."""
        found = None if transformed() else rows_looked_up(call)
        if found is None or id(found[0]) not in self.made:
            return None, False
        table, again = found
        result = call.made()
        reading = looked_up(table, result, again)
        calls = None if reading is None else self._calls(reading, result)
        if calls is None:
            self._refuse(call, [table])
            return result, True
        return self._report(calls, result), True

    def _report(self, calls: Sequence[tuple[Place, LayerCall]], result: Any) -> Any:
        """Report; return the result, or what shall stand in for it."""
        for place, each in calls:
            replacement = self.on_call(place, each, result)
            result = result if replacement is None else replacement
        return result

    def _refuse(self, call: Call, tensors: Iterable[Tensor]) -> None:
        """Refuse that a call takes what is made of weights."""
        for weight in self._weights(tensors):
            self.on_other(self.places[weight], getattr(call.func, "__name__", str(call.func)))

    def _bias(self, reading: Reading, bias: Tensor, result: Tensor) -> list[tuple[Place, LayerCall]]:
        """What is reported of a bias that is made of weights: a table of one row, which all rows of the product meet."""

        def report(name: str, _: torch.Size) -> BiasCall | None:
            product = reading.report(name, reading.form(reading.weight.detach()).shape, None, False, result)
            return None if product is None else BiasCall(product)

        return self._computed(self.made[id(bias)], as_it_is, report) or []

    def see(self, call: Call) -> None:
        """Notice what a torch.autograd.Function makes of a weight: a value of the weight's that has a gradient all the same."""
        for tensor in call.tensors if self._values_of else ():
            if tensor.requires_grad and id(tensor) in self._values_of and torch.is_grad_enabled():
                for weight in self._values_of[id(tensor)]:
                    self.on_other(self.places[weight], "torch.autograd.Function.apply")

    def _spread(self, call: Call, given: Sequence[Tensor]) -> tuple[dict[int, Tensor], Reading] | None:
        """A table that meets data elementwise, spread over these as broadcasting would spread it, and how to read that.

        By its identity, as in `Call.made`.
        """
        if call.func not in ELEMENTWISE and call.func is not F.scaled_dot_product_attention:
            return None
        tables = {id(t): t for t in given if id(t) in self.made}
        data = [t for t in given if self.is_data(t) and t.is_floating_point()]
        # Checkpointing compares what is kept with what is when the call is made again, without anybody looking on.
        kept = call.func not in SUMS and _hooks_on_saved_tensors()
        if len(tables) != 1 or not data or kept or transformed():
            return None
        (table,) = tables.values()
        # Products of complex numbers are rounded otherwise where one is spread.
        if table.is_complex() or (call.in_place and call.args[0] is table):
            return None
        try:
            if call.func is F.scaled_dot_product_attention:
                scores = mask_of_scores(call)
                if scores is None or scores[0] is not table:
                    return None
                _, shape, data[0] = scores
            else:
                shape = torch.broadcast_shapes(*(t.shape for t in given))
            placed, reading = spread_over(shape, data[0], table)
        except RuntimeError:  # torch is about to say so itself
            return None
        return {id(table): placed}, reading

    def _reading(self, call: Call) -> Reading | None:
        """How a tensor that is made of weights meets data in a product or a convolution."""
        for reading in readings_of(call) if not transformed() else ():
            data, weight = reading.data, reading.weight
            if not (isinstance(data, Tensor) and isinstance(weight, Tensor)) or data.layout != torch.strided:
                continue
            if not self._weights([weight]) or not self.may_be_rows(data):
                continue
            if not (reading.separate and self.samples is not None and self._lies_for_samples(weight)):
                return reading
        return None

    def _calls(self, reading: Reading, result: Tensor) -> list[tuple[Place, LayerCall]] | None:
        """What a rule would report for each weight of which a tensor is made; None where that cannot be told."""
        made = self.made[id(reading.weight)]
        lies = reading.lies(made.weights[0]) if len(made.weights) == 1 else None
        if lies is None:
            return self._computed(
                made, reading.form, lambda name, shape: reading.report(name, shape, None, False, result)
            )
        place = self.places[made.weights[0]]
        call = reading.report(place[1], reading.form(reading.weight).shape, *lies, result)
        return None if call is None else [(place, call)]

    def _computed(
        self,
        made: Made,
        form: Callable[[Tensor], Tensor],
        report: Callable[[str, torch.Size], LayerCall | None],
    ) -> list[tuple[Place, LayerCall]] | None:
        """What is reported of each weight of which a tensor is made; None where that cannot be told.

        Parameters
        ----------
        made : Made
            The tensor.
        form : callable
            Brings it into the form in which it is used.
        report : callable
            Takes a parameter's name and the shape of that form; returns what a rule would report.
        """
        if not (made.unchanged and made.known):
            return None
        value, leaves = self._computed_again(made)
        formed = form(value)
        calls = []
        for parameter, leaf in leaves.items() if formed.requires_grad else ():
            place = self.places[parameter]
            call = report(place[1], formed.shape)
            if call is None:
                return None
            call.computed = functools.partial(_pulled_back, formed, leaf)
            call.inputs_first = _inputs_first(parameter, value, formed)
            calls.append((place, call))
        return calls

    def _computed_again(self, made: Made) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """What is computed of weights, computed again of leaves of a graph of its own, in float64 where that is possible."""
        if made not in self._again:
            weights = self._weights([made.tensor])
            names = [qualified_name(self.places[w]) for w in weights]
            uses, out = ", ".join(map(repr, names)), f"leave it out with layers={[f'!{name}' for name in names]}."
            random = WatchError(
                f"the model draws parts of {uses} at random before it multiplies with it, so its shares cannot be told: {out}"
            )
            calls = [each.by for each in made.in_order() if each.by is not None]
            if any(True for call in calls for _ in instances_in((call.args, call.kwargs), torch.Generator)):
                raise random
            device = made.tensor.device
            before = torch_random_state(device)
            try:
                self._again[made] = self._in_another_graph(made, weights)
            except Exception as error:
                raise WatchError(f"what the model makes of {uses} cannot be computed again ({error}): {out}") from error
            finally:
                drawn = undone_draws(before, device)
            value, _ = self._again[made]
            if drawn:
                raise random
            if self.compare and not _same_weight(made, value):
                raise WatchError(f"what the model makes of {uses} is another one when it is computed again: {out}")
        return self._again[made]

    def _in_another_graph(
        self, made: Made, weights: Sequence[nn.Parameter]
    ) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().clone()

        def wide(tensor: Tensor) -> Tensor:
            return copied(float64(tensor) if can_be_nan(tensor) else tensor)

        # Checkpointing counts what is kept for the backward pass.
        unpacked = saved_tensors_hooks(Tensor.detach, as_it_is) if _hooks_on_saved_tensors() else nullcontext()
        with torch.enable_grad(), torch.autocast(made.tensor.device.type, enabled=False), unpacked:
            for convert in (wide, copied):
                leaves = {w: convert(w).requires_grad_() for w in weights}
                try:
                    value = made.computed({self.weights[w]: leaf for w, leaf in leaves.items()}, convert)
                except RuntimeError:  # where types are named they may not fit float64
                    if convert is copied:
                        raise
                else:
                    break
        return value, leaves


def _same_weight(made: Made, value: Tensor) -> bool:
    """Whether a weight that was computed again is the one that the model computed, to rounding."""
    seen = float64(made.tensor.detach())
    types = [each.tensor.dtype for each in made.in_order() if can_be_nan(each.tensor)]
    tolerance = max(COMPUTED_AGAIN, ROUNDINGS * max(torch.finfo(dtype).eps for dtype in types))
    if not seen.numel():
        return True
    return bool((float64(value.detach()) - seen).abs().max() <= tolerance * seen.abs().max())


def _hooks_on_saved_tensors() -> bool:
    """Whether somebody, as activation checkpointing does, takes what autograd keeps for the backward pass."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None:
        return top(True) is not None
    # Older releases of torch do not say so, but checkpointing can be seen to run.
    checkpoint, frame = sys.modules.get("torch.utils.checkpoint"), sys._getframe()
    while frame is not None and checkpoint is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and checkpoint is not None


def _inputs_first(parameter: nn.Parameter, value: Tensor, formed: Tensor) -> bool:
    """Whether a parameter has inputs where what is computed of it, as a matrix (outputs, inputs), has them last."""
    if formed.ndim != 2 or parameter.ndim != 2:
        return False
    if formed.shape[0] != formed.shape[1]:
        return len(parameter) == formed.shape[1]
    return value.shape == formed.shape and value.stride() != formed.stride()


def _pulled_back(formed: Tensor, leaf: Tensor, share: Tensor) -> Tensor:
    """Share of a parameter, of which a weight was computed, from that of the weight: as a matrix, shape of the parameter."""
    outside = (
        torch.view_as_complex(share.reshape(*formed.shape, 2)) if formed.is_complex() else share.reshape(formed.shape)
    )
    outside = outside.to(formed)
    (gradient,) = torch.autograd.grad(formed, leaf, outside, retain_graph=True, allow_unused=True)
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    return (gradient.to_dense() if gradient.is_sparse else gradient).reshape(len(leaf), -1).to(share)
