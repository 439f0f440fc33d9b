"""All ways to trace rows to samples, until one leaves no doubt.

A copy of the model in evaluation mode runs a few times with some samples made NaN, for every way in which its inputs may
hold the samples; what holds for all batches of the same shapes is kept apart from what goes by the numbers in them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..arguments import can_be_nan, instances_in, replaced, tensors_in
from ..copies import kept_apart, unchanged, without_short_cuts
from ..errors import FailedCopy, NoSamples, SeveralReadings, UntracedRows, WatchError
from ..generators import generators_kept
from ..hooks import several_processes
from ..layers import FunctionalUses
from ..layers.call import qualified_name
from ..spectra import irregular
from .lookups import (
    Along,
    Indices,
    Place,
    dims_of_size,
    likely_readings,
    lookups_marked,
    origins_of,
    possible_readings,
)
from .orders import by_content, refuse_mixing_in_training, refuse_what_moves_on, same_rows
from .probe import OwnUses, Probe, Reading, code_words, inputs_in, sequences_in, weights_at
from .twins import Way, fix_statistics, modules_with_other_hooks, running_twin

MAX_HYPOTHESES = 64
MAX_WAYS = 12


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


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What came of one way to trace rows.

    Attributes
    ----------
    way : Way
        The way.
    uses : OwnUses or None
        Weights that the model uses itself; None if the way was refused before that was known.
    tables : frozenset of (str, str)
        Watched tables whose lookups all samples may share.
    found : RowMap or None
        The result.
    constant : frozenset of (str, str)
        Of the matrices whose rows were found, those that receive constants which are not the same for all samples.
    inputs : sequence of int
        Inputs that may be of all samples, though they have a dimension of their number.
    refusal : WatchError or None
        Why there is no result.
    untraced : frozenset of (str, str)
        Matrices that receive rows none of which a sample reaches, and whose samples were not found.
    """

    way: Way
    uses: OwnUses | None = None
    tables: frozenset[Place] = frozenset()
    inputs: Sequence[int] = ()
    found: RowMap | None = None
    constant: frozenset[Place] = frozenset()
    refusal: WatchError | None = None
    untraced: frozenset[Place] = frozenset()

    @property
    def row_map(self) -> RowMap:
        """The result; raise WatchError if there is none."""
        if self.found is None:
            raise self.refusal or AssertionError("unreachable")
        return self.found


def map_rows(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    samples: int,
    watched: Collection[Place],
    batch_dim: int | None = None,
    all_hooks: bool = False,
    known: RowMap | None = None,
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
    known : RowMap, optional
        What was found for a batch of another size: it decides where more than one reading is possible.

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
    return _Tracer(model, args, kwargs, samples, watched, batch_dim, all_hooks, known).rows()


@dataclass(frozen=True, eq=False)
class _Tracer:
    """Traces the rows of one batch in as many ways as are needed; attributes as the parameters of `map_rows`."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int
    watched: Collection[Place]
    batch_dim: int | None
    all_hooks: bool
    known: RowMap | None

    @functools.cached_property
    def inputs(self) -> list[Tensor]:
        """The floating-point tensors among the arguments."""
        return inputs_in(self.args, self.kwargs)

    @functools.cached_property
    def words(self) -> np.ndarray:
        """A code word for each sample."""
        return code_words(self.samples)

    def rows(self) -> RowMap:
        """Find the rows in the way in which they were found before, or in the first that does and leaves no doubt."""
        for way in _ways_of(self.known, self.watched):
            before = self._tried(way).found
            if before is not None and self.known is not None and before.reading.dims == self.known.reading.dims:
                return before
        attempt = self._in_some_way(Way())
        best = attempt.row_map
        for other in self._doubts(attempt):
            if other is None or not _read_otherwise(best, other):
                continue
            ranks = [_rank(each.reading.dims, self.inputs) for each in (best, other)]
            if self.batch_dim is None or ranks[0] == ranks[1]:
                raise _several_readings([best.reading, other.reading], self.batch_dim)
            best = best if ranks[0] < ranks[1] else other
        return best

    def _doubts(self, attempt: _Attempt) -> Iterator[RowMap | None]:
        """What else may be found, where a constant was taken for a state or for rows of samples, or an input may be everybody's."""
        tried = [attempt]
        if attempt.way == Way():
            if attempt.uses is not None and attempt.uses.took_states:
                yield self._tried(Way(states=False)).found
            for number, states in itertools.product(attempt.inputs, (True, False)):
                tried.append(self._in_some_way(Way(states=states, shared=frozenset([number]))))
                yield tried[-1].found
        for each in tried if self.batch_dim is None else ():
            if each.constant:
                yield self._tried(each.way, set(self.watched) - each.constant).found

    def _in_some_way(self, way: Way) -> _Attempt:
        """Trace rows in a way, or in one of those that may do where it does not."""
        first = self._tried(way)
        tried, waiting, reason = {way}, [first], None
        while first.found is None and waiting and len(tried) < MAX_WAYS:
            for other in _ways_after(waiting.pop(0)):
                if other in tried:
                    continue
                tried.add(other)
                again = self._tried(other)
                if again.found is not None:
                    return again
                reason = reason or (None if isinstance(again.refusal, UntracedRows) else again.refusal)
                waiting.append(again)
        rest = set(self.watched) - first.tables
        if first.found is None and first.tables and rest and self._tried(Way(), rest).found is not None:
            return replace(first, refusal=_cannot_be_spread(min(first.tables)))
        if reason is not None and isinstance(first.refusal, UntracedRows):
            return replace(first, refusal=reason)
        return first

    def _tried(self, way: Way, watched: Collection[Place] | None = None) -> _Attempt:
        """Trace rows of what is watched, or of a part of it, in one way; raise SeveralReadings or FailedCopy alone."""
        try:
            return self._attempt(way, self.watched if watched is None else watched)
        except (SeveralReadings, FailedCopy):
            raise
        except WatchError as error:
            return _Attempt(way, refusal=error)

    @contextmanager
    def _with_copies(self) -> Iterator[set[nn.Module]]:
        """Let copies of the model run without a change of anything else; as for `kept_apart`."""
        with (
            generators_kept(self.inputs),
            torch.enable_grad(),
            without_short_cuts(),
            kept_apart(self.model, evaluated=True) as copied,
        ):
            yield copied

    def _attempt(self, way: Way, watched: Collection[Place]) -> _Attempt:
        args, kwargs, inputs, samples, batch_dim = self.args, self.kwargs, self.inputs, self.samples, self.batch_dim
        choices = _choices(args, kwargs, inputs, samples, batch_dim)
        if not way.shared <= set(range(len(choices))):
            raise UntracedRows("The model has other inputs than before.")
        choices = [(None,) if number in way.shared else dims for number, dims in enumerate(choices)]
        doubtful = [number for number, dims in enumerate(choices) if None in dims and len(dims) > 1]
        doubtful = doubtful if sum(len(dims) > 1 for dims in choices) > 1 else []
        shared_inputs = tuple(number for number, dims in enumerate(choices) if dims == (None,))
        with self._with_copies() as copied:
            twin, lookups, uses, all_hooks = running_twin(
                self.model,
                copied,
                args,
                kwargs,
                [inputs[i] for i in shared_inputs],
                samples,
                watched,
                self.all_hooks,
                way,
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
            fix_statistics(twin)
            unmarked = {
                place
                for place, lookup in lookups.items()
                if place in way.followed or (place not in watched and samples not in lookup.shape and not lookup.dims)
            }

            def probes(round_: Callable[[Indices], tuple[Along, ...]]) -> Iterator[Probe]:
                # Lookups of one kind and shape are read in one way.
                kinds = {lookup: round_(lookup) for place, lookup in lookups.items() if place not in way.followed}
                for dims, alongs in _readings(choices, inputs, lookups, kinds, unmarked):
                    reading = Reading(dims, alongs, shared_inputs)
                    yield Probe(twin, args, kwargs, inputs, reading, watched, uses, origins, as_given)

            accepted, untraced, refusal = self._accepted(map(probes, (likely, possible)))
        tables = frozenset(place for place, of in options.items() if place in watched and any(a.shared for a in of))
        if not accepted:
            if refusal is None or isinstance(refusal, UntracedRows):
                ways = "batch_dim= or rows=" if batch_dim is None else "rows="
                refusal = UntracedRows(
                    f"{refusal or ''} Say where the samples are with {ways}, or leave the layer out with layers=."
                )
            layers = frozenset(untraced - lookups.keys())
            return _Attempt(way, uses, tables, doubtful, refusal=refusal, untraced=layers)
        if self.known is not None and any(not same_rows(found, accepted[0][1]) for _, found in accepted):
            accepted = [each for each in accepted if each[0].reading == self.known.reading] or accepted
        if any(not same_rows(found, accepted[0][1]) for _, found in accepted):
            raise _several_readings([probe.reading for probe, _ in accepted], batch_dim)
        probe, found = accepted[0]
        row_map = replace(
            self._row_map(probe, found),
            without_hooks=() if all_hooks else tuple(modules_with_other_hooks(self.model)),
            certain=len(accepted) == 1,
        )
        constant = frozenset(place for place, same in probe.constant.items() if not same)
        return _Attempt(way, uses, tables, doubtful, row_map, constant - lookups.keys())

    def _accepted(
        self, rounds: Iterable[Iterable[Probe]]
    ) -> tuple[list[tuple[Probe, dict[Place, list[np.ndarray]]]], set[Place], WatchError | None]:
        """Of the first round that has any: the probes by which each row is one sample's, and the rows.

        With the matrices whose rows no other probe traced to samples, and why the first of these was refused.
        """
        accepted: list[tuple[Probe, dict[Place, list[np.ndarray]]]] = []
        untraced: set[Place] = set()
        refusal: WatchError | None = None
        for probes in rounds:
            for probe in probes:
                reading = probe.reading
                before = accepted[0][0].reading.dims if accepted else reading.dims
                if self.batch_dim is not None and _rank(reading.dims, self.inputs) > _rank(before, self.inputs):
                    break
                try:
                    try:
                        found = probe.rows(self.words)
                    except UntracedRows:
                        probe = probe.anew(plain_attention=True)
                        found = probe.rows(self.words)
                    _same_result(self.model, probe, self.samples)
                    accepted.append((probe, found))
                except WatchError as error:
                    spread = [place for place, along in reading.lookups.items() if along.shared and along.marked]
                    failed = error.__cause__ is not None and bool(spread)
                    refusal = refusal or (_cannot_be_spread(spread[0]) if failed else error)
                    untraced |= probe.untraced
            if accepted:
                break
        return accepted, untraced, refusal

    def _row_map(self, probe: Probe, found: dict[Place, list[np.ndarray]]) -> RowMap:
        """What a probe has found, if it holds for the next pass, too."""
        received = dict(probe.shapes)
        with self._with_copies() as copied:
            copied.update(probe.twin.modules())
            numbers = by_content(probe, self.words, found)
            refuse_what_moves_on(probe, self.words, found)
            # With several processes the model may talk to the others, who have no pass to spare at the same time.
            if self.model.training and self.samples > 1 and not several_processes():
                refuse_mixing_in_training(self.model, probe, self.samples, found)
        return RowMap(found, len(self.words), probe.reading, numbers, shapes=received, uses=probe.uses)


def _ways_of(known: RowMap | None, watched: Collection[Place]) -> Iterator[Way]:
    """The way in which rows were found, for a batch in which more may have as many entries as there are samples."""
    if known is not None:
        shared = frozenset(number for number, dim in enumerate(known.reading.dims) if dim is None)
        followed = known.uses.followed & set(watched)
        yield Way(followed, known.uses.states, shared)
        if known.uses.states:
            yield Way(followed, False, shared)


def _ways_after(attempt: _Attempt) -> Iterator[Way]:
    """Ways to trace rows after one that did not do: what samples share is followed until it meets data.

    A width that is the number of samples by chance makes a state of what is none.
    """
    if attempt.uses is None:
        return
    before, shared = attempt.way.followed, attempt.way.shared
    for followed in (before | attempt.tables, before | attempt.tables | attempt.untraced):
        for states in (True, False) if followed or attempt.uses.places else (True,):
            yield Way(followed, states, shared)
    for number in attempt.inputs:
        yield Way(before, attempt.way.states, shared | {number})


def _rank(dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[int, int]:
    """What makes a reading less likely: inputs that hold no samples, and, of those that do, fewer dimensions."""
    return dims.count(None), -sum(each.ndim for each, dim in zip(inputs, dims, strict=True) if dim is not None)


def _read_otherwise(found: RowMap, other: RowMap) -> bool:
    """Whether one gives rows to other samples than the other, where both tell whose they are; or, if none does, reads others."""
    common = found.samples.keys() & other.samples.keys() - found.uses.followed - other.uses.followed
    if not common:
        return found.reading.dims != other.reading.dims
    return not same_rows(
        {place: found.samples[place] for place in common}, {place: other.samples[place] for place in common}
    )


def _choices(
    args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor], samples: int, batch_dim: int | None
) -> list[tuple[int | None, ...]]:
    """For each floating-point input the dimensions that may index samples; None where it may hold none."""
    packed = {id(each.data) for each in instances_in((args, kwargs), PackedSequence) if sequences_in(each) == samples}
    choices: list[tuple[int | None, ...]] = [
        (0,) if id(t) in packed else _candidate_dims(t, samples, batch_dim) for t in inputs
    ]
    # An input may have a dimension of that size by chance, such as one position encoding a time point.
    hold = [dims for dims in choices if dims != (None,)]
    if any(len(dims) > 1 for dims in hold) if batch_dim is None else len(hold) > 1:
        choices = [(*dims, None) if dims in hold else dims for dims in choices]
    return choices


def _readings(
    choices: Sequence[Sequence[int | None]],
    inputs: Sequence[Tensor],
    lookups: Mapping[Place, Indices],
    kinds: Mapping[Indices, Sequence[Along]],
    unmarked: Collection[Place],
) -> Iterator[tuple[tuple[int | None, ...], dict[Place, Along]]]:
    """Ways to read inputs and lookups in which something has samples: dimensions, and how lookups hold them; likely ones first.

    Parameters
    ----------
    choices : sequence of sequence of int or None
        As of `_choices`.
    inputs : sequence of Tensor
        The inputs.
    lookups : mapping of (str, str) to Indices
        What is looked up in each table.
    kinds : mapping of Indices to sequence of Along
        How lookups of each kind may have samples.
    unmarked : collection of (str, str)
        Lookups through which samples are not followed.
    """
    if math.prod(map(len, choices)) * math.prod(map(len, kinds.values())) > MAX_HYPOTHESES:
        raise WatchError("too many dimensions of the inputs could index samples: say which with batch_dim=.")
    of_inputs = sorted(itertools.product(*choices), key=lambda dims: _rank(dims, inputs))
    for dims, chosen in itertools.product(of_inputs, itertools.product(*kinds.values())):
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
    return NoSamples(
        f"groups has {samples} labels, but no input of the model has a dimension {where} {samples} "
        f"(inputs: {shapes}): give one label for each sample of the batch, in the batch's order, with set_groups() where "
        "batches differ; a pass from which nothing is learned belongs under torch.no_grad(). Whole numbers are "
        "traced through nn.Embedding alone, and nothing in sparse tensors; elsewhere give the model dense floating-point input, "
        "or rows=."
    )


def _several_readings(readings: Sequence[Reading], batch_dim: int | None) -> SeveralReadings:
    which = "say which with batch_dim=" if batch_dim is None else "begin with a batch of another size, or give rows="
    return SeveralReadings(
        "the samples could lie along more than one dimension of the model's inputs "
        f"({' or '.join(str(each.dims if batch_dim is not None else each.batch_dims) for each in readings)}): {which}."
    )


def _copied(tensor: Tensor) -> Tensor:
    """A tensor of its own with the same numbers, with a gradient where that has one."""
    copied = tensor.detach().clone()
    if not tensor.requires_grad:
        return copied
    return copied.requires_grad_() if tensor.is_leaf else copied.requires_grad_().clone()


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
        mode.receive((args, kwargs), reading.shared_inputs(args, kwargs))
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
