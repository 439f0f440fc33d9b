"""Proof on your own model: recorded spectra against the definition, unchanged training, and what watching costs."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.func import functional_call

from autospec.introspection import Watcher
from autospec.introspection.arguments import as_array, can_be_nan, of_packing, replaced, tensors_in
from autospec.introspection.audit import LONG_SUM
from autospec.introspection.copies import copy_model, kept_apart, without_short_cuts
from autospec.introspection.errors import WatchError
from autospec.introspection.generators import generators_kept, random_state, restore_random_state, seed_random_numbers
from autospec.introspection.groups import Groups
from autospec.introspection.layers import layers_noted, rule_for, weights_by_layer
from autospec.introspection.layers.followed import Call, FollowedWeights, Made
from autospec.introspection.layers.readings import LINEAR, MATMUL
from autospec.introspection.rows import dims_of_size

STEPS = 3
SEED = 0
# Largest deviation in units of the share's own largest singular value, where the model computes in float32: both the
# recorded share and autograd's are rounded.
TOLERANCE = 2e-5
# Largest deviation, relative to the largest value, of the outputs of samples that have another place in the batch.
MOVED = 1e-4
# Why layers are not compared that have nothing to compare.
FROZEN, ZERO = "it is frozen", "its gradient is zero"


@dataclass
class Check:
    """What was found.

    Attributes
    ----------
    errors : dict of (parameter, group) to float
        Deviation of the recorded gradient spectrum from the definition, in units of the largest singular value of the
        share (of the batch's, where a share is a thousand times smaller).
    not_compared : dict of str to str
        Layers for which the definition could not be run, and why.
    unchanged : bool
        Whether weights, optimizer state and random numbers after some steps are bitwise those of training without the
        watcher.
    reproducible : bool
        Whether two trainings without the watcher are bitwise equal; where they are not, ``unchanged`` says nothing.
    cost : float
        Time of a watched step over that of a plain one; NaN with a single step, in which rows are traced.
    audit : dict
        The watcher's own audit.
    """

    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)
    unchanged: bool = False
    reproducible: bool = False
    cost: float = float("nan")
    audit: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the spectra are those of the definition and the training is unchanged; not so if none could be compared."""
        exact = bool(self.errors) and max(self.errors.values()) <= TOLERANCE
        return exact and (self.unchanged or not self.reproducible)

    def __str__(self) -> str:
        largest: dict[str, float] = {}
        for (name, _), error in self.errors.items():
            largest[name] = max(largest.get(name, 0.0), error)
        lines = ["largest deviation from the definition, in units of the largest singular value:"]
        lines += [f"  {name:40s} {error:.1e}" for name, error in largest.items()]
        lines += [f"  {name:40s} not compared: {reason}" for name, reason in self.not_compared.items()]
        if self.reproducible:
            lines.append(f"training bitwise unchanged: {'yes' if self.unchanged else 'NO'}")
        else:
            lines.append("training bitwise unchanged: cannot be told, two plain trainings differ already")
        if np.isfinite(self.cost):
            lines.append(f"a watched step takes {self.cost:.2f} times as long as a plain one")
        if self.errors or (self.reproducible and not self.unchanged):
            left = [name for name, reason in self.not_compared.items() if reason not in (FROZEN, ZERO)]
            part = f", for {len(largest)} of {len({*largest, *left})} matrices" if left else ""
            lines.append(f"passed{part}" if self.passed else "FAILED")
        else:
            lines.append("NOT PROVEN: no layer could be compared with the definition")
        return "\n".join(lines)


def check(
    model: nn.Module,
    batch: Any,
    groups: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    steps: int = STEPS,
    quiet: bool = False,
    **options: Any,
) -> Check:
    """Compare what `autospec.watch` records of a model with the definition, run literally.

    For each group every watched layer is run twice, once with its own weights and once with a copy of them; the outputs of
    the group's samples are taken from the copy, and the derivative with respect to the copy is the group's share.  Where in its
    outputs a layer has the samples, or as many rows of each, shows a batch in another order.  A layer whose outputs do not
    follow it is not compared, or as ``rows=`` says.

    Parameters
    ----------
    model : nn.Module
        The model; it is copied and stays as it is.
    batch : Tensor, tuple or dict
        What the model is called with: ``model(x)``, ``model(*batch)`` or ``model(**batch)``.
    groups : as for `autospec.watch`
        One label a sample.
    loss : callable, optional
        ``loss(output)``; by default a weighted sum of squares of all the output's tensors.
    steps : int
        Steps of training with and without the watcher.
    quiet : bool
        Do not print the result.
    **options
        Passed on to the watcher, such as ``batch_dim=`` or ``rows=``; not ``store=``.

    Returns
    -------
    Check
        ``check(...).passed`` says whether all is well.

    Raises
    ------
    WatchError
        If the model or the groups cannot be watched, learns nothing, or the options leave no step or no gradient to compare.

    Examples
    --------
    >>> autospec.testing.check(model, x, labels).passed  # doctest: +SKIP
    True
    """
    if "store" in options:
        raise WatchError("check() keeps what it records in memory: leave out store=.")
    if "gradient" not in options.get("statistics", ("gradient",)):
        raise WatchError(
            "check() compares gradients with the definition: name 'gradient' among statistics=, or leave it out."
        )
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise WatchError(f"steps={steps!r} is not a whole number of at least 1.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise WatchError("check() needs a parameter that learns, and all of the model's are frozen.")
    loss = loss or _generic_loss
    found = Check()
    with kept_apart(model) as copied, generators_kept(list(model.parameters())), torch.enable_grad():
        twin = copy_model(model)
        copied.update(twin.modules())
        _call(twin, batch)  # a copy that called the model itself would train it
    plain, watched = _Training(model, batch, loss), _Training(model, batch, loss)
    again = _Training(model, batch, loss)
    seconds = plain.run(steps)
    again.run(steps)
    with Watcher(watched.model, groups, quiet=True, **options) as watcher:
        watched.run(1, watcher)  # the first step finds the rows and audits
        watched_seconds = watched.run(steps - 1, watcher)
    if steps > 1:
        found.cost = watched_seconds / (steps - 1) / (seconds / steps)
    found.reproducible = plain.same_as(again)
    found.unchanged = plain.same_as(watched)
    tree = watcher.trajectories
    found.audit = tree.attrs["audit"]
    assignment = Groups(groups).assign(groups) if groups is not None else None
    names = watcher.groups
    samples = _batch_size(batch) if assignment is None else len(assignment.cells)
    rows = {name: torch.from_numpy(as_array(of)).long() for name, of in (options.get("rows") or {}).items()}
    watched = list(tree["layers"].children)
    order = _another_order(samples)
    moved, shared = _in_order(batch, order, options.get("batch_dim"), watcher.shared_inputs)
    owners, followed = _owners(model, batch, moved, order, rows, watched, shared)
    for number, group in enumerate(names):
        everyone = np.ones(samples, dtype=bool)
        member = everyone if assignment is None else assignment.members[assignment.cells][:, number]
        shares, reasons = _shares_by_copies(model, batch, loss, member, owners, watched, followed, shared)
        found.not_compared |= reasons
        for name, share in shares.items():
            values = tree[f"layers/{name}/gradient"].isel(step=0)
            if not bool(torch.isfinite(share).all()):
                found.not_compared[name] = "its gradient is not finite"
                continue
            exact = torch.linalg.svdvals(share.cpu().double()).numpy()
            values = values.isel(index=(values["index"] <= len(exact)).values)
            recorded = values.sel(group=group).dropna("index")
            scale = max(exact[0], 1e-3 * float(values.sel(group="all")[0]))
            if len(recorded) and scale > 0:
                deviation = np.abs(recorded.values.astype(np.float64) - exact[recorded["index"].values - 1]).max()
                if TOLERANCE * scale < deviation <= LONG_SUM * _rounding_of_factors(tree[f"layers/{name}"], group):
                    found.not_compared[name] = "its gradient cancels, so that what is left of it is rounding"
                else:
                    found.errors[name, group] = float(deviation / scale)
    for name in tree["layers"].children:
        if name not in {key for key, _ in found.errors} and name not in found.not_compared:
            learned = name in {each for each, parameter in model.named_parameters() if parameter.requires_grad}
            there = bool((tree[f"layers/{name}/gradient"].isel(step=0).sel(group="all") > 0).any())
            elsewhere = "it is not called in evaluation mode, which shows where it has the samples"
            found.not_compared[name] = (elsewhere if there else ZERO) if learned else FROZEN
    if not quiet:
        print(found)
    return found


def _rounding_of_factors(node: xr.DataTree, group: str) -> float:
    """Rounding of float32 times the norms of the rows of activations and adjoints, as far as their recorded values have them."""
    if not {"activation", "adjoint"} <= set(node.data_vars):
        return 0.0
    factors = (node[name].isel(step=0).sel(group=group).fillna(0) for name in ("activation", "adjoint"))
    return float(np.prod([np.linalg.norm(values) for values in factors])) * float(np.finfo(np.float32).eps)


def _generic_loss(output: Any) -> Tensor:
    total: Tensor | None = None
    for tensor in tensors_in(output):
        if tensor.is_floating_point() and tensor.requires_grad:
            weights = torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
            part = (weights * (tensor.reshape(-1) - 0.3).square()).mean()
            total = part if total is None else total + part
    if total is None:
        raise WatchError("the model's output holds no tensor with a gradient: give check() a loss.")
    return total


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def _batch_size(batch: Any) -> int:
    return len(next(tensors_in(batch)))


class _Training:
    """A few steps of a copy of the model, always with the same random numbers."""

    def __init__(self, model: nn.Module, batch: Any, loss: Callable[[Any], Tensor]) -> None:
        self.model, self.batch, self.loss = copy_model(model), batch, loss
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.device = next(self.model.parameters()).device
        with generators_kept(list(self.model.parameters())):
            seed_random_numbers(SEED)
            self.random = random_state(self.device)

    def run(self, steps: int, watcher: Watcher | None = None) -> float:
        """Train; return the processor time, or on a GPU the wall time, in seconds."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        with generators_kept(list(self.model.parameters())):
            restore_random_state(self.random, self.device)
            begin = clock()
            for _ in range(steps):
                self.optimizer.zero_grad()
                self.loss(_call(self.model, self.batch)).backward()
                if watcher is not None:
                    watcher.step()
                self.optimizer.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = clock() - begin
            self.random = random_state(self.device)
        return seconds

    def same_as(self, other: _Training) -> bool:
        """Whether weights, buffers, optimizer state and random numbers are bitwise equal."""
        mine, others = ([*tensors_in(each.model.state_dict()), *tensors_in(each._states())] for each in (self, other))
        alike = all(self.random[name] == other.random[name] for name in ("python", "numpy"))
        return alike and len(mine) == len(others) and all(map(torch.equal, mine, others))

    def _states(self) -> list[Any]:
        return [*self.optimizer.state_dict()["state"].values(), self.random]


class _Copies(FollowedWeights):
    """Looks on at what a model itself does with weights and data, outside of the layers.

    Parameters
    ----------
    model : nn.Module
        The model.
    copies : mapping of Parameter to (str, Tensor)
        For each weight its name and a copy of it.
    samples : int
        Samples in the batch.
    on_use : callable
        Takes the names, what a function returned, and a function that does the same with the copies; returns what shall stand in.
    followed : iterable of Parameter
        As for `FollowedWeights`.
    """

    def __init__(
        self,
        model: nn.Module,
        copies: Mapping[nn.Parameter, tuple[str, Tensor]],
        samples: int,
        on_use: Callable[[Sequence[str], Any, Callable[[], Any]], Any],
        followed: Iterable[nn.Parameter],
    ) -> None:
        super().__init__(model, copies, samples, followed=followed)
        self._remember(self._fresh, (copied for _, copied in copies.values()))  # layers may be run with them
        self.copies, self.on_use = copies, on_use
        self._values: dict[Made, Tensor] = {}

    def carry_out(self, call: Call, weights: Sequence[nn.Parameter]) -> Any:
        """Carry out the call, and let the samples of a group meet the copies."""
        given = self.taken(call)
        # What enters a layer that is followed is no state.
        product = call.func in (*LINEAR, *MATMUL) and not all(id(weight) in self.followed for weight in weights)
        rows = [t for t in given if self.is_data(t) or (product and self.may_be_rows(t))]
        if not rows:
            result, call = self.drawn(call)
            self.note(call, result)
            return result
        device = weights[0].device
        before = random_state(device)
        changed = call.args[0] if call.in_place else None
        if changed is not None:  # twice of the same
            call = replace(call, args=(changed.clone(), *call.args[1:]))
            plain = replace(call, args=(call.args[0].clone(), *call.args[1:]))
        else:
            plain = call
        result = plain.made()

        def again() -> Any:
            after = random_state(device)
            restore_random_state(before, device)
            if any([_follow(self.copies[weight][1], weight) for weight in weights]):
                self._values.clear()
            values = self._values
            values.update({self.weights[weight]: copied for weight, (_, copied) in self.copies.items()})
            made = {id(t): self.made[id(t)] for t in given if id(t) in self.made}
            other = call.made({key: each.computed(values, Tensor.clone) for key, each in made.items()})
            restore_random_state(after, device)
            return other

        result = self.on_use([self.copies[weight][0] for weight in weights], result, again)
        return result if changed is None else changed.copy_(result)


def _follow(copied: Tensor, weight: Tensor) -> bool:
    """Change a copy as the model has changed the weight in place, as for a largest norm; whether it had."""
    same = torch.equal(copied, weight)
    if not same:
        copied.detach().copy_(weight.detach())
    return not same


def _outputs(
    model: nn.Module,
    batch: Any,
    samples: int,
    watched: Sequence[str],
    followed: Collection[str],
    shared: Sequence[Tensor],
    seed: int,
) -> dict[str, list[Tensor]]:
    """What each layer returns, call by call, and what is done with each weight outside of its layer."""
    twin = copy_model(model).eval()
    made: dict[str, list[Tensor]] = {}
    for name, module in twin.named_modules():
        if rule_for(module) is not None and name not in followed:
            seen = made.setdefault(name, [])
            module.register_forward_hook(lambda _, __, output, seen=seen: seen.extend(map(_copied, tensors_in(output))))

    def on_use(names: Sequence[str], result: Any, _: Any) -> Any:
        for name in names:
            made.setdefault(name, []).extend(map(_copied, tensors_in(result)))
        return result

    weights = {twin.get_parameter(name): name for name in watched}
    copies = {weight: (name, weight) for weight, name in weights.items()}
    mode = _Copies(twin, copies, samples, on_use, _weights_of(twin, followed))
    mode.receive(batch, shared)
    layers_noted(weights_by_layer(twin), lambda: mode.within)
    with generators_kept(list(model.parameters())), torch.enable_grad(), without_short_cuts(), mode:
        seed_random_numbers(seed)
        _call(twin, batch)
    return made


def _weights_of(model: nn.Module, layers: Collection[str]) -> list[nn.Parameter]:
    return [parameter for name in layers for parameter in model.get_submodule(name).parameters()]


def _another_order(samples: int) -> Tensor:
    """Another order of the samples."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(SEED))
    return order.roll(1) if torch.equal(order, torch.arange(samples)) else order


def _owners(
    model: nn.Module,
    batch: Any,
    moved: Any,
    order: Tensor,
    rows: Mapping[str, Tensor],
    watched: Sequence[str],
    shared: Sequence[Tensor],
) -> tuple[dict[str, list[Tensor | None]], set[str]]:
    """Sample of each entry of each output of each layer, call by call, to be broadcast; None where that cannot be told.

    By the layers' names, and, of what is done with a weight outside of its layer, by the weight's.  And the layers that are given what
    all samples share, such as a table of positions: a call of theirs returns the same, in the same order, whatever the samples.
    """
    followed: set[str] = set()

    def outputs(given: Any, seed: int) -> dict[str, list[Tensor]]:
        return _outputs(model, given, len(order), watched, followed, shared, seed)

    plain, other = outputs(batch, SEED), outputs(moved, SEED)
    layers = {name for name, module in model.named_modules() if rule_for(module) is not None}
    common = layers & plain.keys() & other.keys() if len(order) > 1 else ()
    followed = {name for name in common if any(map(torch.equal, plain[name], other[name]))}
    if followed:  # what they return is seen where it meets data
        plain, other = outputs(batch, SEED), outputs(moved, SEED)
    again = outputs(batch, SEED + 1)
    found: dict[str, list[Tensor | None]] = {}
    for name, of_module in plain.items():
        measured = [
            _owner(*each, order) for each in zip(of_module, again.get(name, ()), other.get(name, ()), strict=False)
        ]
        given = next((of for each, of in rows.items() if name in (each, each.rpartition(".")[0])), None)
        found[name] = [
            _owner_of_rows(output, given) if owner is None and given is not None else owner
            for output, owner in zip(of_module, measured, strict=False)
        ]
    return found, followed


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _in_order(batch: Any, order: Tensor, batch_dim: int | None, shared: Collection[int]) -> tuple[Any, list[Tensor]]:
    """The batch with its samples in another order, and what in it all samples share: of floating-point inputs the numbers are given."""
    inputs = [tensor for tensor in tensors_in(batch) if can_be_nan(tensor)]
    same = [inputs[number] for number in shared if number < len(inputs)]
    moved: dict[int, Tensor | np.ndarray] = {}
    packing = of_packing(batch)
    for tensor in tensors_in(batch):
        dims = dims_of_size(tensor.shape, len(order), batch_dim) or dims_of_size(tensor.shape, len(order), None)
        if dims and id(tensor) not in packing and all(tensor is not each for each in same):
            moved[id(tensor)] = tensor.index_select(dims[0], order.to(tensor.device))
    return replaced(batch, moved), same


def _owner(plain: Tensor, again: Tensor, moved: Tensor, order: Tensor) -> Tensor | None:
    """The one way in which a tensor holds the samples that follows their order; what is drawn at random has to have one that fits."""
    samples, ways = len(order), []
    for dim, size in enumerate(plain.shape):
        if size and size % samples == 0:
            each = size // samples
            # As many rows of each sample, one sample after the other; or the samples one after the other, as often.
            places = torch.arange(size).view(samples, each), torch.arange(size).view(each, samples).T
            ways += [(dim, place) for place in places[: 1 if each == 1 else 2]]
    if ways and torch.equal(plain, again):
        near = MOVED * float(plain.abs().max())
        ways = [
            (dim, place)
            for dim, place in ways
            if plain.shape == moved.shape and (_exchanged(plain, dim, place, order) - moved).abs().max() <= near
        ]
    if len(ways) != 1:  # drawn at random, or the same for all, as of a layer that begins with zeros
        ways = [(dim, place) for dim, place in ways if place.shape[1] == 1]
    if len(ways) != 1:
        return None
    dim, place = ways[0]
    owner = torch.empty(plain.shape[dim], dtype=torch.int64)
    owner[place] = torch.arange(samples).unsqueeze(1).expand(place.shape)
    return owner.reshape([len(owner) if axis == dim else 1 for axis in range(plain.ndim)])


def _exchanged(tensor: Tensor, dim: int, place: Tensor, order: Tensor) -> Tensor:
    """A tensor whose samples, which lie at these places along a dimension, have come into another order."""
    index = torch.empty(place.numel(), dtype=torch.int64)
    index[place] = place[order]
    return tensor.index_select(dim, index.to(tensor.device))


def _owner_of_rows(output: Tensor, rows: Tensor) -> Tensor | None:
    """Whose the rows of a layer's output are, or its items, where the user says so."""
    if len(rows) == math.prod(output.shape[:-1]):
        return rows.reshape(*output.shape[:-1], 1)
    return rows.reshape(-1, *[1] * (output.ndim - 1)) if len(rows) == len(output) else None


def _shares_by_copies(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor],
    member: np.ndarray,
    owners: Mapping[str, Sequence[Tensor | None]],
    watched: Sequence[str],
    followed: Collection[str],
    shared: Sequence[Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """dL/dW_c, where the samples of a group use their own copy W_c of each weight."""
    twin = copy_model(model)
    weights = {name: twin.get_parameter(name) for name in watched}
    copies = {name: each.detach().clone().requires_grad_() for name, each in weights.items() if each.requires_grad}
    names = {id(weights[name]): name for name in copies}
    reasons: dict[str, str] = {}
    unknown = "its outputs do not show where they have the samples, in the batch's order"
    inside = torch.from_numpy(member)
    uses = _Uses({name: owners.get(name, ()) for name in copies})

    def on_use(names: Sequence[str], result: Any, again: Callable[[], Any]) -> Any:
        known = [name for name in names if name in uses.owners]
        reasons.update(dict.fromkeys(set(names) - set(known), unknown))
        for name in known[1:]:  # all have the same
            next(uses.following(name))
        return _mixed(result, again(), inside, uses.following(known[0])) if known else result

    of_weights = {weights[name]: (name, copied) for name, copied in copies.items()}
    mode = _Copies(twin, of_weights, len(member), on_use, _weights_of(twin, followed))
    mode.receive(batch, shared)
    layers_noted(weights_by_layer(twin), lambda: mode.within)
    for name, module in list(twin.named_modules()):
        rule = rule_for(module)
        if rule is None:
            continue
        parameters = dict(module.named_parameters(remove_duplicate=False))
        held = {key: names.get(id(parameters[key])) for key in rule.parameters(module) if key in parameters}
        own = {key: copies[each] for key, each in held.items() if each is not None}
        if not own or not owners.get(name):  # a layer that is not called by itself, as within an attention
            continue
        known = [owner for owner in owners[name] if owner is not None]
        if len(known) == len(owners[name]):
            _run_twice(module, own, member, known, uses)
        else:
            reasons |= {each: unknown for each in held.values() if each is not None}
    with generators_kept(list(twin.parameters())), mode:
        seed_random_numbers(SEED)
        value = loss(_call(twin, batch))
        compared = [name for name in copies if name not in reasons]
        if not compared:
            return {}, reasons
        # Activation checkpointing makes calls again, which torch.autograd.grad keeps the mode from seeing.
        inputs = tuple(copies[name] for name in compared)
        gradients = _engine_run_backward(
            (value,), (torch.ones_like(value),), False, False, inputs, allow_unreachable=True, accumulate_grad=False
        )
    shares = {
        name: (gradient.to_dense() if gradient.is_sparse else gradient).reshape(gradient.shape[0], -1)
        for name, gradient in zip(compared, gradients, strict=True)
        if gradient is not None
    }
    return shares, reasons


class _Uses:
    """Sample of each entry of what is done with a weight outside of its layer, use by use.

    Parameters
    ----------
    owners : mapping of str to sequence of Tensor or None
        By the weight's name, of which those are left out whose uses are not all known.
    """

    def __init__(self, owners: Mapping[str, Sequence[Tensor | None]]) -> None:
        self.owners = {name: [each for each in of if each is not None] for name, of in owners.items() if of}
        self.owners = {name: of for name, of in self.owners.items() if len(of) == len(owners[name])}
        self.counts = dict.fromkeys(self.owners, 0)

    def following(self, name: str) -> Iterator[Tensor]:
        """The next one's, and of what else it returns; with activation checkpointing calls are made again."""
        of = self.owners[name]
        while True:
            self.counts[name] += 1
            yield of[(self.counts[name] - 1) % len(of)]


def _run_twice(
    module: nn.Module, own: dict[str, Tensor], member: np.ndarray, owners: Sequence[Tensor], uses: _Uses
) -> None:
    """Let the samples of a group, which have these entries of one output after the other, go through a copy of the weights."""
    inside = torch.from_numpy(member)
    forward = type(module).forward
    depth, left = [0], itertools.cycle(owners)  # with activation checkpointing the calls are made again

    def twice(*args: Any, **kwargs: Any) -> Any:
        if depth[0]:
            return forward(module, *args, **kwargs)
        depth[0] += 1
        try:
            device = next(iter(own.values())).device
            for key, copied in own.items():
                _follow(copied, module.get_parameter(key))
            before, counts = random_state(device), dict(uses.counts)
            output = forward(module, *args, **kwargs)
            after = random_state(device)
            restore_random_state(before, device)  # the same dropout in both
            uses.counts = counts
            other = functional_call(module, own, args, kwargs)
            restore_random_state(after, device)
        finally:
            depth[0] -= 1
        return _mixed(output, other, inside, left)

    module.forward = twice


def _mixed(output: Any, other: Any, inside: Tensor, owners: Iterator[Tensor]) -> Any:
    """Outputs of the group's samples from the copy, the others' from the layer."""
    if isinstance(output, Tensor):
        return torch.where(inside[next(owners)].to(output.device), other, output)
    if isinstance(output, list | tuple):
        return type(output)(_mixed(a, b, inside, owners) for a, b in zip(output, other, strict=True))
    return output
