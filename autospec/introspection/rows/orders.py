"""Whether rows will lie in the same order at the next pass, whatever whole numbers the batch holds, generators draw or training does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..arguments import as_array, content_of, of_packing, whole_numbers
from ..copies import moves_on
from ..errors import WatchError
from .lookups import Place
from .probe import Probe

# From so many samples on one pass shows whether the model shuffles them.
MANY_SAMPLES = 12
# As many others at most a sample is mixed with: one by the order, and one by the order the other way round.
MIXED_WITH = 2
# So many samples are followed by themselves, and such a part of the rows that share a statistic has to show it.
FOLLOWED, SHOWN = 5, 0.4


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


def by_content(probe: Probe, words: np.ndarray, found: Mapping[Place, list[np.ndarray]]) -> tuple[int, ...]:
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
            return all(same_rows(found, probe.given(each, samples).rows(words)) for each in others)
        except WatchError:  # not all numbers fit each model
            return False

    told = [i for i, alike in enumerate(same) if not alike or samples == 1]
    # All of them at once, and, where rows move, each of them.
    go_by = [] if not told or lasting(told) else [i for i in told if len(told) == 1 or not lasting([i])] or told
    return tuple(sorted({*go_by, *(itertools.compress(range(len(numbers)), same) if samples > 1 else ())}))


def refuse_what_moves_on(probe: Probe, words: np.ndarray, found: Mapping[Place, list[np.ndarray]]) -> None:
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


def refuse_mixing_in_training(
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


def alike(calls: Sequence[np.ndarray]) -> bool:
    """Whether the rows of several calls lie in one order."""
    return all(np.array_equal(call, calls[0]) for call in calls)


def same_rows(first: Mapping[Place, list[np.ndarray]], second: Mapping[Place, list[np.ndarray]]) -> bool:
    """Whether two readings give every row to the same sample, as in a batch of one."""
    return {key: len(calls) for key, calls in first.items()} == {
        key: len(calls) for key, calls in second.items()
    } and all(np.array_equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True))
