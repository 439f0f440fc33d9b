"""Which rows of a layer's input belong to which sample: established by a probe, never assumed.

A copy of the model in evaluation mode runs a few times with some samples made NaN.  Each sample has a code
word, the passes in which it is NaN; where the rows of a layer's input turn NaN tells whose rows they are.
All code words have the same number of ones, so the union of two of them is no code word, and a row that
mixes samples is recognised instead of being given to a third one.  Sperner's theorem makes this cheap: about
log2(samples) + 2 passes.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from .copies import copy_model, instances_in, kept_apart, tensors_in, with_attributes
from .errors import WatchError
from .hooks import Hook
from .layers import LayerCall, rule_for
from .layers.call import hold_nan
from .spectra import irregular

MAX_HYPOTHESES = 64
# From so many samples on one pass shows whether the model shuffles them.
MANY_SAMPLES = 12
# As many others at most a sample is mixed with: one by the order, and one by the order the other way round.
MIXED_WITH = 2

Place = tuple[str, str]
"""A module's name and the parameter's name in it."""
# Stands for what the model returns, among places.
RETURNED: Place = ("", "")


@dataclass(frozen=True)
class Along:
    """How a lookup's output holds the samples.

    Attributes
    ----------
    dim : int
        The dimension of the output that indexes samples.
    shared : bool
        Whether all samples share one output, which is spread along that dimension.
    new : bool
        Whether the dimension is put in, instead of one of size 1.
    marked : bool
        Whether samples are followed through it: not so where it is shared and not watched.
    followed : bool
        Whether it is known from which entry of the model's input each index comes; ``dim`` is then the input's dimension.
    """

    dim: int
    shared: bool = False
    new: bool = False
    marked: bool = True
    followed: bool = False

    @property
    def along_samples(self) -> bool:
        """Whether the lookup has each sample's own indices."""
        return self.marked and not self.shared


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
    """

    samples: dict[Place, list[np.ndarray]]
    passes: int = 0
    reading: Reading = field(default_factory=lambda: Reading((), {}))
    by_content: tuple[int, ...] = ()
    without_hooks: tuple[str, ...] = ()
    certain: bool = False
    shapes: Mapping[Place, list[tuple[int, ...]]] = field(default_factory=dict)

    @property
    def shared(self) -> dict[Place, Along]:
        """Lookups that all samples share, such as a table of positions."""
        return {place: along for place, along in self.reading.lookups.items() if along.shared}


def code_words(count: int) -> np.ndarray:
    """Distinct binary words of equal weight.

    Parameters
    ----------
    count : int
        How many words are needed.

    Returns
    -------
    ndarray of bool, shape (length, count)
        ``words[b, i]``: whether sample i is marked in pass b.
    """
    length = 1
    while math.comb(length, (length + 1) // 2) < count:
        length += 1
    words = np.zeros((length, count), dtype=bool)
    choices = itertools.combinations(range(length), (length + 1) // 2)
    for sample, ones in enumerate(itertools.islice(choices, count)):
        words[list(ones), sample] = True
    return words


def decode(patterns: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Read the samples of rows from the passes in which the rows were NaN.

    Parameters
    ----------
    patterns : ndarray of bool, shape (length, rows)
        Whether each row was NaN in each pass.
    words : ndarray of bool, shape (length, samples)
        The code words.

    Returns
    -------
    ndarray of int, shape (rows,)
        The sample of each row; -1 where a row depends on no sample, -2 where it mixes several.
    """
    powers = 1 << np.arange(len(words), dtype=np.int64)
    sample_of_code = {int(code): sample for sample, code in enumerate(powers @ words)}
    sample_of_code[0] = -1
    return np.array([sample_of_code.get(int(code), -2) for code in powers @ patterns], dtype=np.int64)


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
    inputs = [t for t in tensors_in((args, kwargs)) if can_be_nan(t)]
    packed = {
        id(each.data): each for each in instances_in((args, kwargs), PackedSequence) if _sequences(each) == samples
    }
    choices = [(0,) if id(t) in packed else _candidate_dims(t, samples, batch_dim) for t in inputs]
    # An input may have a dimension of that size by chance, such as one position encoding a time point.
    if batch_dim is None and any(len(dims) > 1 for dims in choices):
        choices = [dims if dims == (None,) else (*dims, None) for dims in choices]
    if batch_dim is not None:
        for position in [i for i, dims in enumerate(choices) if dims != (None,)][1:]:
            choices[position] = (*choices[position], None)
    words = code_words(samples)
    accepted: list[tuple[_Probe, dict[Place, list[np.ndarray]]]] = []
    reason = ""
    with (
        generators_kept(inputs),
        torch.enable_grad(),
        without_short_cuts(),
        kept_apart(model, evaluated=True) as copied,
    ):
        twin, lookups, all_hooks = _running_twin(model, copied, args, kwargs, watched, all_hooks)
        made = [place for place, lookup in lookups.items() if not lookup.given]
        origins = _origins(twin, args, kwargs, samples, made)
        for place, calls in origins.items():
            along = set.intersection(*(call.dims(samples, batch_dim) for call in calls))
            lookups[place] = replace(lookups[place], dims=tuple(sorted(along)))
        # With as many positions as samples an index of either may be one of positions.
        sides = [*(len(dims) for dims in choices), *(lookup.shape.count(samples) for lookup in lookups.values())]
        by_size = batch_dim is not None or max(sides, default=0) < 2

        def likely(lookup: _Indices) -> tuple[Along, ...]:
            sure = by_size or lookup.given or len(lookup.shape) > 1
            return (_likely if sure else _possible)(lookup, samples, batch_dim)

        def possible(lookup: _Indices) -> tuple[Along, ...]:
            return _possible(lookup, samples, batch_dim)

        options_of_lookups = [likely(lookup) for lookup in lookups.values()]
        if not any(dims != (None,) for dims in choices) and not any(
            along.along_samples for options in options_of_lookups for along in options
        ):
            every = [t for t in tensors_in((args, kwargs)) if not can_be_nan(t)] + inputs
            notes = ["" if t.layout == torch.strided else ", not dense" for t in every]
            shapes = ", ".join(f"{tuple(t.shape)}{note}" for t, note in zip(every, notes, strict=True)) or "no tensor"
            where = "of size" if batch_dim is None else f"{batch_dim} of size"
            raise WatchError(
                f"groups has {samples} labels, but no input of the model has a dimension {where} {samples} "
                f"(inputs: {shapes}): give one label for each sample of the batch, in the batch's order, with set_groups() where "
                "batches differ. Whole numbers are "
                "traced through nn.Embedding alone, and nothing in sparse tensors; elsewhere give the model dense floating-point input, "
                "or rows=."
            )
        _fix_statistics(twin)
        for round_ in (likely, possible):
            options = {
                place: (Along(0, marked=False),)
                if place not in watched and samples not in lookup.shape and not lookup.dims
                else None
                for place, lookup in lookups.items()
            }
            # Lookups of one kind and shape are read in one way.
            by_kind = {lookup: round_(lookup) for lookup in lookups.values()}
            if math.prod(map(len, choices)) * math.prod(map(len, by_kind.values())) > MAX_HYPOTHESES:
                raise WatchError("too many dimensions of the inputs could index samples: say which with batch_dim=.")
            for dims, chosen in itertools.product(itertools.product(*choices), itertools.product(*by_kind.values())):
                along_of_kind = dict(zip(by_kind, chosen, strict=True))
                alongs = {
                    place: only[0] if (only := options[place]) else along_of_kind[lookup]
                    for place, lookup in lookups.items()
                }
                if all(dim is None for dim in dims) and not any(along.along_samples for along in alongs.values()):
                    continue
                if batch_dim is not None and accepted:
                    break
                probe = _Probe(twin, args, kwargs, inputs, Reading(dims, alongs), watched, origins)
                try:
                    found = probe.rows(words)
                    _same_result(model, twin, args, kwargs, probe.reading, samples)
                    accepted.append((probe, found))
                except WatchError as error:
                    spread = [place for place, along in alongs.items() if along.shared and along.marked]
                    failed = error.__cause__ is not None and bool(spread)
                    reason = reason or str(_cannot_be_spread(spread[0]) if failed else error)
            if accepted:
                break
    if not accepted:
        raise WatchError(f"{reason} Say where the samples are with batch_dim= or rows=.")
    if any(not _same(found, accepted[0][1]) for _, found in accepted):
        accepted = [each for each in accepted if each[0].reading == known] or accepted
    if any(not _same(found, accepted[0][1]) for _, found in accepted):
        readings = " or ".join(str(probe.reading.batch_dims) for probe, _ in accepted)
        raise WatchError(
            f"the samples could lie along more than one dimension of the model's inputs ({readings}): "
            "say which with batch_dim=."
        )
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
        # With several processes the model may talk to the others, who have no pass to spare at the same time.
        if model.training and samples > 1 and not several_processes():
            _refuse_mixing_in_training(model, probe, samples, found)
    without_hooks = () if all_hooks else tuple(_modules_with_other_hooks(model))
    return RowMap(found, len(words), probe.reading, by_content, without_hooks, len(accepted) == 1, received)


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
                tensor.copy_(_finite(tensor))
    return twin


def _running_twin(
    model: nn.Module,
    copied: set[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watched: Collection[Place],
    all_hooks: bool,
) -> tuple[nn.Module, dict[Place, _Indices], bool]:
    """A copy that runs, what it looks up in tables, and whether it has all hooks.

    Gradients are enabled, so that what a model does without them can be told apart, but the copy's weights need none, which
    spares the graph.  If that fails, as where a model asks for a gradient in its forward pass, or lacks a hook that brings its
    input into form, it is tried as it trains.
    """
    for hooks, learns in dict.fromkeys([(all_hooks, False), (all_hooks, True), (True, True)]):
        twin = _twin(model, hooks)
        copied.update(twin.modules())
        if not learns:
            twin.requires_grad_(False)
        try:
            return twin, _lookups(twin, args, kwargs, watched), hooks
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


def as_array(value: Any) -> np.ndarray:
    """What a user gives of rows or positions, also as a tensor on another device."""
    return np.asarray(value.cpu() if isinstance(value, Tensor) else value)


def content_of(array: np.ndarray | np.generic) -> str | bytes:
    """What an array holds, to be compared with another of its shape."""
    return str(array.tolist()) if array.dtype.kind == "O" else array.tobytes()


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def can_be_nan(tensor: Tensor) -> bool:
    """Whether a tensor is of real or complex numbers, whose samples can be marked; not so in sparse or nested ones."""
    return tensor.layout == torch.strided and (tensor.is_floating_point() or tensor.is_complex())


def whole_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor | np.ndarray]:
    """Tensors of whole numbers or truth values, and arrays of these or of names: NaN cannot show what hangs on them."""
    tensors = [t for t in tensors_in((args, kwargs)) if t.layout == torch.strided and not can_be_nan(t)]
    return [
        *tensors,
        *(array for array in instances_in((args, kwargs), np.ndarray) if array.ndim and array.dtype.kind not in "fc"),
    ]


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


def _by_content(probe: _Probe, words: np.ndarray, found: Mapping[Place, list[np.ndarray]]) -> tuple[int, ...]:
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
    # How sequences are packed says whose their rows are; moved on it would fit them no more.
    of_packing = {
        id(tensor) for each in instances_in((probe.args, probe.kwargs), PackedSequence) for tensor in each[1:]
    }
    same = [
        content_of(as_array(before)) == content_of(as_array(after)) or id(before) in of_packing
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


@dataclass(frozen=True)
class Reading:
    """One way to read the inputs: the dimension of each that indexes samples, and how lookups hold them."""

    dims: tuple[int | None, ...]
    lookups: Mapping[Place, Along]

    @property
    def batch_dims(self) -> tuple[int, ...]:
        """The dimensions, of inputs and then of lookups."""
        of_lookups = dict.fromkeys(along.dim for along in self.lookups.values() if along.along_samples)
        return (*(dim for dim in self.dims if dim is not None), *of_lookups)


@dataclass(frozen=True)
class _Indices:
    """What a lookup looks up.

    Attributes
    ----------
    shape : tuple of int
        Shape of the indices.
    given : bool
        Whether they are what the model was given, as it was given.
    dims : tuple of int
        Where each is known to be an entry of the model's input: which of its dimensions may index samples.
    """

    shape: tuple[int, ...]
    given: bool
    dims: tuple[int, ...] = ()


def _lookups(
    twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watched: Collection[Place]
) -> dict[Place, _Indices]:
    """The indices of every lookup in one forward pass; weights used outside their layer are refused."""
    found: dict[Place, _Indices] = {}
    given = {_lies(tensor) for tensor in tensors_in((args, kwargs)) if tensor.layout == torch.strided}

    def on_call(place: Place, indices: Tensor) -> None:
        as_given = _lies(indices) in given and (place not in found or found[place].given)
        found[place] = _Indices(tuple(indices.shape), as_given)

    with _indices_seen(twin, on_call):
        _refuse_functional_uses(twin, args, kwargs, watched)
    return found


def _lies(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


@contextmanager
def _indices_seen(twin: nn.Module, on_call: Callable[[Place, Tensor], None], wrapped: bool = False) -> Iterator[None]:
    """Tell of the indices of every lookup; if wrapped, bring those beyond the table's end back into it."""
    handles = []
    for name, module in twin.named_modules():
        if not isinstance(module, nn.Embedding) or rule_for(module) is None:
            continue

        def begins(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            assert isinstance(module, nn.Embedding)
            indices = args[0] if args else kwargs["input"]
            on_call((name, "weight"), indices)
            if not wrapped:
                return None
            inside = indices % module.num_embeddings
            return ((inside, *args[1:]), kwargs) if args else (args, {**kwargs, "input": inside})

        handles.append(module.register_forward_pre_hook(begins, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _Origin:
    """From which entries of the model's inputs the indices of one lookup come.

    Attributes
    ----------
    entries : list of (tuple of int, ndarray of int)
        For each input, its shape and the number of the entry that stands at each index; -1 where it is none of them.
    """

    entries: list[tuple[tuple[int, ...], np.ndarray]]

    def dims(self, samples: int, batch_dim: int | None) -> set[int]:
        """Dimensions of the inputs that may index samples."""
        return set.intersection(*(set(_dims_of_size(shape, samples, batch_dim)) for shape, _ in self.entries))

    def samples(self, dim: int, count: int) -> np.ndarray:
        """Sample of each index, -1 where it is not known.

        Padding tells nothing of itself: it belongs to the sample of its slice, where that has one alone.
        """
        found = np.full(self.entries[0][1].shape, -1)
        for shape, entries in self.entries:
            known = entries >= 0
            found[known] = np.unravel_index(entries[known], shape)[dim]
        for axis in range(found.ndim) if found.ndim > 1 else ():
            others = tuple(other for other in range(found.ndim) if other != axis)
            largest = found.max(others, keepdims=True)
            if ((found == largest) | (found < 0)).all():
                missing = np.setdiff1d(np.arange(count), largest)
                if len(missing) == 1 and (largest < 0).sum() == 1:  # all of its indices are padding
                    largest[largest < 0] = missing
                return np.broadcast_to(largest, found.shape)
        return found


def _origins(
    twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int, places: Collection[Place]
) -> dict[Place, list[_Origin]]:
    """Follow whole numbers from the model's inputs to lookups, which NaN cannot.

    Each entry is raised by a number of its own, in a second pass in the reverse order, and what an index is raised by tells
    which entry it is.  Zeros stay where a sample has several numbers, since they are padding as a rule, from which models find
    lengths.

    Returns
    -------
    dict of (str, str) to list of _Origin
        For each place whose indices are such entries, sorted, turned or cut as it may be: one for each of its calls.  Not those
        with which the model computes, or by which it sorts.
    """
    packing = [tensor for each in instances_in((args, kwargs), PackedSequence) for tensor in each[1:]]
    numbers = {
        id(t): t
        for t in tensors_in((args, kwargs))
        if t.dtype in (torch.int64, torch.int32)
        and t.layout == torch.strided
        and samples in t.shape
        and all(t is not other for other in packing)
    }

    def passed(others: Mapping[int, Tensor | np.ndarray]) -> dict[Place, list[np.ndarray]]:
        """Indices of every call of every lookup; nothing where the model fails: not every number can be another one."""
        seen: dict[Place, list[np.ndarray]] = {}

        def on_call(place: Place, indices: Tensor) -> None:
            seen.setdefault(place, []).append(indices.cpu().numpy().astype(np.int64))

        try:
            with _unchanged(twin), _indices_seen(twin, on_call, wrapped=True):
                twin(*_replaced(args, others), **_replaced(kwargs, others))
        except Exception:
            return {}
        return seen

    plain = passed({}) if places and numbers else {}
    found: dict[Place, list[_Origin]] = {place: [_Origin([]) for _ in plain.get(place, ())] for place in places}
    for key, tensor in numbers.items() if plain else ():
        total, values = tensor.numel(), as_array(tensor).reshape(-1)
        count = torch.arange(total, device=tensor.device, dtype=tensor.dtype).view(tensor.shape)
        raised = tensor > (0 if total > samples else -1)
        up, down = (passed({key: torch.where(raised, tensor + by, tensor)}) for by in (count + 1, total - count))
        for place, origins in found.items():
            calls = zip(*(seen.get(place, ()) for seen in (plain, up, down)), strict=False)
            for origin, (before, higher, lower) in zip(origins, calls, strict=False):
                if not before.shape == higher.shape == lower.shape:
                    continue
                entries = higher - before - 1
                entry = (entries >= 0) & (entries < total) & (lower - before == total - entries)
                entry &= values[np.where(entry, entries, 0)] == before
                if entry.any() and (entry | (higher == before) & (lower == before)).all():
                    origin.entries.append((tuple(tensor.shape), np.where(entry, entries, -1)))
    return {place: calls for place, calls in found.items() if calls and all(call.entries for call in calls)}


def _dims_of_size(shape: Sequence[int], samples: int, batch_dim: int | None) -> tuple[int, ...]:
    """Dimensions that may index samples: the one that the user gave, or all of that size."""
    dims = tuple(d for d, size in enumerate(shape) if size == samples)
    return dims if batch_dim is None else tuple(d for d in dims if d in (batch_dim, batch_dim + len(shape)))


def _possible(lookup: _Indices, samples: int, batch_dim: int | None) -> tuple[Along, ...]:
    """Ways in which a lookup may hold samples: as the input does from which it comes; else along a dimension, or shared."""
    if lookup.dims:
        return tuple(Along(dim, followed=True) for dim in lookup.dims)
    shape = lookup.shape
    own = [Along(d) for d in _dims_of_size(shape, samples, None)]
    if len(shape) > 1:
        chosen = set(_dims_of_size(shape, samples, batch_dim))
        wanted = [along for along in own if along.dim in chosen]
        # What the user said is about the inputs; what the model makes itself may lie in another way.
        own = wanted or own if lookup.given else [*wanted, *(along for along in own if along not in wanted)]
    spread = [Along(d, shared=True) for d, size in enumerate(shape) if size == 1 and samples > 1]
    return (*own, *(spread or [Along(0, shared=True, new=True)]))


def _likely(lookup: _Indices, samples: int, batch_dim: int | None) -> tuple[Along, ...]:
    """The same without what is hardly ever meant: that all samples share what has a dimension of their number."""
    options = _possible(lookup, samples, batch_dim)
    own = [along for along in options if along.along_samples]
    return tuple(own) if len(own) == 1 and 1 not in lookup.shape else options


def _same_result(
    model: nn.Module, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reading: Reading, samples: int
) -> None:
    """Refuse a reading in which spreading a shared lookup changes what the model computes, draws at random, or learns.

    What is spread before it meets the samples' own values is computed once a sample, and the sum over samples that autograd
    then forms is another one, to rounding.
    """
    shared = [place for place, along in reading.lookups.items() if along.shared]
    if not shared:
        return
    refusal = _cannot_be_spread(shared[0])
    placed = [*twin.parameters(), *tensors_in((args, kwargs))]

    def result(spread: bool) -> list[Tensor]:
        marked = _lookups_marked(twin, reading if spread else Reading(reading.dims, {}), samples, None, {})
        with generators_kept(placed), _unchanged(twin), marked, _learning_as(twin, model) as weights:
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
    before = [(each, each.requires_grad) for each in twin.parameters()]
    twin.train(model.training)
    for name, each in twin.named_parameters():
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
        "with torch.arange(positions).unsqueeze(0) and add what it gives to the samples' values, before anything else is computed of "
        "it, or leave it out with layers=."
    )


@contextmanager
def _lookups_marked(
    twin: nn.Module,
    reading: Reading,
    samples: int,
    word: np.ndarray | None,
    origins: Mapping[Place, list[_Origin]],
) -> Iterator[None]:
    """Spread lookups that samples share, and make NaN what belongs to the samples of a word."""
    handles = []
    for place, along in reading.lookups.items():
        module = twin.get_submodule(place[0])
        calls = itertools.count()

        def hook(
            _: nn.Module, args: Any, output: Tensor, place: Place = place, along: Along = along, calls: Any = calls
        ) -> Tensor:
            if not along.marked:
                return output
            if along.followed:
                if word is None:
                    return output
                of = origins[place][next(calls)].samples(along.dim, samples)
                nan = torch.from_numpy((of >= 0) & word[of]).to(output.device)
                return output.detach().masked_fill(nan.unsqueeze(-1), math.nan)
            if along.shared:
                output = output.unsqueeze(along.dim) if along.new else output
                shape = [samples if axis == along.dim else size for axis, size in enumerate(output.shape)]
                output = output.expand(shape)
            if word is None:
                return output
            chosen = torch.from_numpy(np.flatnonzero(word)).to(output.device)
            return output.detach().clone().index_fill_(along.dim, chosen, math.nan)

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _candidate_dims(tensor: Tensor, samples: int, batch_dim: int | None) -> tuple[int | None, ...]:
    return _dims_of_size(tensor.shape, samples, batch_dim) or (None,)


@dataclass(frozen=True, eq=False)
class _Probe:
    """A copy of a model, the batch it is called with, and one way to read that.

    Attributes
    ----------
    twin : nn.Module
        The copy.
    args, kwargs
        What it is called with.
    inputs : sequence of Tensor
        The floating-point tensors among them, complex ones too.
    reading : Reading
        Where these hold the samples.
    watched : collection of (str, str)
        Module and parameter names of the matrices that are watched.
    origins : mapping of (str, str) to list of _Origin
        From which entries of the inputs the indices of lookups come, where these are followed.
    shapes : dict of (str, str) to list of tuple of int
        Shapes of what each use of each watched matrix received in the last pass.
    """

    twin: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Sequence[Tensor]
    reading: Reading
    watched: Collection[Place]
    origins: Mapping[Place, list[_Origin]]
    shapes: dict[Place, list[tuple[int, ...]]] = field(default_factory=dict)

    def given(self, others: Mapping[int, Tensor | np.ndarray], samples: int) -> _Probe:
        """The same with other tensors in place of some, by their identities."""
        args, kwargs = _replaced(self.args, others), _replaced(self.kwargs, others)
        origins = _origins(self.twin, args, kwargs, samples, self.origins)
        return replace(self, args=args, kwargs=kwargs, origins=origins, shapes={})

    def reached(
        self, word: np.ndarray, begun: tuple[Place, int, np.ndarray] | None = None
    ) -> dict[Place, list[np.ndarray]]:
        """Where NaN comes, as for `_nan_rows`, in a forward pass in which the samples of a word are NaN.

        Or, with the place and the number of one use and a mask, these rows of its output.
        """
        marked: dict[int, Tensor | np.ndarray] = {}
        packed = {id(each.data): each for each in instances_in((self.args, self.kwargs), PackedSequence)}
        for tensor, dim in zip(self.inputs, self.reading.dims, strict=True):
            marked[id(tensor)] = data = _finite(tensor.detach())
            if dim is not None:
                marks = word[_samples_of_packed(packed[id(tensor)])] if id(tensor) in packed else word
                chosen = torch.from_numpy(np.flatnonzero(marks)).to(tensor.device)
                data.index_fill_(dim, chosen, complex(math.nan, math.nan) if data.is_complex() else math.nan)
        looked_up = _lookups_marked(self.twin, self.reading, len(word), word, self.origins)
        self.shapes.clear()
        seeing = _nan_rows(self.twin, self.watched, self.shapes)
        with _unchanged(self.twin), looked_up, seeing as seen, _begun(self.twin, begun):
            returned = self.twin(*_replaced(self.args, marked), **_replaced(self.kwargs, marked))
        seen[RETURNED] = [
            (hold_nan(each, each.ndim - 1) if each.ndim > 1 else each.isnan()).cpu().numpy()
            for each in tensors_in(returned)
            if can_be_nan(each)
        ]
        return seen

    def rows(self, words: np.ndarray) -> dict[Place, list[np.ndarray]]:
        """Sample of each row, in every use of every watched matrix; raise WatchError if a row is not one sample's."""
        passes = []
        for word in words:
            try:
                passes.append(self.reached(word))
            except Exception as error:
                raise WatchError(
                    f"the model failed on a batch in which some samples are NaN ({type(error).__name__}: {error}), "
                    "so the rows of its layers could not be traced to samples."
                ) from error
        found: dict[Place, list[np.ndarray]] = {}
        for key in dict.fromkeys(itertools.chain(*passes)):
            if len({tuple(marks.shape for marks in seen.get(key, ())) for seen in passes}) > 1:
                if key == RETURNED:
                    continue
                raise WatchError(
                    f"How many rows '{key[0] or key[1]}' receives depends on the numbers in the batch, as where samples are sent to "
                    "experts: leave it out with layers=."
                )
            found[key] = []
            for call, marks in enumerate(passes[0][key]):
                patterns = np.stack([seen[key][call] for seen in passes])
                decoded = decode(patterns.reshape(len(words), -1), words).reshape(marks.shape)
                found[key].append(_filled(decoded, patterns, words))
                if key != RETURNED and (found[key][-1] == -2).any():
                    raise WatchError(f"Rows of the input of '{key[0] or key[1]}' mix several samples.")
        unknown = [(key, call) for key, calls in found.items() for call, of in enumerate(calls) if (of == -1).any()]
        for key, call in unknown:
            if key != RETURNED:
                found[key][call] = self._by_what_they_reach(key, call, found, words)
        alike: dict[bytes, np.ndarray] = {}  # most layers have the same rows
        return {
            key: [alike.setdefault(of.tobytes(), of.reshape(-1)) for of in calls]
            for key, calls in found.items()
            if key != RETURNED
        }

    def _by_what_they_reach(
        self, place: Place, call: int, found: Mapping[Place, list[np.ndarray]], words: np.ndarray
    ) -> np.ndarray:
        """Give rows of one use that no sample reaches, such as a first state of zeros, to the samples that they reach.

        NaN that begins at the output of row i, or of as many rows for each i, has to come to sample i and to no other.
        """
        samples = found[place][call]
        unknown = samples == -1
        for expected in _in_order(samples.shape, words.shape[1]):
            reached = np.zeros(words.shape[1], dtype=bool)
            fits = (unknown | (samples == expected)).all() and all(
                self._reaches((place, call, unknown & word[expected]), found, word, reached) for word in words
            )
            if fits and reached[expected[unknown]].all():
                return expected
        raise WatchError(
            f"Rows of the input of '{place[0] or place[1]}' belong to no sample: NaN of none reaches them, as where "
            "they are made of whole numbers or of weights alone, or NaN is replaced, and what they reach does not tell either."
        )

    def _reaches(
        self,
        begun: tuple[Place, int, np.ndarray],
        found: Mapping[Place, list[np.ndarray]],
        word: np.ndarray,
        reached: np.ndarray,
    ) -> bool:
        """Whether NaN that begins in a use comes to samples of a word alone; notes which it comes to."""
        try:
            seen = self.reached(np.zeros_like(word), begun)
        except Exception:
            return False
        for key, calls in found.items():
            if [marks.shape for marks in seen.get(key, ())] != [samples.shape for samples in calls]:
                return False
            for samples, marks in zip(calls, seen[key], strict=True):
                come_to = samples[marks & (samples >= 0)]
                if not word[come_to].all():
                    return False
                reached[come_to] = True
        return True


def _in_order(shape: tuple[int, ...], samples: int) -> Iterator[np.ndarray]:
    """Ways in which entries of that shape may lie sample by sample, or have one after the other of each."""
    for axis, size in enumerate(shape):
        if size == samples:
            along = np.arange(samples).reshape([-1 if other == axis else 1 for other in range(len(shape))])
            yield np.broadcast_to(along, shape)
    if len(shape) == 1 and shape[0] > samples and shape[0] % samples == 0:
        yield np.repeat(np.arange(samples), shape[0] // samples)
        yield np.tile(np.arange(samples), shape[0] // samples)


@contextmanager
def _begun(twin: nn.Module, begun: tuple[Place, int, np.ndarray] | None) -> Iterator[None]:
    """Make rows of the output of one use of a module NaN."""
    if begun is None:
        yield
        return
    (name, _), number, mask = begun
    calls = itertools.count()

    def hook(_: nn.Module, __: Any, output: Any) -> Tensor | None:
        if not torch.is_grad_enabled() or next(calls) != number:
            return None
        if not isinstance(output, Tensor) or output.shape[: mask.ndim] != mask.shape:
            raise WatchError("only rows of a single output can be made NaN.")
        rest = [1] * (output.ndim - mask.ndim)
        return output.masked_fill(torch.from_numpy(mask).to(output.device).view(*mask.shape, *rest), math.nan)

    handle = twin.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _refuse_mixing_in_training(
    model: nn.Module, probe: _Probe, samples: int, found: Mapping[Place, list[np.ndarray]]
) -> None:
    """Refuse a model whose training mode gives rows to other samples, so far as a few passes show it.

    Such a model shuffles or mixes its batch.  Statistics of the batch are no reason to refuse; torch's own normalisation is left
    in evaluation mode, so that what comes after it can be seen.
    """
    training = {name: module.training for name, module in model.named_modules()}
    for name, module in probe.twin.named_modules():
        module.training = training.get(name, True) and not isinstance(module, _BatchNorm)

    def others_reached(word: np.ndarray) -> Iterator[tuple[Place, int]]:
        """Uses of which rows of samples that are not marked turn NaN, and of how many samples."""
        seen = probe.reached(word)
        for key, calls in found.items():
            if len(seen.get(key, ())) == len(calls):
                for rows, marks in zip(calls, seen[key], strict=True):
                    nan = marks.reshape(-1)
                    if len(nan) == len(rows) and not nan.all() and nan[~word[rows]].any():
                        yield key, len(np.unique(rows[nan & ~word[rows]]))

    draw = np.random.default_rng(0)
    try:
        # A random order leaves half of the samples among themselves once in (samples over half of them) times.
        half = [draw.permutation(samples) < samples // 2 for _ in range(1 if samples >= MANY_SAMPLES else 3)]
        places = [key for word in half for key, _ in others_reached(word)]
        one = [draw.permutation(samples) < 1 for _ in range(3)] if places else []
        by_place = [pair for word in one for pair in others_reached(word)]
    except Exception:  # not every model can be trained on NaN
        return
    # One sample reaches the one or two that it is exchanged or mixed with, but all that share a statistic.
    if places and (not by_place or min(count for _, count in by_place) <= MIXED_WITH):
        name = places[0][0] or places[0][1]
        raise WatchError(
            f"In training mode rows of the input of '{name}' depend on other samples than in evaluation mode: the model shuffles or "
            "mixes its batch. Do so before it is called, with labels in the new order; or give rows=, or leave the layer out with "
            "layers=."
        )


def _filled(samples: np.ndarray, patterns: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Give rows that depend on no sample to the sample of their slice; such as a learned token put before each sequence.

    Or on none in some passes, such as tokens of which some are masked at random; or windows that are filled up at the edge of a
    picture.  This needs one dimension along which slice i, or the i-th slices of as many, holds rows of no other sample than i,
    and in each pass in which sample i is marked a row that shows it.
    """
    unknown = samples < 0
    count = words.shape[1]
    if not unknown.any() or unknown.all():
        return samples
    for dim, size in enumerate(samples.shape):
        if size % count or (samples.ndim == 1 and size == count):
            continue
        if size > count:
            apart = (*samples.shape[:dim], count, size // count, *samples.shape[dim + 1 :])
            found = _filled(samples.reshape(apart), patterns.reshape(len(words), *apart), words)
            if (found >= 0).all():
                return found.reshape(samples.shape)
            continue
        shape = [count if axis == dim else 1 for axis in range(samples.ndim)]
        expected = np.arange(count).reshape(shape)
        others = tuple(axis + 1 for axis in range(samples.ndim) if axis != dim)
        of_another = (patterns & ~words.reshape(len(words), *shape)).any(0)
        known = (samples == expected) | (unknown & ~of_another)
        if known.all() and np.array_equal(patterns.any(axis=others), words):
            return np.where(unknown, expected, samples)
    return samples


@contextmanager
def _nan_rows(
    twin: nn.Module, watched: Collection[Place], shapes: dict[Place, list[tuple[int, ...]]]
) -> Iterator[dict[Place, list[np.ndarray]]]:
    """Collect, for each use of each watched parameter, which entries of its batch hold a NaN, and its input's shape."""
    seen: dict[Place, list[np.ndarray]] = {}
    handles = []
    for name, module in twin.named_modules():
        rule = rule_for(module)
        if rule is None:
            continue

        def on_call(call: LayerCall, name: str = name) -> None:
            if not torch.is_grad_enabled():  # such a call is none in training
                return
            for parameter in call.parameters:
                if (name, parameter) in watched:
                    seen.setdefault((name, parameter), []).append(call.marks(parameter).cpu().numpy())
                    shapes.setdefault((name, parameter), []).append(tuple(call.inputs[0].shape))

        handles += rule.attach(module, on_call)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


_DETACHED = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


class _FunctionalUses(TorchFunctionMode):
    """Notices a watched matrix, or what is made of it, that meets data outside its layer: ``x @ (2 * layer.weight)``."""

    def __init__(self, twin: nn.Module, watched: Collection[Place]) -> None:
        super().__init__()
        modules = dict(twin.named_modules())
        self.names = {id(modules[name].get_parameter(key)): f"{name}.{key}" if name else key for name, key in watched}
        self.derived: list[Tensor] = []
        self.inside = 0
        self.found: tuple[str, str] | None = None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside:
            return result
        tensors = list(tensors_in((args, kwargs or {})))
        watched = [t for t in tensors if id(t) in self.names]
        if not watched:
            return result
        name = self.names[id(watched[0])]
        others = [t for t in tensors if id(t) not in self.names and not isinstance(t, nn.Parameter) and t.ndim]
        if others and self.found is None:
            self.found = (name, getattr(func, "__name__", str(func)))
        elif not others and func not in _DETACHED:
            for tensor in tensors_in(result):
                if tensor.ndim:  # a number, such as a penalty, is no weight any more
                    self.names[id(tensor)] = name
                    self.derived.append(tensor)  # an identity is only unique while its object lives
        return result


def _refuse_functional_uses(
    twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watched: Collection[Place]
) -> None:
    mode = _FunctionalUses(twin, watched)

    def enter(*_: Any) -> None:
        mode.inside += 1

    def leave(*_: Any) -> None:
        mode.inside -= 1

    handles = []
    for module in twin.modules():
        if rule_for(module) is not None:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        with _unchanged(twin), mode:
            twin(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if mode.found:
        name, function = mode.found
        raise WatchError(
            f"the model uses '{name}' outside its layer, in {function}(): such a use cannot be watched. "
            "Call the layer instead, or leave it out with layers=."
        )


@contextmanager
def generators_kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put every random number generator back as it was, also of the devices of the tensors."""
    devices = sorted({t.device.index or 0 for t in tensors if t.is_cuda})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _unchanged(twin: nn.Module) -> Iterator[None]:
    """Put back what a forward pass leaves in a model: a recurrent layer's last state for the next batch, or generators."""
    own = ("_buffers", "_modules", "_parameters")
    attributes = [each for m in twin.modules() for each in (vars(m), *(vars(m)[name] for name in own))]
    before = [dict(each) for each in attributes]
    lists = [(item, list(item)) for items in before for item in items.values() if type(item) is list]
    dicts = [(item, dict(item)) for items in before for item in items.values() if type(item) is dict]
    tensors = {id(t): t for t in tensors_in(before) if not isinstance(t, nn.Parameter) and not t.is_inference()}
    values = [(tensor, tensor._version, tensor.clone()) for tensor in tensors.values()]
    generators = [(each, each.get_state()) for each in instances_in(before, torch.Generator)]
    of_numpy = [(each.bit_generator, each.bit_generator.state) for each in instances_in(before, np.random.Generator)]
    try:
        yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        for bits, drawn in of_numpy:
            bits.state = drawn
        for each, items in (*zip(attributes, before, strict=True), *dicts):
            each.clear()
            each.update(items)
        for each, kept in lists:
            each[:] = kept
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)


@contextmanager
def without_short_cuts() -> Iterator[None]:
    """Keep attention from the short cut that it takes in evaluation without gradients, which no hook sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _sequences(packed: PackedSequence) -> int:
    return int(packed.batch_sizes[0])


def _samples_of_packed(packed: PackedSequence) -> np.ndarray:
    """The sample of each row of its data: rows lie time first, longer sequences before shorter ones."""
    order = np.arange(_sequences(packed))
    if packed.sorted_indices is not None:
        order = packed.sorted_indices.cpu().numpy()
    return np.concatenate([order[:count] for count in packed.batch_sizes.tolist()])


def _finite(tensor: Tensor) -> Tensor:
    """Copy with zeros where it was not finite: NaN must mean a marked sample and nothing else."""
    return torch.where(torch.isfinite(tensor), tensor, 0) if can_be_nan(tensor) else tensor.clone()


def _same(first: Mapping[Place, list[np.ndarray]], second: Mapping[Place, list[np.ndarray]]) -> bool:
    """Whether two readings give every row to the same sample, as in a batch of one."""
    return {key: len(calls) for key, calls in first.items()} == {
        key: len(calls) for key, calls in second.items()
    } and all(np.array_equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True))


def _replaced(value: Any, marked: Mapping[int, Tensor | np.ndarray]) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        return marked.get(id(value), value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, marked) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(item, marked) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, marked) for item in value)
    return with_attributes(value, marked, _replaced)
