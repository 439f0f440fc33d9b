"""Weights followed through a forward pass, and what is computed of them, until they meet data.

While a model runs, a TorchFunctionMode looks on at its calls of torch's functions.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..arguments import PLAIN, replaced, tensors_in
from ..copies import constants_of
from ..generators import torch_random_state, undone_draws
from ..hooks import Hook, LookingOn, outside_graphs
from .attention import looked_through

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
# Where each number of a table meets one of data, or several, which broadcasting gives it; sums keep nothing for the backward pass.
SUMS = (torch.add, Tensor.add, Tensor.add_, torch.sub, Tensor.sub, Tensor.sub_, torch.rsub)
ELEMENTWISE = (
    *SUMS,
    *(torch.mul, Tensor.mul, Tensor.mul_, torch.div, Tensor.div, Tensor.div_, torch.where, Tensor.where),
)
SPREADING = (
    *(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat, torch.tile, Tensor.tile),
    *(torch.repeat_interleave, Tensor.repeat_interleave),
)
DROPOUT = (F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
# Of which numbers of samples may come that are no tensors among the model's arguments.
OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)
FORM_OF_OTHERS = (Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as)


def _place_of_inplace(func: Callable) -> int | None:
    """Which argument of one of torch's functions that are written in Python says that it is to work in place."""
    code = getattr(func, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    return names.index("inplace") if "inplace" in names else None


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a function."""

    func: Callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def in_place(self) -> bool:
        """Whether it changes its first argument."""
        if not (self.args and isinstance(self.args[0], Tensor)):
            return False
        name, place = getattr(self.func, "__name__", ""), _place_of_inplace(self.func)
        asked = self.kwargs.get("inplace", place is not None and len(self.args) > place and self.args[place])
        return bool(asked) or (name.endswith("_") and not name.endswith("__"))

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
            or (each.by is not None and all(version_of(tensor) == version for tensor, version in each.constants))
            for each in self.in_order()
        )

    @property
    def spread(self) -> bool:
        """Whether something of which it is made was given further rows or dimensions, as for each sample the same."""
        return any(each.by is not None and (each.by.func in SPREADING or each._broadcast) for each in self.in_order())

    @property
    def _broadcast(self) -> bool:
        """Whether it became larger by meeting a constant, or has more dimensions."""
        before = [made.tensor for made in self.of.values()]
        larger = all(each.numel() < self.tensor.numel() or each.ndim < self.tensor.ndim for each in before)
        return self.by is not None and self.by.func in ELEMENTWISE and larger

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
        self._of_this_pass: set[int] = set()
        self.within: list[Collection[int]] = []
        self.took_states = False

    def receive(self, given: Any, shared: Iterable[Tensor] = ()) -> None:
        """Take what the model is about to be called with, of which some tensors are of all samples: these are constants."""
        self._of_this_pass = set(map(id, tensors_in(given)))
        self._remember(self._constants, shared)

    @staticmethod
    def drawn(call: Call) -> tuple[Any, Call]:
        """Carry out a call that takes no data; return the call by which it can be made again, without drawing at random in dropout."""
        if call.func not in DROPOUT or not call.tensors:
            return call.made(), call
        given, device = call.tensors[0], call.tensors[0].device
        # Ones that lie as it does: kernels draw in the order of what lies in memory.
        room = 1 + sum((size - 1) * stride for size, stride in zip(given.shape, given.stride(), strict=True))
        ones = torch.ones(max(room, 0), dtype=given.dtype, device=device).as_strided(given.shape, given.stride())
        before = torch_random_state(device)
        with torch.no_grad():
            mask = call.made({id(given): ones})
        drew = undone_draws(before, device)
        result = call.made()
        return result, Call(Tensor.mul_ if call.in_place else torch.mul, (given, mask), {}) if drew else call

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
        self._remember(self._constants, (t for t in call.tensors if self._was_there(t) and not self.holds(t)))
        result = self._called(call)
        self._of_this_pass.update(map(id, tensors_in(result)))
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
        known.update({id(t): (t, version_of(t)) for t in tensors})

    def _forget(self, tensor: Tensor) -> None:
        for known in (self._constants, self._fresh):
            known.pop(id(tensor), None)

    @staticmethod
    def _is_in(known: Mapping[int, tuple[Tensor, int]], tensor: Tensor) -> bool:
        """Whether it is known, and nothing has been written into it since."""
        _, version = known.get(id(tensor), (None, -1))
        return version == version_of(tensor)

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
        return id(tensor) not in self._of_this_pass and not (tensor.is_floating_point() or tensor.is_complex())

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
            followed = followed and changed.tensor._version <= changed.version + 1
        constants = [(t, version_of(t)) for t in given if id(t) not in of or of[id(t)].is_weight]
        for number, tensor in enumerate(made):
            if id(tensor) not in self.made or (changed is not None and not changed.is_weight):
                by = call if followed and (written is None or changed is not None) else None
                self.made[id(tensor)] = Made(tensor, tensor._version, weights, by, number, of, constants)


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been changed in place."""
    return 0 if tensor.is_inference() else tensor._version


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
