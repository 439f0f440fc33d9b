"""Samples at lookups, such as nn.Embedding: whole numbers cannot be NaN, so they are followed there in another way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import as_array, of_packing, replaced, tensors_in
from ..copies import unchanged
from ..layers import rule_for
from ..layers.call import Place


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


@dataclass(frozen=True)
class Indices:
    """What a lookup looks up.

    Attributes
    ----------
    shape : tuple of int
        Shape of the indices.
    given : bool
        Whether they are what the model was given, as it was given.
    dims : tuple of int
        Where each is known to be an entry of the model's input: which of its dimensions may index samples.
    counted : bool
        Whether they are constants in one row or column, as positions are, and so of no sample, whatever their number.
    """

    shape: tuple[int, ...]
    given: bool
    dims: tuple[int, ...] = ()
    counted: bool = False


def lookups_in(
    twin: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    forward: Callable[[], None],
    constant: Callable[[Tensor], bool] = lambda _: False,
) -> dict[Place, Indices]:
    """The indices of every lookup in one forward pass with the arguments, which ``forward`` makes.

    ``constant`` says of indices whether they are made of nothing, as by torch.arange, or were there before.
    """
    found: dict[Place, Indices] = {}
    given = {_lies(tensor) for tensor in tensors_in((args, kwargs)) if tensor.layout == torch.strided}

    def on_call(place: Place, indices: Tensor) -> None:
        as_given = _lies(indices) in given and (place not in found or found[place].given)
        counted = indices.numel() == max(indices.shape, default=1) and constant(indices)
        found[place] = Indices(tuple(indices.shape), as_given, counted=counted)

    with _indices_seen(twin, on_call):
        forward()
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
class Origin:
    """From which entries of the model's inputs the indices of one lookup come.

    Attributes
    ----------
    entries : list of (tuple of int, ndarray of int)
        For each input, its shape and the number of the entry that stands at each index; -1 where it is none of them.
    """

    entries: list[tuple[tuple[int, ...], np.ndarray]]

    def dims(self, samples: int, batch_dim: int | None) -> set[int]:
        """Dimensions of the inputs that may index samples."""
        return set.intersection(*(set(dims_of_size(shape, samples, batch_dim)) for shape, _ in self.entries))

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


def origins_of(
    twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int, places: Collection[Place]
) -> dict[Place, list[Origin]]:
    """Follow whole numbers from the model's inputs to lookups, which NaN cannot.

    Each entry is raised by a number of its own, in a second pass in the reverse order, and what an index is raised by tells
    which entry it is.  Zeros stay where a sample has several numbers, since they are padding as a rule, from which models find
    lengths.

    Returns
    -------
    dict of (str, str) to list of Origin
        For each place whose indices are such entries, sorted, turned or cut as it may be: one for each of its calls.  Not those
        with which the model computes, or by which it sorts.
    """
    packing = of_packing((args, kwargs))
    numbers = {
        id(t): t
        for t in tensors_in((args, kwargs))
        if t.dtype in (torch.int64, torch.int32)
        and t.layout == torch.strided
        and samples in t.shape
        and id(t) not in packing
    }

    def passed(others: Mapping[int, Tensor | np.ndarray]) -> dict[Place, list[np.ndarray]]:
        """Indices of every call of every lookup; nothing where the model fails: not every number can be another one."""
        seen: dict[Place, list[np.ndarray]] = {}

        def on_call(place: Place, indices: Tensor) -> None:
            seen.setdefault(place, []).append(indices.cpu().numpy().astype(np.int64))

        try:
            with unchanged(twin), _indices_seen(twin, on_call, wrapped=True):
                twin(*replaced(args, others), **replaced(kwargs, others))
        except Exception:
            return {}
        return seen

    plain = passed({}) if places and numbers else {}
    found: dict[Place, list[Origin]] = {place: [Origin([]) for _ in plain.get(place, ())] for place in places}
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


def dims_of_size(shape: Sequence[int], samples: int, batch_dim: int | None) -> tuple[int, ...]:
    """Dimensions that may index samples: the one that the user gave, or all of that size."""
    dims = tuple(d for d, size in enumerate(shape) if size == samples)
    return dims if batch_dim is None else tuple(d for d in dims if d in (batch_dim, batch_dim + len(shape)))


def possible_readings(lookup: Indices, samples: int, batch_dim: int | None) -> tuple[Along, ...]:
    """Ways in which a lookup may hold samples: as the input does from which it comes; else along a dimension, or shared."""
    if lookup.dims:
        return tuple(Along(dim, followed=True) for dim in lookup.dims)
    shape = lookup.shape
    own = [] if lookup.counted and samples > 1 else [Along(d) for d in dims_of_size(shape, samples, None)]
    if len(shape) > 1:
        chosen = set(dims_of_size(shape, samples, batch_dim))
        wanted = [along for along in own if along.dim in chosen]
        # What the user said is about the inputs; what the model makes itself may lie in another way.
        own = wanted or own if lookup.given else [*wanted, *(along for along in own if along not in wanted)]
    spread = [Along(d, shared=True) for d, size in enumerate(shape) if size == 1 and samples > 1]
    return (*own, *(spread or [Along(0, shared=True, new=True)]))


def likely_readings(lookup: Indices, samples: int, batch_dim: int | None) -> tuple[Along, ...]:
    """The same without what is hardly ever meant: that all samples share what has a dimension of their number."""
    options = possible_readings(lookup, samples, batch_dim)
    own = [along for along in options if along.along_samples]
    return tuple(own) if len(own) == 1 and 1 not in lookup.shape else options


@contextmanager
def lookups_marked(
    twin: nn.Module,
    alongs: Mapping[Place, Along],
    samples: int,
    word: np.ndarray | None,
    origins: Mapping[Place, list[Origin]],
) -> Iterator[None]:
    """Spread lookups that samples share, and make NaN what belongs to the samples of a word."""
    handles = []
    for place, along in alongs.items():
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
