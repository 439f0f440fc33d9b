"""Which rows of a layer's input belong to which sample: established by a probe, never assumed.

A copy of the model in evaluation mode runs a few times with some samples made NaN.  Each sample has a code
word, the passes in which it is NaN; where the rows of a layer's input turn NaN tells whose rows they are.
All code words have the same number of ones, so the union of two of them is no code word, and a row that
mixes samples is recognised instead of being given to a third one.  Sperner's theorem makes this cheap: about
log2(samples) + 2 passes.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import WatchError
from .layers import rule_for

MAX_HYPOTHESES = 64


@dataclass(frozen=True)
class RowMap:
    """The result of a probe.

    Attributes
    ----------
    samples : dict of (str, str) to list of ndarray
        For each watched (module, parameter): at its first, second, ... use in one forward pass, the sample of each row.
    passes : int
        Forward passes that the probe took.
    batch_dims : tuple of int
        The dimension of each of the model's floating-point inputs that indexes samples.
    """

    samples: dict[tuple[str, str], list[np.ndarray]]
    passes: int
    batch_dims: tuple[int, ...]


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
    watched: Collection[tuple[str, str]],
    batch_dim: int | None = None,
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

    Returns
    -------
    RowMap

    Raises
    ------
    WatchError
        If no input has a dimension of that size, or the rows cannot be told apart, or more than one reading
        of the inputs is possible.
    """
    inputs = [t for t in _tensors((args, kwargs)) if t.is_floating_point()]
    choices = [_candidate_dims(t, samples, batch_dim) for t in inputs]
    if not any(dims != (None,) for dims in choices):
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs) or "no floating-point input"
        where = "of size" if batch_dim is None else f"{batch_dim} of size"
        raise WatchError(
            f"groups has {samples} labels, but no input of the model has a dimension {where} {samples} "
            f"(inputs: {shapes}): give one label for each sample of the batch, in the batch's order."
        )
    # An input may have a dimension of that size by chance, such as one position encoding a time point.
    if batch_dim is None and any(len(dims) > 1 for dims in choices):
        choices = [dims if dims == (None,) else (*dims, None) for dims in choices]
    if batch_dim is not None:
        for position in [i for i, dims in enumerate(choices) if dims != (None,)][1:]:
            choices[position] = (*choices[position], None)
    if math.prod(len(dims) for dims in choices) > MAX_HYPOTHESES:
        raise WatchError("too many dimensions of the inputs could index samples: say which with batch_dim=.")
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise WatchError(
            f"the model cannot be copied to find which rows belong to which sample ({error}): give rows=."
        ) from error
    twin.eval()
    with torch.no_grad():
        for tensor in itertools.chain(twin.parameters(), twin.buffers()):
            tensor.copy_(_finite(tensor))  # a diverged model's rows can be traced all the same
    words = code_words(samples)
    accepted: list[tuple[tuple[int | None, ...], dict[tuple[str, str], list[np.ndarray]]]] = []
    reason = ""
    with _generators_kept(inputs), torch.no_grad():
        _refuse_functional_uses(twin, args, kwargs, watched)
        for dims in itertools.product(*choices):
            if all(dim is None for dim in dims):
                continue
            try:
                found = _probe(twin, args, kwargs, inputs, dims, words, watched)
                accepted.append((dims, found))
            except WatchError as error:
                reason = reason or str(error)
                continue
            if batch_dim is not None:
                break
    if not accepted:
        raise WatchError(f"{reason} Say where the samples are with batch_dim= or rows=.")
    if any(not _same(found, accepted[0][1]) for _, found in accepted):
        readings = " or ".join(str(tuple(d for d in dims if d is not None)) for dims, _ in accepted)
        raise WatchError(
            f"the samples could lie along more than one dimension of the model's inputs ({readings}): "
            "say which with batch_dim=."
        )
    dims, found = accepted[0]
    return RowMap(found, len(words), tuple(dim for dim in dims if dim is not None))


def _candidate_dims(tensor: Tensor, samples: int, batch_dim: int | None) -> tuple[int | None, ...]:
    dims: tuple[int | None, ...] = tuple(d for d, size in enumerate(tensor.shape) if size == samples)
    if batch_dim is not None:
        wanted = batch_dim % tensor.ndim if tensor.ndim and -tensor.ndim <= batch_dim < tensor.ndim else None
        dims = tuple(d for d in dims if d == wanted)
    return dims or (None,)


def _probe(
    twin: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: Sequence[Tensor],
    dims: tuple[int | None, ...],
    words: np.ndarray,
    watched: Collection[tuple[str, str]],
) -> dict[tuple[str, str], list[np.ndarray]]:
    """Run one reading of the inputs; raise WatchError if a row is not one sample's."""
    passes: list[dict[tuple[str, str], list[np.ndarray]]] = []
    for word in words:
        marked: dict[int, Tensor] = {}
        for tensor, dim in zip(inputs, dims, strict=True):
            if dim is not None:
                chosen = torch.from_numpy(np.flatnonzero(word)).to(tensor.device)
                marked[id(tensor)] = _finite(tensor.detach()).index_fill_(dim, chosen, math.nan)
            else:
                marked[id(tensor)] = _finite(tensor.detach())
        with _nan_rows(twin, watched) as seen:
            try:
                twin(*_replaced(args, marked), **_replaced(kwargs, marked))
            except Exception as error:
                raise WatchError(
                    f"the model failed on a batch in which some samples are NaN ({type(error).__name__}: {error}), "
                    "so the rows of its layers could not be traced to samples."
                ) from error
        passes.append(seen)
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for key, calls in passes[0].items():
        found[key] = []
        for call in range(len(calls)):
            samples = decode(np.stack([seen[key][call] for seen in passes]), words)
            if (samples == -2).any():
                raise WatchError(f"Rows of the input of '{key[0] or key[1]}' mix several samples.")
            if (samples == -1).any():
                raise WatchError(f"Rows of the input of '{key[0] or key[1]}' belong to no sample.")
            found[key].append(samples)
    return found


@contextmanager
def _nan_rows(
    twin: nn.Module, watched: Collection[tuple[str, str]]
) -> Iterator[dict[tuple[str, str], list[np.ndarray]]]:
    """Collect, for each use of each watched parameter, which rows of the activation hold a NaN."""
    seen: dict[tuple[str, str], list[np.ndarray]] = {}
    handles = []
    for name, module in twin.named_modules():
        rule = rule_for(module)
        if rule is None:
            continue

        def on_use(parameter: str, activation: Tensor, _: Tensor, name: str = name) -> None:
            if (name, parameter) not in watched:
                return
            rows = activation.reshape(-1, activation.shape[-1])
            seen.setdefault((name, parameter), []).append(rows.isnan().any(1).cpu().numpy())

        handles += rule.attach(module, on_use)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _FunctionalUses(TorchFunctionMode):
    """Notices a watched matrix that meets other data outside its layer, as in ``x @ layer.weight``."""

    def __init__(self, twin: nn.Module, watched: Collection[tuple[str, str]]) -> None:
        super().__init__()
        modules = dict(twin.named_modules())
        self.names = {id(getattr(modules[name], key)): f"{name}.{key}" if name else key for name, key in watched}
        self.views: list[Tensor] = []
        self.inside = 0
        self.found: tuple[str, str] | None = None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside:
            return result
        tensors = list(_tensors((args, kwargs or {})))
        watched = [t for t in tensors if id(t) in self.names]
        if not watched:
            return result
        name = self.names[id(watched[0])]
        others = [t for t in tensors if id(t) not in self.names and not isinstance(t, nn.Parameter) and t.ndim]
        if others and self.found is None:
            self.found = (name, getattr(func, "__name__", str(func)))
        elif isinstance(result, Tensor) and result._is_view() and not others:
            self.names[id(result)] = name
            self.views.append(result)  # an identity is only unique while its object lives
        return result


def _refuse_functional_uses(
    twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watched: Collection[tuple[str, str]]
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
        with mode:
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
def _generators_kept(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Put every random number generator back as it was."""
    devices = sorted({t.device.index or 0 for t in inputs if t.is_cuda})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _finite(tensor: Tensor) -> Tensor:
    """Copy with zeros where it was not finite: NaN must mean a marked sample and nothing else."""
    return torch.where(torch.isfinite(tensor), tensor, 0) if tensor.is_floating_point() else tensor.clone()


def _same(
    first: Mapping[tuple[str, str], list[np.ndarray]], second: Mapping[tuple[str, str], list[np.ndarray]]
) -> bool:
    """Whether two readings give every row to the same sample, as in a batch of one."""
    return all(np.array_equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _replaced(value: Any, marked: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return marked.get(id(value), value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, marked) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(item, marked) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, marked) for item in value)
    return value
