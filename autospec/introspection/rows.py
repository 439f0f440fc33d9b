"""Which rows of a layer's input belong to which sample: established by a probe, never assumed.

A copy of the model in evaluation mode runs a few times with some samples made NaN, for every way in which its inputs may
hold the samples; what holds for all batches of the same shapes is kept apart from what goes by the numbers in them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence

from .arguments import as_array, can_be_nan, content_of, instances_in, of_packing, replaced, tensors_in, whole_numbers
from .copies import copy_model, kept_apart, moves_on, unchanged, without_short_cuts
from .errors import SeveralReadings, UntracedRows, WatchError
from .generators import generators_kept
from .hooks import Hook
from .layers import FunctionalUses, LayerCall, SpreadCall, layers_noted, weights_by_layer
from .layers.call import qualified_name
from .lookups import (
    Along,
    Indices,
    Place,
    dims_of_size,
    likely_readings,
    lookups_in,
    lookups_marked,
    origins_of,
    possible_readings,
)
from .probe import OwnUses, Probe, Reading, code_words, finite, inputs_in, sequences_in, weights_at
from .spectra import irregular

MAX_HYPOTHESES = 64
MAX_WAYS = 12
# From so many samples on one pass shows whether the model shuffles them.
MANY_SAMPLES = 12
# As many others at most a sample is mixed with: one by the order, and one by the order the other way round.
MIXED_WITH = 2
# So many samples are followed by themselves, and such a part of the rows that share a statistic has to show it.
FOLLOWED, SHOWN = 5, 0.4


@dataclass(frozen=True, eq=False)
class RowMap:
    """The result of a probe.

    Attributes
    ----------
    samples : dict of (str, str) to list of ndarray
        For each watched (module, parameter): at its first, second, ... use in one forward pass, the sample of each
        entry of its batch (of each row, for a linear layer).
    passes : int
        Forward passes that the probe took.
    reading : Reading
        Where the model's inputs hold the samples.
    by_content : tuple of int
        Which of `whole_numbers` hold only for what they contain now: a model that sorts by length, or that has a layer for
        each scanner, gives other rows to a sample whose length or scanner is another.
    without_hooks : tuple of str
        Modules with hooks that the probe's copy did not have.
    certain : bool
        Whether no other reading of the inputs is possible.
    shapes : dict of (str, str) to list of tuple of int
        Shape of what each use in ``samples`` received.
    uses : OwnUses
        Weights that the model uses itself, outside of their layer or without one.
    """

    samples: dict[Place, list[np.ndarray]]
    passes: int = 0
    reading: Reading = field(default_factory=lambda: Reading((), {}))
    by_content: tuple[int, ...] = ()
    without_hooks: tuple[str, ...] = ()
    certain: bool = False
    shapes: Mapping[Place, list[tuple[int, ...]]] = field(default_factory=dict)
    uses: OwnUses = field(default_factory=OwnUses)

    @property
    def shared(self) -> dict[Place, Along]:
        """Lookups that all samples share, such as a table of positions."""
        return {place: along for place, along in self.reading.lookups.items() if along.shared}


@dataclass(frozen=True)
class _Way:
    """A way to trace rows.

    Attributes
    ----------
    followed, states
        As for `OwnUses`.
    shared : int or None
        Number of an input that is taken to be of all samples, though it has a dimension of their number.
    """

    followed: frozenset[Place] = frozenset()
    states: bool = True
    shared: int | None = None


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What came of one way to trace rows.

    Attributes
    ----------
    found : RowMap or None
        The result.
    refusal : WatchError or None
        Why there is none.
    shared : frozenset of (str, str)
        Lookups of watched tables that all samples may share.
    constant : frozenset of (str, str)
        Matrices of layers that receive rows none of which a sample reaches, and whose samples were not found; or, where all were found,
        those of which these rows are not the same for all samples.
    way : _Way
        What was tried.
    uses : OwnUses
        Weights that the model uses itself.
    inputs : tuple of int
        Inputs that may be of all samples, though they have a dimension of their number.
    """

    found: RowMap | None
    refusal: WatchError | None
    shared: frozenset[Place]
    constant: frozenset[Place]
    way: _Way
    uses: OwnUses
    inputs: Sequence[int]


def map_rows(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    samples: int,
    watched: Collection[Place],
    batch_dim: int | None = None,
    all_hooks: bool = False,
    known: Reading | None = None,
) -> RowMap:
    """Find which rows of every watched layer's input belong to which sample.

    Parameters
    ----------
    model : nn.Module
        The model; it is copied, and neither it nor any random number generator changes.
    args, kwargs
        What the model's forward pass is about to be called with.
    samples : int
        Number of samples, which is the number of labels.
    watched : collection of (str, str)
        Module and parameter names of the matrices that are watched.
    batch_dim : int, optional
        The dimension of the inputs that indexes samples, where several have that size.
    all_hooks : bool
        Whether the copy has all hooks, also those that act on what is outside of the model.
    known : Reading, optional
        How a batch of another size was read: it decides where more than one reading is possible.

    Returns
    -------
    RowMap

    Raises
    ------
    WatchError
        If no input has a dimension of that size, or the rows cannot be told apart, or more than one reading
        of the inputs is possible.
    """
    own = {id(t): _copied(t) for t in tensors_in((args, kwargs)) if t.layout == torch.strided}
    args, kwargs = replaced(args, own), replaced(kwargs, own)  # the model may change its input in place

    def attempt(way: _Way, watched: Collection[Place] = watched) -> _Attempt:
        return _attempt(model, args, kwargs, samples, watched, batch_dim, all_hooks, known, way)

    def another(way: _Way, watched: Collection[Place] = watched) -> _Attempt | None:
        try:
            return attempt(way, watched)
        except SeveralReadings:
            raise
        except WatchError:
            return None

    first = attempt(_Way())
    if first.found is not None:
        # A constant that is taken for a state, or for rows of samples, may decide what is read as samples.
        ways = [_Way(states=False)] if first.uses.took_states else []
        if first.constant and batch_dim is None:
            ways += [_Way(first.constant, states) for states in (True, False)]
        for way in ways:
            again = another(way)
            _refuse_other_reading(first.found, None if again is None else again.found, known)
        return first.found
    tried, waiting = {_Way()}, [first]
    while waiting and len(tried) < MAX_WAYS:
        for way in _ways_after(waiting.pop(0)):
            if way in tried:
                continue
            tried.add(way)
            again = another(way)
            if again is not None and again.found is not None:
                return again.found
            waiting += [] if again is None else [again]
    rest = set(watched) - first.shared
    if first.shared and rest:
        again = another(_Way(), rest)
        if again is not None and again.found is not None:
            raise _cannot_be_spread(min(first.shared))
    assert first.refusal is not None
    raise first.refusal


def _ways_after(attempt: _Attempt) -> Iterator[_Way]:
    """Ways to trace rows after one that did not do: what samples share is followed until it meets data.

    A width that is the number of samples by chance makes a state of what is none.
    """
    before, shared = attempt.way.followed, attempt.way.shared
    for followed in (before | attempt.shared, before | attempt.shared | attempt.constant):
        for states in (True, False) if followed or attempt.uses.places else (True,):
            yield _Way(followed, states, shared)
    for number in attempt.inputs if shared is None else ():
        yield _Way(before, attempt.way.states, number)


def _refuse_other_reading(found: RowMap, other: RowMap | None, known: Reading | None) -> None:
    """Refuse what is read in one way where it may be read in another, too."""
    if other is not None and other.reading.dims != found.reading.dims and known != found.reading:
        raise _several_readings([found.reading, other.reading])


def _attempt(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    samples: int,
    watched: Collection[Place],
    batch_dim: int | None,
    all_hooks: bool,
    known: Reading | None,
    way: _Way,
) -> _Attempt:
    """Trace rows in one way; as for `map_rows`."""
    inputs = inputs_in(args, kwargs)
    choices = _choices(args, kwargs, inputs, samples, batch_dim)
    if way.shared is not None:
        choices[way.shared] = (None,)
    doubtful = [number for number, dims in enumerate(choices) if None in dims and len(dims) > 1 < len(choices)]
    shared_inputs = tuple(number for number, dims in enumerate(choices) if dims == (None,))
    words = code_words(samples)
    accepted: list[tuple[Probe, dict[Place, list[np.ndarray]]]] = []
    unreached: set[Place] = set()
    refusal: WatchError | None = None
    with (
        generators_kept(inputs),
        torch.enable_grad(),
        without_short_cuts(),
        kept_apart(model, evaluated=True) as copied,
    ):
        twin, lookups, uses, all_hooks = _running_twin(
            model, copied, args, kwargs, [inputs[i] for i in shared_inputs], samples, watched, all_hooks, way
        )
        if not way.followed - lookups.keys() <= uses.places:
            raise UntracedRows("What a layer makes of rows of no sample meets no data.")
        as_given = {place for place, lookup in lookups.items() if lookup.given}
        origins = origins_of(twin, args, kwargs, samples, [place for place in lookups if place not in as_given])
        for place, calls in origins.items():
            along = set.intersection(*(call.dims(samples, batch_dim) for call in calls))
            lookups[place] = replace(lookups[place], dims=tuple(sorted(along)))
        # With as many positions as samples an index of either may be one of positions.
        sides = [*(len(dims) for dims in choices), *(lookup.shape.count(samples) for lookup in lookups.values())]
        by_size = batch_dim is not None or max(sides, default=0) < 2

        def likely(lookup: Indices) -> tuple[Along, ...]:
            sure = by_size or lookup.given or len(lookup.shape) > 1
            return (likely_readings if sure else possible_readings)(lookup, samples, batch_dim)

        def possible(lookup: Indices) -> tuple[Along, ...]:
            return possible_readings(lookup, samples, batch_dim)

        options = {place: likely(lookup) for place, lookup in lookups.items()}
        if all(dims == (None,) for dims in choices) and not any(
            along.along_samples for each in options.values() for along in each
        ):
            raise _no_samples(args, kwargs, inputs, samples, batch_dim)
        _fix_statistics(twin)
        unmarked = {
            place
            for place, lookup in lookups.items()
            if place in way.followed or (place not in watched and samples not in lookup.shape and not lookup.dims)
        }
        for round_ in (likely, possible):
            # Lookups of one kind and shape are read in one way.
            kinds = {lookup: round_(lookup) for place, lookup in lookups.items() if place not in way.followed}
            for dims, alongs in _readings(choices, lookups, kinds, unmarked):
                if batch_dim is not None and accepted:
                    break
                reading = Reading(dims, alongs, shared_inputs)
                probe = Probe(twin, args, kwargs, inputs, reading, watched, uses, origins, as_given)
                try:
                    try:
                        found = probe.rows(words)
                    except UntracedRows:
                        probe = replace(probe, plain_attention=True, shapes={}, unreached={}, constant={}, shared=set())
                        found = probe.rows(words)
                    _same_result(model, probe, samples)
                    accepted.append((probe, found))
                except WatchError as error:
                    spread = [place for place, along in reading.lookups.items() if along.shared and along.marked]
                    failed = error.__cause__ is not None and bool(spread)
                    refusal = refusal or (_cannot_be_spread(spread[0]) if failed else error)
                    unreached |= probe.shared
            if accepted:
                break
    shared = frozenset(place for place, of in options.items() if place in watched and any(a.shared for a in of))
    not_layers = lookups.keys() | (uses.places - way.followed)
    if not accepted:
        if refusal is None or isinstance(refusal, UntracedRows):
            ways = "batch_dim= or rows=" if batch_dim is None else "rows="
            refusal = WatchError(
                f"{refusal or ''} Say where the samples are with {ways}, or leave the layer out with layers=."
            )
        return _Attempt(None, refusal, shared, frozenset(unreached - not_layers), way, uses, doubtful)
    if any(not _same(found, accepted[0][1]) for _, found in accepted):
        accepted = [each for each in accepted if each[0].reading == known] or accepted
    if any(not _same(found, accepted[0][1]) for _, found in accepted):
        raise _several_readings([probe.reading for probe, _ in accepted])
    probe, found = accepted[0]
    received = dict(probe.shapes)
    with (
        generators_kept(inputs),
        torch.enable_grad(),
        without_short_cuts(),
        kept_apart(model, evaluated=True) as copied,
    ):
        copied.update(probe.twin.modules())
        by_content = _by_content(probe, words, found)
        _refuse_what_moves_on(probe, words, found)
        # With several processes the model may talk to the others, who have no pass to spare at the same time.
        if model.training and samples > 1 and not several_processes():
            _refuse_mixing_in_training(model, probe, samples, found)
    without_hooks = () if all_hooks else tuple(_modules_with_other_hooks(model))
    certain = len(accepted) == 1
    row_map = RowMap(found, len(words), probe.reading, by_content, without_hooks, certain, received, uses)
    constant = frozenset(place for place, same in probe.constant.items() if not same)
    return _Attempt(row_map, None, shared, constant - not_layers, way, uses, doubtful)


def _choices(
    args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor], samples: int, batch_dim: int | None
) -> list[tuple[int | None, ...]]:
    """For each floating-point input the dimensions that may index samples; None where it may hold none."""
    packed = {id(each.data) for each in instances_in((args, kwargs), PackedSequence) if sequences_in(each) == samples}
    choices: list[tuple[int | None, ...]] = [
        (0,) if id(t) in packed else _candidate_dims(t, samples, batch_dim) for t in inputs
    ]
    # An input may have a dimension of that size by chance, such as one position encoding a time point.
    if batch_dim is None and any(len(dims) > 1 for dims in choices):
        choices = [dims if dims == (None,) else (*dims, None) for dims in choices]
    if batch_dim is not None:
        for position in [i for i, dims in enumerate(choices) if dims != (None,)][1:]:
            choices[position] = (*choices[position], None)
    return choices


def _readings(
    choices: Sequence[Sequence[int | None]],
    lookups: Mapping[Place, Indices],
    kinds: Mapping[Indices, Sequence[Along]],
    unmarked: Collection[Place],
) -> Iterator[tuple[tuple[int | None, ...], dict[Place, Along]]]:
    """Ways to read inputs and lookups in which something has samples: dimensions, and how lookups hold them.

    Parameters
    ----------
    choices : sequence of sequence of int or None
        As of `_choices`.
    lookups : mapping of (str, str) to Indices
        What is looked up in each table.
    kinds : mapping of Indices to sequence of Along
        How lookups of each kind may have samples.
    unmarked : collection of (str, str)
        Lookups through which samples are not followed.
    """
    if math.prod(map(len, choices)) * math.prod(map(len, kinds.values())) > MAX_HYPOTHESES:
        raise WatchError("too many dimensions of the inputs could index samples: say which with batch_dim=.")
    for dims, chosen in itertools.product(itertools.product(*choices), itertools.product(*kinds.values())):
        of_kind = dict(zip(kinds, chosen, strict=True))
        alongs = {
            place: Along(0, marked=False) if place in unmarked else of_kind[lookup] for place, lookup in lookups.items()
        }
        if any(dim is not None for dim in dims) or any(along.along_samples for along in alongs.values()):
            yield dims, alongs


def _no_samples(
    args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor], samples: int, batch_dim: int | None
) -> WatchError:
    every = [*(t for t in tensors_in((args, kwargs)) if not can_be_nan(t)), *inputs]
    notes = ["" if t.layout == torch.strided else ", not dense" for t in every]
    shapes = ", ".join(f"{tuple(t.shape)}{note}" for t, note in zip(every, notes, strict=True)) or "no tensor"
    where = "of size" if batch_dim is None else f"{batch_dim} of size"
    if any(dims_of_size(t.shape, samples, batch_dim) for t in every if t.layout == torch.strided):
        return WatchError(
            f"the model's inputs hold the {samples} samples in whole numbers alone (inputs: {shapes}), which are traced through "
            "nn.Embedding alone: give the model dense floating-point input, or rows= for every watched layer."
        )
    return WatchError(
        f"groups has {samples} labels, but no input of the model has a dimension {where} {samples} "
        f"(inputs: {shapes}): give one label for each sample of the batch, in the batch's order, with set_groups() where "
        "batches differ. Whole numbers are "
        "traced through nn.Embedding alone, and nothing in sparse tensors; elsewhere give the model dense floating-point input, "
        "or rows=."
    )


def _several_readings(readings: Sequence[Reading]) -> SeveralReadings:
    return SeveralReadings(
        "the samples could lie along more than one dimension of the model's inputs "
        f"({' or '.join(str(each.batch_dims) for each in readings)}): say which with batch_dim=."
    )


def _copied(tensor: Tensor) -> Tensor:
    """A tensor of its own with the same numbers, with a gradient where that has one."""
    copied = tensor.detach().clone()
    if not tensor.requires_grad:
        return copied
    return copied.requires_grad_() if tensor.is_leaf else copied.requires_grad_().clone()


def _twin(model: nn.Module, all_hooks: bool = False) -> nn.Module:
    """A copy in evaluation mode, all of whose weights are finite: a diverged model's rows can be traced all the same.

    Hooks stay behind, unless they are asked for or are the model's own: they act on what is outside, where a feature extractor's
    list would receive the copy's activations.
    """
    own = set(model.modules())
    try:
        twin = copy_model(model, lambda hook: all_hooks or _is_part_of(own, hook))
    except Exception as error:
        raise WatchError(
            f"the model cannot be copied to find which rows belong to which sample ({error}): give rows=."
        ) from error
    twin.eval()
    with torch.no_grad():
        for tensor in itertools.chain(twin.parameters(), twin.buffers()):
            if tensor.layout == torch.strided and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                tensor.copy_(finite(tensor))
    return twin


def _running_twin(
    model: nn.Module,
    copied: set[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: Sequence[Tensor],
    samples: int,
    watched: Collection[Place],
    all_hooks: bool,
    way: _Way,
) -> tuple[nn.Module, dict[Place, Indices], OwnUses, bool]:
    """A copy that runs, what it looks up in tables, which weights it uses itself, and whether it has all hooks.

    Gradients are enabled, so that what a model does without them can be told apart, but the copy's weights need none, which
    spares the graph.  If that fails, as where a model asks for a gradient in its forward pass, or lacks a hook that brings its
    input into form, it is tried as it trains.
    """
    for hooks, learns in dict.fromkeys([(all_hooks, False), (all_hooks, True), (True, True)]):
        twin = _twin(model, hooks)
        copied.update(twin.modules())
        if not learns:
            for parameter in twin.parameters():
                if parameter.is_leaf:  # those of a copied TorchScript part are none
                    parameter.requires_grad_(False)
        try:
            uses = _Uses(twin, samples, watched, way)
            uses.mode.share(shared)
            passed = functools.partial(uses.find, args, kwargs)
            lookups = lookups_in(twin, args, kwargs, passed, uses.mode.is_constant)
            spread = frozenset(place for place, elementwise in uses.found.items() if elementwise)
            took_states = uses.mode.took_states
            return twin, lookups, OwnUses(frozenset(uses.found), spread, way.followed, way.states, took_states), hooks
        except WatchError:
            raise
        except Exception:
            if hooks and learns:
                raise
    raise AssertionError("unreachable")


def _fix_statistics(twin: nn.Module) -> None:
    """Have normalisation of the batch that keeps no running statistics use fixed ones in evaluation mode, as other does."""
    some = next(twin.parameters())
    for module in twin.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None and module.running_var is None:
            like = some if module.weight is None else module.weight
            module.running_mean, module.running_var = (like.new_full((module.num_features,), v) for v in (0.0, 1.0))


def _is_part_of(modules: Collection[nn.Module], hook: Callable) -> bool:
    """Whether a hook is torch's, as for weight normalisation or pruning, or a method of one of a model's modules.

    Or the watcher's, which does nothing in a copy, but shows torch.compile that there are hooks.
    """
    of = getattr(hook, "__self__", None)
    torchs = type(hook).__module__.startswith("torch.")
    return torchs or isinstance(hook, Hook) or (isinstance(of, nn.Module) and of in modules)


def _modules_with_other_hooks(model: nn.Module) -> Iterator[str]:
    own = set(model.modules())
    for name, module in model.named_modules():
        hooks = itertools.chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        if any(not _is_part_of(own, hook) for hook in hooks):
            yield name


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _moved(numbers: Tensor | np.ndarray, samples: int) -> Tensor | np.ndarray:
    """Numbers given to the next sample, or the next place; a single one is counted up."""
    shape = tuple(numbers.shape)
    dim = shape.index(samples if samples in shape else max(shape)) if shape else 0
    if isinstance(numbers, np.ndarray):
        return np.roll(numbers, 1, dim)
    if numbers.numel() == 1:
        return ~numbers if numbers.dtype == torch.bool else numbers + 1
    return numbers.roll(1, dim)


def _lessened(numbers: Tensor | np.ndarray, samples: int) -> Tensor | np.ndarray:
    """Numbers as another batch might hold them: one sample with less that counts, or all as short as the shortest."""
    array = as_array(numbers).copy()
    if array.dtype.kind not in "biu" or samples not in array.shape:
        return numbers
    along = np.moveaxis(array, array.shape.index(samples), 0)
    if along.ndim == 1:
        along[:] = along.min()
    else:
        of_one = along[int(np.argmax((along != 0).reshape(samples, -1).sum(1)))]
        there = np.flatnonzero(of_one)
        of_one.flat[there[(len(there) + 1) // 2 :]] = 0
    return array if isinstance(numbers, np.ndarray) else torch.from_numpy(array).to(numbers.device)


def _by_content(probe: Probe, words: np.ndarray, found: Mapping[Place, list[np.ndarray]]) -> tuple[int, ...]:
    """Which tensors of whole numbers the rows go by, as far as other numbers show.

    The probe is repeated with each sample's numbers given to the next sample, or, where samples are not counted, such as in an
    index of the rows that are no padding, each number to the next place; and with fewer that count, as in a mask, or shorter
    lengths.  Numbers that are the same for all samples show nothing in the first way, so they count among those
    that the rows go by.
    """
    samples = words.shape[1]
    numbers = whole_numbers(probe.args, probe.kwargs)
    if not numbers:
        return ()
    moved = [_moved(tensor, samples) for tensor in numbers]
    fewer = [_lessened(tensor, samples) for tensor in numbers]
    packing = of_packing((probe.args, probe.kwargs))  # moved on it would fit the sequences no more
    same = [
        content_of(as_array(before)) == content_of(as_array(after)) or id(before) in packing
        for before, after in zip(numbers, moved, strict=True)
    ]

    def lasting(chosen: Sequence[int]) -> bool:
        others = ({id(numbers[i]): each[i] for i in chosen} for each in ((moved, fewer) if samples > 1 else (fewer,)))
        try:
            return all(_same(found, probe.given(each, samples).rows(words)) for each in others)
        except WatchError:  # not all numbers fit each model
            return False

    told = [i for i, alike in enumerate(same) if not alike or samples == 1]
    # All of them at once, and, where rows move, each of them.
    go_by = [] if not told or lasting(told) else [i for i in told if len(told) == 1 or not lasting([i])] or told
    return tuple(sorted({*go_by, *(itertools.compress(range(len(numbers)), same) if samples > 1 else ())}))


def _same_result(model: nn.Module, probe: Probe, samples: int) -> None:
    """Refuse a reading in which spreading a shared lookup, or a table, changes what the model computes, draws at random, or learns.

    What is spread before it meets the samples' own values is computed once a sample, and the sum over samples that autograd
    then forms is another one, to rounding.
    """
    twin, args, kwargs, reading = probe.twin, probe.args, probe.kwargs, probe.reading
    shared = [place for place, along in reading.lookups.items() if along.shared]
    if not shared and not probe.uses.spread:
        return
    refusal = _cannot_be_spread(shared[0]) if shared else _would_round_otherwise(next(iter(probe.uses.spread)))
    placed = [*twin.parameters(), *tensors_in((args, kwargs))]

    def result(spread: bool) -> list[Tensor]:
        marked = lookups_marked(twin, reading.lookups if spread else {}, samples, None, {})
        tables = weights_at(twin, probe.uses.spread if spread else ())
        nothing = (lambda *_: None, lambda *_: None)
        mode = FunctionalUses(twin, tables, samples, probe.uses.states, *nothing, tables)
        mode.share(reading.shared_inputs(args, kwargs))
        with (
            generators_kept(placed),
            unchanged(twin),
            marked,
            mode if tables else nullcontext(),
            _learning_as(twin, model) as weights,
        ):
            made = list(tensors_in(twin(*args, **kwargs)))
            after = torch.get_rng_state()
            learned = [each for each in made if each.requires_grad and each.is_floating_point()]
            sizes = [
                (each * irregular(each.numel(), each.dtype).to(each.device).view_as(each)).sum() for each in learned
            ]
            gradients = torch.autograd.grad(sizes, weights, allow_unused=True) if sizes else ()
        dense = (each.to_dense() if each.is_sparse else each for each in gradients if each is not None)
        return [*(each.detach().nan_to_num() for each in (*made, *dense)), after]

    try:
        plain, spread = result(False), result(True)
        # Where not even the same pass gives the same again, as with some kernels of CUDA, nothing is changed by another order.
        if not _all_equal(plain, spread) and _all_equal(plain, result(False)):
            raise refusal
    except WatchError:
        raise
    except Exception as error:
        raise refusal from error


def _all_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether tensors are bitwise equal."""
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


@contextmanager
def _learning_as(twin: nn.Module, model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let a copy train as the model does; yields its weights that learn."""
    learn = {name: each.requires_grad for name, each in model.named_parameters()}
    before = [(each, each.requires_grad) for each in twin.parameters() if each.is_leaf]
    twin.train(model.training)
    for name, each in twin.named_parameters():
        if each.is_leaf:
            each.requires_grad_(learn.get(name, False))
    try:
        yield [each for each in twin.parameters() if each.requires_grad]
    finally:
        twin.eval()
        for each, needed in before:
            each.requires_grad_(needed)


def _cannot_be_spread(place: Place) -> WatchError:
    return WatchError(
        f"The table '{place[0]}' is shared by all samples in a way that cannot be followed to each of them: index it "
        "with torch.arange(positions) and add what it gives to the samples' values, or leave it out with layers=."
    )


def _would_round_otherwise(place: Place) -> WatchError:
    name = qualified_name(place)
    return WatchError(
        f"'{name}' meets data in a way in which its gradient would be rounded otherwise if each sample's part of it were kept: leave "
        f"it out with layers=['!{name}']."
    )


def _candidate_dims(tensor: Tensor, samples: int, batch_dim: int | None) -> tuple[int | None, ...]:
    return dims_of_size(tensor.shape, samples, batch_dim) or (None,)


def _refuse_what_moves_on(probe: Probe, words: np.ndarray, found: Mapping[Place, list[np.ndarray]]) -> None:
    """Refuse a model whose rows lie in another order at its next pass, by a generator or a counter that it holds.

    Each pass of the probe begins with these as they were before; so the copy makes one without that, and is traced again.
    """
    if not moves_on(probe.twin, lambda: probe.twin(*probe.args, **probe.kwargs)):
        return
    try:
        now = probe.rows(words)
    except WatchError:
        same = False
    else:
        # A use more or less is no other order where the rows of all lie in one.
        same = found.keys() == now.keys() and all(
            all(map(np.array_equal, calls, now[key])) if len(calls) == len(now[key]) else alike([*calls, *now[key]])
            for key, calls in found.items()
        )
    if not same:
        raise WatchError(
            "The model gives rows to samples in another order at each pass, by random numbers or a counter that it holds: do so "
            "before it is called, with labels in the new order; or leave the layers that receive such rows out with layers=."
        )


def _refuse_mixing_in_training(
    model: nn.Module, probe: Probe, samples: int, found: Mapping[Place, list[np.ndarray]]
) -> None:
    """Refuse a model whose training mode gives rows to other samples, so far as a few passes show it.

    Such a model shuffles or mixes its batch.  Statistics of the batch are no reason to refuse; torch's own normalisation is left
    in evaluation mode, so that what comes after it can be seen.
    """
    training = {name: module.training for name, module in model.named_modules()}
    for name, module in probe.twin.named_modules():
        module.training = training.get(name, True) and not isinstance(module, _BatchNorm)

    def others_reached(word: np.ndarray) -> Iterator[tuple[tuple[Place, int], np.ndarray, np.ndarray]]:
        """Uses of which rows of samples that are not marked turn NaN, the sample of each row, and which rows do."""
        seen = probe.reached(word)
        for key, of_calls in found.items():
            now = seen.get(key, ())
            # Of calls that are more or fewer than in evaluation mode only what is the same for all is known.
            calls = [of_calls[0]] * len(now) if len(now) != len(of_calls) and alike(of_calls) else of_calls
            if len(now) == len(calls):
                for call, (rows, marks) in enumerate(zip(calls, now, strict=True)):
                    nan = marks.reshape(-1)
                    if len(nan) == len(rows) and not nan.all() and nan[~word[rows]].any():
                        yield (key, call), rows, nan

    draw = np.random.default_rng(0)
    try:
        # A random order leaves half of the samples among themselves once in (samples over half of them) times.
        half = [draw.permutation(samples) < samples // 2 for _ in range(1 if samples >= MANY_SAMPLES else 3)]
        places = [key for word in half for (key, _), *_ in others_reached(word)]
        by_use: dict[tuple[Place, int], tuple[np.ndarray, list[tuple[int, np.ndarray]]]] = {}
        for sample in draw.permutation(samples)[:FOLLOWED] if places else ():
            for use, rows, nan in others_reached(np.arange(samples) == sample):
                by_use.setdefault(use, (rows, []))[1].append((int(sample), nan))
    except Exception:  # not every model can be trained on NaN
        return
    if places and not (by_use and all(_by_statistic(*each) for each in by_use.values())):
        name = places[0][0] or places[0][1]
        raise WatchError(
            f"In training mode rows of the input of '{name}' depend on other samples than in evaluation mode: the model shuffles or "
            "mixes its batch. Do so before it is called, with labels in the new order; or give rows=, or leave the layer out with "
            "layers=."
        )


def _by_statistic(rows: np.ndarray, reached: Sequence[tuple[int, np.ndarray]]) -> bool:
    """Whether samples reach others by a statistic, and not because rows are exchanged or mixed.

    All that share a statistic are reached, at the same positions, whichever sample it is; an exchange or a mixture reaches one or
    two others, or others at each position.  Rows that are replaced afterwards, by a mask say, show nothing.

    Parameters
    ----------
    rows : ndarray of int, shape (rows,)
        Sample of each row of one use.
    reached : sequence of (int, ndarray of bool)
        A sample, and which rows it reaches.
    """
    others = [np.unique(rows[nan & (rows != sample)]) for sample, nan in reached]
    if max(map(len, others)) <= MIXED_WITH:
        return False
    counts = np.bincount(rows)
    if (counts != counts[0]).any():
        return True
    order = np.argsort(rows, kind="stable")
    of_others = [nan[order].reshape(-1, counts[0])[some] for (_, nan), some in zip(reached, others, strict=True)]
    positions = np.array([each.any(0) for each in of_others])
    shown = np.mean([each[:, where].mean() for each, where in zip(of_others, positions, strict=True)])
    return bool(shown >= SHOWN and positions.all(0).sum() >= SHOWN * positions.any(0).sum())


class _Uses:
    """Finds which weights a model itself uses, and whether elementwise.

    Within a layer that has a rule its own weights may meet data, those of another, as a decoder's that is the encoder's transposed,
    may do so in what can be watched.
    """

    def __init__(self, twin: nn.Module, samples: int, watched: Collection[Place], way: _Way) -> None:
        self.twin = twin
        self.found: dict[Place, bool] = {}
        self._refused: dict[Place, str] = {}
        weights, followed = weights_at(twin, watched), weights_at(twin, way.followed)
        refuse = self._refused.setdefault
        self.mode = FunctionalUses(twin, weights, samples, way.states, self._on_call, refuse, followed, compare=True)

    def _on_call(self, place: Place, call: LayerCall, _: Tensor) -> None:
        self.found[place] = self.found.get(place, False) or isinstance(call, SpreadCall)

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make a forward pass; refuse what cannot be watched."""
        handles = layers_noted(weights_by_layer(self.twin), lambda: self.mode.within)
        self.mode.known_numbers = set(map(id, tensors_in((args, kwargs))))
        try:
            with unchanged(self.twin), self.mode:
                self.twin(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if self._refused:
            raise refused_uses(self._refused)


def refused_uses(refused: Mapping[Place, str]) -> WatchError:
    """What is said of weights that meet data in functions in which they cannot be watched."""
    names = {qualified_name(place): of for place, of in refused.items()}
    uses = ", and ".join(f"'{name}' in {of}()" for name, of in names.items())
    return WatchError(
        f"the model uses {uses}, where it cannot be watched in that form: outside of torch's layers products and convolutions of data "
        "with a weight can be, or with what is computed of weights and constants alone, and sums and products number by number. Call a "
        "layer instead, detach the weight where nothing is learned of it, or leave it out with "
        f"layers={[f'!{name}' for name in names]}."
    )


def alike(calls: Sequence[np.ndarray]) -> bool:
    """Whether the rows of several calls lie in one order."""
    return all(np.array_equal(call, calls[0]) for call in calls)


def _same(first: Mapping[Place, list[np.ndarray]], second: Mapping[Place, list[np.ndarray]]) -> bool:
    """Whether two readings give every row to the same sample, as in a batch of one."""
    return {key: len(calls) for key, calls in first.items()} == {
        key: len(calls) for key, calls in second.items()
    } and all(np.array_equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True))
