"""Weights that a model itself multiplies with data: ``x @ self.weight``, ``F.linear(x, mask * self.layer.weight)``.

Who writes a layer, or gives one of torch's another forward pass or another weight, calls torch's functions with it.  While the
model runs, a TorchFunctionMode looks on at these calls and reports each as a rule reports a layer's.
"""

from __future__ import annotations

import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..arguments import PLAIN, can_be_nan, instances_in, replaced, tensors_in
from ..copies import constants_of
from ..errors import WatchError
from ..generators import restore_random_state, torch_random_state
from ..hooks import Hook, LookingOn, outside_graphs
from ..spectra import float64
from .attention import looked_through
from .call import LayerCall, Place, qualified_name
from .convolution import ConvolutionCall, Geometry
from .embedding import BiasCall, SpreadCall
from .linear import LinearCall

LINEAR = (F.linear, torch.inner, Tensor.inner)
MATMUL = (
    *(torch.matmul, Tensor.matmul, torch.linalg.matmul, torch.mm, Tensor.mm),
    *(torch.bmm, Tensor.bmm, torch.mv, Tensor.mv),
)
ADDMM = (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
# Where each number of a table meets one of data, or several, which broadcasting gives it; sums keep nothing for the backward pass.
SUMS = (torch.add, Tensor.add, Tensor.add_, torch.sub, Tensor.sub, Tensor.sub_, torch.rsub)
ELEMENTWISE = (
    *SUMS,
    *(torch.mul, Tensor.mul, Tensor.mul_, torch.div, Tensor.div, Tensor.div_, torch.where, Tensor.where),
)
CONVOLUTION = (F.conv1d, F.conv2d, F.conv3d)
CONVOLUTION_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
# What autograd does not follow; and what takes nothing but a form of its arguments but for the first, if that.
DETACHED = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
ASSIGNED = (Tensor.data.__set__,)  # type: ignore[attr-defined]
FORM_ALONE = (
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor),
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like),
    *(torch.gt, torch.lt, torch.ge, torch.le, torch.eq, torch.ne),
    *(Tensor.gt, Tensor.lt, Tensor.ge, Tensor.le, Tensor.eq, Tensor.ne),
    *(torch.argmax, torch.argmin, torch.argsort, Tensor.argmax, Tensor.argmin, Tensor.argsort, torch.sign, Tensor.sign),
)
# Of which numbers of samples may come that are no tensors among the model's arguments.
OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)
FORM_OF_OTHERS = (Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as)
# Largest deviation of a weight that is computed again, in units of its largest number: that, or so many roundings.
COMPUTED_AGAIN, ROUNDINGS = 1e-3, 16


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a function."""

    func: Callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def in_place(self) -> bool:
        """Whether it changes its first argument."""
        name = getattr(self.func, "__name__", "")
        return name.endswith("_") and not name.endswith("__") and bool(self.args) and isinstance(self.args[0], Tensor)

    @functools.cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among its arguments."""
        found: list[Tensor] = []
        for each in (*self.args, *self.kwargs.values()):
            if isinstance(each, Tensor):
                found.append(each)
            elif type(each) not in PLAIN:
                found += tensors_in(each)
        return found

    def made(self, others: Mapping[int, Tensor] | None = None) -> Any:
        """Carry it out, with others in place of some tensors, by their identities."""
        if not others:
            return self.func(*self.args, **self.kwargs)
        return self.func(*replaced(self.args, others), **replaced(self.kwargs, others))


@dataclass(frozen=True, eq=False)
class Made:
    """A weight, or what is computed of weights alone.

    Attributes
    ----------
    tensor : Tensor
        It, which may be changed afterwards.
    version : int
        How often it had been changed in place by then.
    weights : tuple of Parameter
        Of which it is made.
    by : Call or None
        What it was computed by; None of a weight itself, and where that is not known.
    number : int
        Which of the call's results it is.
    of : dict of int to Made
        What among the call's arguments is made of weights, by identity.
    constants : list of (Tensor, int)
        What else is among them, and weights, with their versions.
    """

    tensor: Tensor
    version: int
    weights: tuple[nn.Parameter, ...]
    by: Call | None = None
    number: int = 0
    of: Mapping[int, Made] = field(default_factory=dict)
    constants: Sequence[tuple[Tensor, int]] = ()

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight itself."""
        return len(self.weights) == 1 and self.tensor is self.weights[0]

    @property
    def unchanged(self) -> bool:
        """Whether it holds what it was made as."""
        return self.is_weight or self.tensor._version == self.version

    @property
    def known(self) -> bool:
        """Whether the calls, made again, give what it was made as."""
        return all(
            each.is_weight
            or (each.by is not None and all(_version(tensor) == version for tensor, version in each.constants))
            for each in self.in_order()
        )

    @property
    def spread(self) -> bool:
        """Whether something of which it is made was given more numbers than there were, as for each sample the same."""
        made_of = [(each, [of.tensor.numel() for of in each.of.values()]) for each in self.in_order()]
        return any(sizes and each.tensor.numel() > max(sizes) for each, sizes in made_of)

    def in_order(self) -> list[Made]:
        """It after all that it is computed of, each once."""
        found: dict[Made, None] = {}
        waiting = [(self, False)]
        while waiting:
            made, ready = waiting.pop()
            if ready:
                found[made] = None
            elif made not in found:
                waiting.append((made, True))
                waiting += [(each, False) for each in made.of.values()]
        return list(found)

    def computed(self, values: dict[Made, Tensor], convert: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute it again.

        Parameters
        ----------
        values : dict of Made to Tensor
            What some are, such as the weights; filled with the others.
        convert : callable
            What constants are to be.
        """
        for made in self.in_order():
            if made in values:
                continue
            if made.by is None:
                values[made] = convert(made.tensor)
                continue
            others = {id(t): convert(t) for t in made.by.tensors}
            others |= {key: values[each] for key, each in made.of.items()}
            if made.by.in_place:  # what was there before may be of use for others
                others[id(made.by.args[0])] = others[id(made.by.args[0])].clone()
            values[made] = list(tensors_in(made.by.made(others)))[made.number]
        return values[self]


class FollowedWeights(LookingOn, ABC):
    """Follows weights through a forward pass, and what is computed of them, until they meet data.

    Parameters
    ----------
    model : nn.Module
        The model, whose buffers, attributes and other parameters are no data.
    weights : iterable of Parameter
        The weights.
    samples : int, optional
        Samples in the batch, where that is known.
    states : bool
        Whether what is made of nothing, or a constant, is data where it has that many rows and is multiplied with a weight.
    followed : iterable of Parameter
        Weights of layers that are followed through these, too, since what enters them is of no sample.

    Attributes
    ----------
    followed : set of int
        Their identities.
    within : list of collections of int
        For each layer that is running, whose rule reports its uses, the identities of its weights.
    took_states : bool
        Whether something that is no data was taken for a state of as many samples.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Iterable[nn.Parameter],
        samples: int | None = None,
        states: bool = True,
        followed: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__()
        self.samples, self.states, self.followed = samples, states, set(map(id, followed))
        # An identity is only unique while its object lives.
        self.weights = {weight: Made(weight, weight._version, (weight,)) for weight in weights}
        self.made = {id(weight): made for weight, made in self.weights.items()}
        self._constants: dict[int, tuple[Tensor, int]] = {}
        self._fresh: dict[int, tuple[Tensor, int]] = {}
        self._remember(self._constants, constants_of(model))
        self._remember(self._fresh, (p for p in model.parameters() if p not in self.weights))
        # What is computed of weights where autograd does not follow.
        self._values_of: dict[int, tuple[nn.Parameter, ...]] = {}
        # Inputs, and what has been made in this pass: other whole numbers, in a closure say, were there before.
        self.known_numbers: set[int] | None = None
        self.within: list[Collection[int]] = []
        self.took_states = False

    def share(self, inputs: Iterable[Tensor]) -> None:
        """Take what is given to the model, but is of all samples, for constants."""
        self._remember(self._constants, inputs)

    @abstractmethod
    def carry_out(self, call: Call, weights: Sequence[nn.Parameter]) -> Any:
        """Carry out a call that takes what is made of weights, and maybe data; return what shall be its result."""

    @staticmethod
    def taken(call: Call) -> list[Tensor]:
        """Tensors of which a call takes the numbers."""
        return call.tensors[:1] if call.func in FORM_OF_OTHERS else call.tensors

    def see(self, call: Call) -> None:
        """Look at a call that takes no such thing before it is carried out."""

    @outside_graphs
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = Call(func, args, kwargs or {})
        if self.known_numbers is None:
            return self._called(call)
        self._remember(self._constants, (t for t in call.tensors if self._was_there(t) and not self.holds(t)))
        result = self._called(call)
        self.known_numbers.update(map(id, tensors_in(result)))
        return result

    def _called(self, call: Call) -> Any:
        func, args = call.func, call.args
        if func in ASSIGNED:
            self._forget(args[0])
            return call.made()
        taken = self.taken(call)
        # Without gradients, as for the target of a moving average, a weight is data.  Numbers alone, such as a penalty that is added
        # to a loss, are of no sample.
        weights = self._weights(taken) if torch.is_grad_enabled() and any(t.ndim for t in taken) else []
        if func is F.multi_head_attention_forward and weights:
            with self:
                return looked_through()(*args, **call.kwargs)
        if not weights or func in FORM_ALONE:
            self.see(call)
            held = all(map(self.holds, taken))
            result = call.made()
            if held and not (func in OF_NUMBERS and not result.is_floating_point()):
                self.note(call, result)
            return result
        return self.carry_out(call, weights)

    def _weights(self, tensors: Iterable[Tensor]) -> list[nn.Parameter]:
        """Of which weights tensors are made, but for those of the layer that is running."""
        own = self.within[-1] if self.within else ()
        weights = dict.fromkeys(w for t in tensors if id(t) in self.made for w in self.made[id(t)].weights)
        return [w for w in weights if id(w) not in own or id(w) in self.followed]

    @staticmethod
    def _remember(known: dict[int, tuple[Tensor, int]], tensors: Iterable[Tensor]) -> None:
        known.update({id(t): (t, _version(t)) for t in tensors})

    def _forget(self, tensor: Tensor) -> None:
        for known in (self._constants, self._fresh):
            known.pop(id(tensor), None)

    @staticmethod
    def _is_in(known: Mapping[int, tuple[Tensor, int]], tensor: Tensor) -> bool:
        """Whether it is known, and nothing has been written into it since."""
        _, version = known.get(id(tensor), (None, -1))
        return version == _version(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of weights, other parameters, constants or nothing."""
        return id(tensor) in self.made or self._is_in(self._constants, tensor) or self._is_in(self._fresh, tensor)

    def is_data(self, tensor: Tensor) -> bool:
        """Whether it is anything else, with a value for each sample maybe."""
        return tensor.ndim > 0 and not self.holds(tensor)

    def may_be_rows(self, tensor: Tensor) -> bool:
        """Whether what is multiplied with a weight is data, or a state that is made of nothing for each sample."""
        if not self.holds(tensor):
            return True
        if id(tensor) in self.made or isinstance(tensor, nn.Parameter):
            return False
        of_samples = self.states and self.samples in tensor.shape
        self.took_states = self.took_states or of_samples
        return of_samples or (self.samples is None and self._is_in(self._fresh, tensor))

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of no data, or holds whole numbers that were there before this pass."""
        return self.holds(tensor) or self._was_there(tensor)

    def _was_there(self, tensor: Tensor) -> bool:
        before = self.known_numbers is not None and id(tensor) not in self.known_numbers
        return before and not (tensor.is_floating_point() or tensor.is_complex())

    def note(self, call: Call, result: Any) -> None:
        """Note what a call has made of weights, or of constants, as weights are where autograd does not follow."""
        given = call.tensors
        weights = tuple(self._weights(given))
        made = list(tensors_in(result))
        if not weights or call.func in DETACHED or call.func in FORM_ALONE or not torch.is_grad_enabled():
            if weights and not torch.is_grad_enabled():
                self._values_of |= {id(t): weights for t in made if id(t) not in self.made and not t.requires_grad}
            fresh = call.func in FORM_ALONE or not any(self._is_in(self._constants, t) for t in given)
            self._remember(self._fresh if fresh else self._constants, (t for t in made if id(t) not in self.made))
            # What was written into, of what is held, is held still.
            for held in (self._constants, self._fresh):
                self._remember(held, (t for t in given if id(t) in held))
            return
        of = {id(t): self.made[id(t)] for t in given if id(t) in self.made}
        written = call.args[0] if call.in_place or call.func is Tensor.__setitem__ else None
        for tensor in (written, getattr(written, "_base", None)):
            if isinstance(tensor, Tensor) and id(tensor) not in self.made:  # what is in it is not followed
                self.made[id(tensor)] = Made(tensor, tensor._version, weights)
        changed = of.get(id(call.args[0])) if call.in_place else None
        # Of what somebody else has changed in between, as by a view of it, what it holds is not known.
        followed = all(each.unchanged for each in of.values() if each is not changed)
        if changed is not None:
            followed = followed and changed.tensor._version == changed.version + 1
        constants = [(t, _version(t)) for t in given if id(t) not in of or of[id(t)].is_weight]
        for number, tensor in enumerate(made):
            if id(tensor) not in self.made or (changed is not None and not changed.is_weight):
                by = call if followed and (written is None or changed is not None) else None
                self.made[id(tensor)] = Made(tensor, tensor._version, weights, by, number, of, constants)


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
            return self._carry_out_with_rows(call, given)
        result = call.made(placed)
        calls = self._calls(reading, result) if reading is not None and isinstance(result, Tensor) else None
        if calls is None and not with_data:
            self.note(call, result)
            return result
        reported = []
        if reading is not None and calls is not None:
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
            # As many of each sample may lie one after the other, as heads of an attention.
            of_samples = table.ndim > 1 and (
                self.samples is None or any(n % self.samples == 0 for n in table.shape[:-1])
            )
            if of_samples and table is not written and self._weights([table]) and self.made[id(table)].spread:
                spread, reading = _spread_over(table.shape, table, table)
                calls = None if _transformed() else self._calls(reading, spread)
                if calls is not None:
                    placed[id(table)] = self._report(calls, spread)
        self._refuse(call, (t for t in given if id(t) not in placed))
        return call.made(placed)

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

        return self._computed(self.made[id(bias)], _as_it_is, report) or []

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
        if len(tables) != 1 or not data or kept or _transformed():
            return None
        (table,) = tables.values()
        # Products of complex numbers are rounded otherwise where one is spread.
        if table.is_complex() or (call.in_place and call.args[0] is table):
            return None
        try:
            if call.func is F.scaled_dot_product_attention:
                named = _named("query key value attn_mask", call.args, call.kwargs)
                if table is not named.get("attn_mask"):
                    return None
                query, key = named["query"], named["key"]
                batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
                shape, data = torch.Size((*batch, query.shape[-2], key.shape[-2])), [query[..., :1]]
            else:
                shape = torch.broadcast_shapes(*(t.shape for t in given))
            placed, reading = _spread_over(shape, data[0], table)
        except RuntimeError:  # torch is about to say so itself
            return None
        return {id(table): placed}, reading

    def _reading(self, call: Call) -> Reading | None:
        """How a tensor that is made of weights meets data in a product or a convolution."""
        for reading in _readings(call) if not _transformed() else ():
            data, weight = reading.data, reading.weight
            if not (isinstance(data, Tensor) and isinstance(weight, Tensor)) or data.layout != torch.strided:
                continue
            if self._weights([weight]) and self.may_be_rows(data):
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
                after = torch_random_state(device)
                drawn = not all(torch.equal(before[name], after[name]) for name in before)
                if drawn:
                    restore_random_state(before, device)
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
        unpacked = saved_tensors_hooks(Tensor.detach, _as_it_is) if _hooks_on_saved_tensors() else nullcontext()
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


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place."""
    return 0 if tensor.is_inference() else tensor._version


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


def _transformed() -> bool:
    """Whether torch.func is running the call, with tensors of its own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


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


def layers_noted(
    layers: Mapping[nn.Module, Collection[int]], within: Callable[[], list[Collection[int]]]
) -> list[RemovableHandle]:
    """Note which layers are running whose rules report their uses.

    Parameters
    ----------
    layers : mapping of Module to collection of int
        Each layer with the identities of its weights.
    within : callable
        Returns the list on which the weights of each layer that is running are to stand, the innermost last.
    """

    def begins(own: Collection[int], *_: Any) -> None:
        within().append(own)

    def ends(*_: Any) -> None:
        if running := within():
            running.pop()

    handles: list[RemovableHandle] = []
    for module, own in layers.items():
        handles.append(module.register_forward_pre_hook(Hook(functools.partial(begins, own))))
        handles.append(module.register_forward_hook(Hook(ends), always_call=True, prepend=True))
    return handles


# ---------------------------------------------------------------------- what torch's functions do


@dataclass(frozen=True, eq=False)
class Reading:
    """A way to read a call as one of data with a weight.

    Attributes
    ----------
    data, weight : Tensor
        The two.
    form : callable
        Brings the weight into the form in which it is used: a matrix (outputs, inputs), or a kernel.
    lies : callable
        Takes a parameter; returns which rows of it that form has, None for all, and whether it has them transposed; or None, where it
        is no such part of the parameter.
    report : callable
        Makes what a rule would report, of the parameter's name, the shape of the form, the two of ``lies``, and what was returned.
    bias : Tensor or None
        What is added to each row of what is returned.
    """

    data: Any
    weight: Any
    form: Callable[[Tensor], Tensor]
    lies: Callable[[nn.Parameter], tuple[tuple[int, int] | None, bool] | None]
    report: Callable[[str, torch.Size, tuple[int, int] | None, bool, Tensor], LayerCall | None]
    bias: Any = None


def _named(names: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _readings(call: Call) -> Iterator[Reading]:
    func, args, kwargs = call.func, call.args, call.kwargs
    if func in CONVOLUTION or func in CONVOLUTION_TRANSPOSED:
        names = "input weight bias stride padding dilation groups"
        if func in CONVOLUTION_TRANSPOSED:
            names = "input weight bias stride padding output_padding groups dilation"
        yield _convolution(func in CONVOLUTION_TRANSPOSED, _named(names, args, kwargs))
    elif func in LINEAR:
        given = _named("input weight bias" if func is F.linear else "input other", args, kwargs)
        yield from _product(given["input"], given["weight" if func is F.linear else "other"], bias=given.get("bias"))
    elif func in MATMUL or func in ADDMM:
        tensors = [t for t in call.tensors if t is not kwargs.get("out")]
        factors = [
            *(each for each in args if not isinstance(each, Tensor)),
            kwargs.get("alpha", 1),
            kwargs.get("beta", 1),
        ]
        if any(factor != 1 for factor in factors) or len(tensors) < 2:
            return
        left, right = tensors[-2:]
        bias = tensors[0] if func in ADDMM else None
        if right.ndim > 1:
            yield from _product(left, right, _turned, bias=bias)
            yield from _product(right.mT, left, turned=_turned, data=right)
        else:
            yield from _product(left, right, _as_row, _as_column)
            yield from _product(right, left)
    elif func is torch.einsum:
        yield from _readings_of_einsum(args)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    return tensor.mT


def _as_row(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0)


def _as_column(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1)


def _convolution(transposed: bool, given: Mapping[str, Any]) -> Reading:
    weight = given["weight"]

    def lies(parameter: nn.Parameter) -> tuple[None, bool] | None:
        # Another shape of the kernel is the same matrix, if its rows are.
        same = weight.data_ptr() == parameter.data_ptr() and len(weight) == len(parameter)
        whole = weight.numel() == parameter.numel() and weight.is_contiguous() and parameter.is_contiguous()
        return (None, False) if same and whole else None

    def report(name: str, shape: torch.Size, _: Any, __: bool, result: Tensor) -> ConvolutionCall:
        stride, padding, dilation = given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)
        geometry = Geometry.of_function(tuple(shape), stride, padding, dilation, given.get("groups", 1), transposed)
        return ConvolutionCall(geometry, given["input"], result, name)

    return Reading(given["input"], weight, _as_it_is, lies, report, given.get("bias"))


def _product(
    rows: Any,
    weight: Any,
    form: Callable[[Tensor], Tensor] = _as_it_is,
    turned: Callable[[Tensor], Tensor] | None = None,
    data: Any = None,
    bias: Any = None,
) -> Iterator[Reading]:
    """``rows @ form(weight).T``, if that is a matrix; turned, the result has the shape (..., outputs).

    The rows may be a view of the data.
    """

    def matrix(tensor: Tensor) -> Tensor:
        tensor = form(tensor)
        while tensor.ndim > 2 and (len(tensor) == 1 or tensor.stride(0) == 0):  # spread over a batch
            tensor = tensor[0]
        return tensor

    def lies(parameter: nn.Parameter) -> tuple[tuple[int, int] | None, bool] | None:
        return _rows_of(parameter.detach().reshape(len(parameter), -1), matrix(weight.detach()))

    def report(
        name: str, shape: torch.Size, part: tuple[int, int] | None, transposed: bool, result: Tensor
    ) -> LinearCall | None:
        made = result if turned is None else turned(result)
        fits = len(shape) == 2 and made.shape == (*rows.shape[:-1], shape[0])
        return LinearCall(name, rows, result, part, transposed, turned) if fits else None

    if isinstance(weight, Tensor) and matrix(weight.detach()).ndim == 2:
        yield Reading(rows if data is None else data, weight, matrix, lies, report, bias)


def _spread_over(shape: torch.Size, data: Tensor, table: Tensor) -> tuple[Tensor, Reading]:
    """A table as broadcasting spreads it, and that as a lookup of its rows, of which each row of data meets one."""
    again = [dim for dim, size in enumerate(table.shape[:-1]) if size > 1 and not table.stride(dim)]  # spread already

    def form(tensor: Tensor) -> Tensor:
        for dim in again:
            tensor = tensor.narrow(dim, 0, 1)
        return tensor

    own = form(table.detach())
    width = own.shape[-1] if own.ndim else 1  # 1 where one number meets whole rows
    rows = own.numel() // max(width, 1)
    index = torch.arange(rows, device=own.device).view(own.shape[:-1]).expand(shape[:-1])
    placed = table.expand(shape)

    def lies(parameter: nn.Parameter) -> tuple[tuple[int, int] | None, bool] | None:
        found = _rows_of(parameter.detach().reshape(len(parameter), -1), own.reshape(rows, width))
        return None if found is None or found[1] else found

    def report(name: str, _: torch.Size, part: tuple[int, int] | None, __: bool, ___: Tensor) -> SpreadCall:
        first, total = part or (0, rows)
        return SpreadCall(name, data.expand(shape), index + first, placed, total, width != shape[-1])

    return placed, Reading(data, table, form, lies, report)


def _rows_of(whole: Tensor, matrix: Tensor) -> tuple[tuple[int, int] | None, bool] | None:
    """Which rows of a matrix another one is, or, transposed, its transpose is, by where they lie."""
    if matrix.ndim != 2 or matrix.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    (many, width), (over_rows, over_columns) = whole.shape, whole.stride()
    first, between = divmod(int(matrix.storage_offset() - whole.storage_offset()), max(over_rows, 1))
    for transposed, seen in ((False, matrix), (True, matrix.T)):
        (rows, columns), (rows_apart, columns_apart) = seen.shape, seen.stride()
        apart = rows > 1 and rows_apart != over_rows, columns > 1 and columns_apart != over_columns
        if columns == width and not any(apart) and not between and 0 <= first <= many - rows:
            return None if rows == many else (first, many), transposed
    return None


def _readings_of_einsum(args: Sequence[Any]) -> Iterator[Reading]:
    """``torch.einsum("...i,io->...o", x, weight)`` and the like: what is summed over are inputs, what is left of a weight outputs."""
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    left, arrow, right = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    terms = left.split(",")
    if not arrow:
        alone = sorted(each for each in left if left.count(each) == 1 and each.isalpha())
        right = ("..." if "..." in left else "") + "".join(alone)
    if not right or len(terms) != 2 or len(operands) != 2 or not all(isinstance(each, Tensor) for each in operands):
        return
    for data, weight, seen, letters in (operands + terms, operands[::-1] + terms[::-1]):
        dots = "0123456789"[: data.ndim - len(seen.replace("...", ""))]  # a letter for each dimension that has none
        seen, letters, made = seen.replace("...", dots), letters.replace("...", ""), right.replace("...", dots)
        inputs, outputs = ([each for each in letters if (each in made) == kept] for kept in (False, True))
        rows = [each for each in made if each not in outputs]
        once = all(len(set(term)) == len(term) for term in (seen, letters, made))
        if once and inputs and outputs and len(letters) == weight.ndim and sorted(seen) == sorted(rows + inputs):
            yield from _product(
                _permuted(data, [seen.index(each) for each in rows + inputs], len(rows)),
                weight,
                functools.partial(
                    _as_matrix, order=[letters.index(each) for each in outputs + inputs], first=len(outputs)
                ),
                functools.partial(_permuted, order=[made.index(each) for each in rows + outputs], first=len(rows)),
                data,
            )


def _permuted(tensor: Tensor, order: list[int], first: int) -> Tensor:
    """Dimensions in an order, and those after the first ones as one."""
    return tensor.permute(order).flatten(first)


def _as_matrix(tensor: Tensor, order: list[int], first: int) -> Tensor:
    tensor = tensor.permute(order)
    return tensor.reshape(math.prod(tensor.shape[:first]), -1)
