"""What a model is called with: tensors, arrays and what holds them."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

T = TypeVar("T")

# Objects within objects that are looked into for what decides where rows lie.
DEEPEST = 3
# What objects hold as counters and the like, which change without a row moving.
COUNTERS = (int, float, bytes, type(None))
# What holds nothing else.
PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in arguments, in containers of any depth."""
    return instances_in(value, Tensor)


def instances_in(value: Any, kind: type[T] | tuple[type[T], ...], seen: set[int] | None = None) -> Iterator[T]:
    """Everything of a kind in arguments, in containers and objects of any depth.

    Parameters
    ----------
    value : object
        The arguments.
    kind : type, or tuple of types
        What is looked for.
    seen : set of int, optional
        Identities of objects that have been looked into: they may hold each other.
    """
    seen = set() if seen is None else seen
    if type(value) in PLAIN:
        return
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from instances_in(item, kind, seen)
    elif id(value) not in seen:
        held = attributes_of(value)
        seen.update([id(value)] if held else [])
        for item in held.values():
            yield from instances_in(item, kind, seen)


def attributes_of(value: Any) -> dict[str, Any]:
    """What a dataclass holds, or an object with tensors as attributes; nothing of what can be called, as modules can."""
    if callable(value) or isinstance(value, Tensor):
        return {}
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value) if hasattr(value, each.name)}
    held = getattr(value, "__dict__", {})
    return dict(held) if any(isinstance(item, Tensor) for item in held.values()) else {}


def with_attributes(value: Any, others: Mapping[int, Any], change: Callable[[Any, Mapping[int, Any]], Any]) -> Any:
    """Copy an object that has `attributes_of`, each of them changed; anything else stays as it is.

    Parameters
    ----------
    value : object
        The object.
    others : mapping of int to object
        What stands in place of others, by their identities.
    change : callable
        Returns an attribute changed, given ``others`` and the copy in place of the object, which it may hold.
    """
    held = attributes_of(value)
    if held and id(value) not in others:
        made = copy.copy(value)
        others = {**others, id(value): made}
        for name, item in held.items():
            object.__setattr__(made, name, change(item, others))  # also where it is frozen
    return others.get(id(value), value)


def replaced(value: Any, marked: Mapping[int, Tensor | np.ndarray]) -> Any:
    """The same arguments with other tensors or arrays in place of some, by their identities."""
    if isinstance(value, Tensor | np.ndarray):
        return marked.get(id(value), value)
    if isinstance(value, Mapping):
        return {key: replaced(item, marked) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(item, marked) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(replaced(item, marked) for item in value)
    return with_attributes(value, marked, replaced)


def as_array(value: Any) -> np.ndarray:
    """What a user gives of rows or positions, also as a tensor on another device."""
    return np.asarray(value.cpu() if isinstance(value, Tensor) else value)


def content_of(array: np.ndarray | np.generic) -> str | bytes:
    """What an array holds, to be compared with another of its shape."""
    return str(array.tolist()) if array.dtype.kind == "O" else array.tobytes()


def of_packing(value: Any) -> set[int]:
    """Identities of the tensors that say how sequences are packed, and so whose their rows are; no numbers of samples."""
    return {id(tensor) for each in instances_in(value, PackedSequence) for tensor in each[1:]}


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


def signature_of(value: Any, sorts: bool, samples: int, inside: tuple[int, ...] = (), numbers: bool = True) -> Any:
    """Shapes of all tensors in the arguments, and options: with the same ones the rows lie in the same order.

    Numbers of sequences by time step, as in a PackedSequence, belong to it, and what tables and objects hold that is no data; for
    numbers and names by sample see `RowMap.by_content`.

    Parameters
    ----------
    value : object
        The arguments, or a part of them.
    sorts : bool
        Whether the model may sort sequences by length, so that whole numbers along no dimension of samples decide.
    samples : int
        Samples in the batch.
    inside : tuple of int
        Identities of the objects in which the value lies.
    numbers : bool
        Whether plain whole numbers, and texts, count.

    Returns
    -------
    object
        To be compared, and hashed.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            return str(value.layout), len(value)
        sizes = sorts and value.ndim == 1 and len(value) != samples and not can_be_nan(value)
        return tuple(value.tolist()) if sizes and value.device.type == "cpu" else tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((key, signature_of(item, sorts, samples, inside, numbers)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(signature_of(item, sorts, samples, inside, numbers) for item in value)
    if isinstance(value, np.ndarray | np.generic):
        seen = value.ndim and not inside
        return value.shape if seen or value.dtype.kind in "fc" else (value.shape, content_of(value))
    if isinstance(value, enum.Enum):
        return type(value).__name__, value.name
    if isinstance(value, bool | int | str):
        return value if numbers or isinstance(value, bool) else type(value)
    if hasattr(type(value), "to_numpy"):  # a column of a table
        return signature_of(value.to_numpy(), sorts, samples, (*inside, id(value)), numbers)
    held = vars(value) if hasattr(value, "__dict__") and not callable(value) else {}
    if is_dataclass(value) and not isinstance(value, type):
        held = {each.name: getattr(value, each.name, None) for each in fields(value)}
    if id(value) in inside or len(inside) > DEEPEST:
        held = {}
    return type(value).__name__, *(
        (name, signature_of(item, sorts, samples, (*inside, id(value)), numbers))
        for name, item in held.items()
        if isinstance(item, bool | enum.Enum) or not isinstance(item, COUNTERS)
    )
