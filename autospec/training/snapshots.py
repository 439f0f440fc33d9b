"""The weights of a run at some of its updates: which, written as one file, and opened again."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autospec.errors import UserError
from autospec.storage import written_whole

from .device import chosen_device
from .prepare import Prepared, prepare
from .settings import RunSettings

FORMAT = 2


def growing_updates(count: int, updates: int) -> list[int]:
    """Updates that lie ever further apart: every one at the start, then a constant share of what has passed.

    They do not depend on where training ends, so a training that is continued has kept the right ones.

    Parameters
    ----------
    count : int
        The larger, the denser: about so many below four times as many updates.
    updates : int
        The number of updates.
    """
    found, update = [], 0
    while update < updates:
        found.append(update)
        update += max(1, 4 * update // count)
    return found


def kept_updates(snapshots: int | Sequence[int], updates: int) -> list[int]:
    """Updates before which weights are put aside while training goes on, among which `snapshot_updates` chooses."""
    if not isinstance(snapshots, int):
        return sorted({update for update in snapshots if update < updates})
    # Of a short training all are kept, since those that lie ever further apart would be fewer than wanted.
    return sorted(
        {*growing_updates(snapshots, updates), updates - 1, *range(updates if updates <= 4 * snapshots else 0)}
    )


def snapshot_updates(snapshots: int | Sequence[int], updates: int) -> list[int]:
    """Updates before which a run's weights are kept.

    Parameters
    ----------
    snapshots : int or sequence of int
        How many, or which of them.
    updates : int
        Updates of the training, counted from 0.

    Returns
    -------
    list of int
        Ascending.  Of a number: from 0 to the last update, dense at the start; a single one is the last.

    Raises
    ------
    UserError
        If none of a list comes before the training's end.
    """
    kept = kept_updates(snapshots, updates)
    if not kept:
        raise UserError(
            f"training.snapshots begins at {min(snapshots, default=0) if not isinstance(snapshots, int) else 0}, but the "
            f"{updates} updates are numbered from 0: name an earlier one."
        )
    if not isinstance(snapshots, int) or len(kept) <= snapshots:
        return kept
    if snapshots == 1:
        return kept[-1:]
    return [kept[int(place)] for place in np.linspace(0, len(kept) - 1, snapshots).round()]


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copy a network's weights and buffers to the computer's memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def save(content: Any, path: str | os.PathLike[str], durable: bool = False) -> None:
    """Write tensors in dicts and lists to a file, whole or not at all; equal content gives equal bytes.

    Parameters
    ----------
    content : dict
        Of tensors, numbers, text, lists and dicts, as ``torch.load(weights_only=True)`` reads them.
    path : path-like
        The file.
    durable : bool
        Wait until it is on the disk.

    Raises
    ------
    OSError
        If the disk is full, say; a file that was there before stays.
    """
    buffer = io.BytesIO()  # torch.save writing to a file hides the reason why it cannot
    torch.save(_canonical(content), buffer)
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        if durable:
            file.flush()
            os.fsync(file.fileno())


def load(path: str | os.PathLike[str]) -> Any:
    """Read what `save` has written; raises UserError if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that holds something else the unpickler raises what it stumbles over
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0].removesuffix(".")
        raise UserError(f"{path} cannot be read ({reason}): make it again.") from error


def _canonical(content: Any) -> Any:
    """Equal content as equal objects: pickle writes text that it has met before, the same object, as a reference."""
    if isinstance(content, str):
        return sys.intern(content)
    if isinstance(content, Mapping):
        return {_canonical(key): _canonical(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_canonical(value) for value in content]
    if isinstance(content, Tensor):
        return content.detach().cpu().contiguous().clone()
    return content


@dataclass(frozen=True)
class Snapshots:
    """Weights of a run at some of its updates.

    Attributes
    ----------
    settings : RunSettings
        The run's settings.
    data : str
        Digest of the data set that it was trained on.
    held_out : tuple of str
        Identifiers of the samples that were kept from training.
    """

    settings: RunSettings
    data: str
    held_out: tuple[str, ...]
    _updates: dict[int, dict[str, Tensor]]
    _final: dict[str, Tensor]
    _random: dict[int, dict[str, Any]]

    @property
    def steps(self) -> tuple[int, ...]:
        """The updates before which weights were kept, ascending."""
        return tuple(self._updates)

    def weights(self, step: int | None = None) -> dict[str, Tensor]:
        """Weights before an update, or the final ones."""
        if step is None:
            return self._final
        if step not in self._updates:
            raise UserError(f"no weights were kept before update {step}: choose one of {list(self.steps)}.")
        return self._updates[step]

    def random_state(self, step: int) -> dict[str, Any] | None:
        """State of random numbers before an update, kept for a user's own network alone."""
        return self._random.get(step)

    def rebuild(self, dataset: str, step: int | None = None, device: str = "cpu") -> Prepared:
        """Return what the training began with, and the network with the weights of an update, or the final ones.

        Parameters
        ----------
        dataset : str
            The data set that the run was trained on.
        step : int, optional
            One of `steps`.
        device : str
            Where to put the network and the samples.

        Raises
        ------
        UserError
            If the data set is another one.
        """
        prepared = prepare(self.settings, dataset, chosen_device(device))
        if prepared.data != self.data:
            raise UserError(f"{dataset} is not what {self.settings['name']} was trained on: train it again.")
        prepared.model.load_state_dict(self.weights(step))
        return prepared


def write_snapshots(
    path: str | os.PathLike[str],
    prepared: Prepared,
    updates: Mapping[int, Mapping[str, Tensor]],
    random: Mapping[int, dict[str, Any]],
) -> None:
    """Write the weights of a run.

    Parameters
    ----------
    path : path-like
        The file; it appears whole or not at all.
    prepared : Prepared
        What was trained; its network has the final weights.
    updates : mapping of int to state dict
        Weights before some updates.
    random : mapping of int to dict
        State of random numbers before them, as `autospec.introspection.generators.random_state` returns it, where a network may draw any.
    """
    content = {
        "format": FORMAT,
        "updates": {step: updates[step] for step in sorted(updates)},
        "final": weights_of(prepared.model),
        "spec": prepared.settings,
        "data": prepared.data,
        "held_out": list(prepared.held_out.ids),
        "rng": {step: random[step] for step in sorted(random)},
    }
    save(content, path)


def open_snapshots(path: str | os.PathLike[str]) -> Snapshots:
    """Open the weights that a training has kept.

    Parameters
    ----------
    path : path-like
        A file ``.weights.pt``.

    Raises
    ------
    UserError
        If there is none, or it is something else.
    """
    if not Path(path).exists():
        raise UserError(f"there are no weights at {path}: check the name.")
    content = load(path)
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} holds no weights that autospec train wrote: give such a file.")
    if content["format"] != FORMAT:
        raise UserError(f"{path} was written by another version of autospec: train that network again.")
    return Snapshots(
        settings=content["spec"],
        data=content["data"],
        held_out=tuple(content["held_out"]),
        _updates=content["updates"],
        _final=content["final"],
        _random=content["rng"],
    )
