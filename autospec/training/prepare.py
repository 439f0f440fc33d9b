"""Samples, labels and the network of one training, made in the same way for everyone who needs them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from autospec.datasets.intracranial import adjust
from autospec.datasets.labelled import covariates_of, group_labels, open_labelled, subjects_of
from autospec.datasets.split import held_out_rows
from autospec.errors import UserError
from autospec.introspection.generators import seed_random_numbers
from autospec.introspection.groups import Groups
from autospec.models import build_model

from .device import free_memory, out_of_memory
from .settings import RunSettings


@dataclass(frozen=True)
class Rows:
    """Some samples.

    Attributes
    ----------
    x : Tensor, shape (samples, *sample)
        What the network sees.
    target : Tensor of int64, shape (samples,)
        Number of each sample's class.
    answer : Tensor
        What the network should return: ``x`` or ``target``.
    ids, subjects : tuple of str
        Identifier and subject of each sample.
    """

    x: Tensor
    target: Tensor
    answer: Tensor
    ids: tuple[str, ...]
    subjects: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prepared:
    """Everything that a training begins with.

    Attributes
    ----------
    settings : RunSettings
        The run's settings.
    training, held_out : Rows
        Samples to train on, and those kept from it, which may be none.
    classes : tuple of str
        Labels of the target, in the order of their numbers.
    labels : dict of str to list
        For each grouping, the label of each training sample or None; the target's is called ``target`` where the
        settings name no grouping.
    crossed : list of (str, str)
        Groupings to cross.
    model : nn.Module
        The network with its initial weights, on the device.
    criterion : callable
        The loss of (prediction, answer), a mean over samples.
    device : torch.device
        Where the network is.  Samples that do not fit there stay in the computer's memory.
    data : str
        Digest of the data set's file.
    attributes : dict
        The data set's attributes.
    """

    settings: RunSettings
    training: Rows
    held_out: Rows
    classes: tuple[str, ...]
    labels: dict[str, list[str | None]]
    crossed: list[tuple[str, str]]
    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    device: torch.device
    data: str
    attributes: dict[str, Any]

    @property
    def x(self) -> Tensor:
        """The training samples."""
        return self.training.x

    @property
    def target(self) -> Tensor:
        """Their classes' numbers."""
        return self.training.target

    @property
    def answer(self) -> Tensor:
        """What the network should return for them."""
        return self.training.answer

    @property
    def group_sizes(self) -> dict[str, int]:
        """Training samples of each group, by the names that `autospec.watch` gives the groups."""
        groups = Groups(self.groups(), self.crossed)
        return dict(zip(groups.names, groups.assign(self.groups()).sizes.tolist(), strict=True))

    def groups(self, rows: Sequence[int] | None = None) -> list[str | None] | dict[str, list[str | None]]:
        """Labels as `autospec.watch` takes them: bare for one grouping alone; of some training samples, or of all."""
        chosen = {
            name: labels if rows is None else [labels[row] for row in rows] for name, labels in self.labels.items()
        }
        return next(iter(chosen.values())) if len(chosen) == 1 and not self.crossed else dict(chosen)

    def with_initial_weights(self) -> Prepared:
        """Return the same with the network built anew, and random numbers seeded as for the first."""
        return replace(self, model=_network(self.settings, self.training.x.shape[1:], self.classes, self.device))


def prepare(settings: RunSettings, dataset: str, device: torch.device) -> Prepared:
    """Read a data set, split it, and build the network; torch's, Python's and numpy's random numbers are seeded for training.

    Parameters
    ----------
    settings : RunSettings
        The run's settings.
    dataset : str
        The labelled data set.
    device : torch.device
        Where to train.

    Returns
    -------
    Prepared

    Raises
    ------
    UserError
        If a grouping is not there, there are more groups than samples, a classifier has one class alone, values are not
        finite, or nobody can be held out.
    """
    samples = open_labelled(dataset)
    data = hashlib.sha256(Path(dataset).read_bytes()).hexdigest()[:16]
    target = [str(label) for label in samples["target"].values]
    classes = tuple(sorted(set(target)))
    if settings["task"] == "classifier" and len(classes) < 2:
        raise UserError(
            f"{settings['name']} is a classifier, but every sample of {dataset} is '{classes[0]}': give it data with two "
            "classes, or make the run an autoencoder."
        )
    ids, subjects = [str(name) for name in samples["id"].values], subjects_of(samples)
    training = settings["training"]
    held_out = held_out_rows(subjects, target, training["held_out"], training["split_seed"])
    labels, crossed = groupings_of(samples, settings["groupings"])
    labels = {name: [column[row] for row in np.flatnonzero(~held_out)] for name, column in labels.items()}
    _require_fewer_groups(labels, crossed, int((~held_out).sum()), settings["name"])
    x = samples["x"].values
    if not np.isfinite(x).all():
        bad = ids[int(np.argmax(~np.isfinite(x).reshape(len(x), -1).all(1)))]
        raise UserError(f"{dataset} holds values that are not finite, first in '{bad}': correct the data set.")
    if samples.attrs.get("kind") == "freesurfer":
        x = standardised(_without_heads(samples, x, ~held_out), ~held_out)
    numbers = torch.tensor([classes.index(label) for label in target])

    def rows(chosen: np.ndarray) -> Rows:
        inputs = _placed(torch.from_numpy(x[chosen]), device)
        numbered = numbers[torch.from_numpy(chosen)].to(device)
        return Rows(
            inputs,
            numbered,
            inputs if settings["task"] == "autoencoder" else numbered,
            tuple(itertools.compress(ids, chosen)),
            tuple(itertools.compress(subjects, chosen)),
        )

    return Prepared(
        settings=settings,
        training=rows(~held_out),
        held_out=rows(held_out),
        classes=classes,
        labels=labels,
        crossed=crossed,
        model=_network(settings, x.shape[1:], classes, device),
        criterion=nn.functional.mse_loss if settings["task"] == "autoencoder" else nn.functional.cross_entropy,
        device=device,
        data=data,
        attributes=dict(samples.attrs),
    )


def groupings_of(
    samples: xr.Dataset, wanted: Sequence[str]
) -> tuple[dict[str, list[str | None]], list[tuple[str, str]]]:
    """Labels of each grouping, and which groupings to cross.

    Parameters
    ----------
    samples : xarray.Dataset
        A labelled data set.
    wanted : sequence of str
        Columns, and crossings written ``a x b``; none stands for the target.  ``diagnosis`` is the target where there
        is no such column.

    Returns
    -------
    labels : dict of str to list
        One label a sample, None where it is not known.
    crossed : list of (str, str)
    """
    crossed = [(first, second) for first, sign, second in (name.partition(" x ") for name in wanted) if sign]
    names = dict.fromkeys(part for name in wanted for part in name.split(" x "))

    def column(name: str | None) -> list[str | None]:
        targets = name == "diagnosis" and "grouping_diagnosis" not in samples
        return group_labels(samples, None if targets else name)

    return {name: column(name) for name in names} or {"target": column(None)}, crossed


def _without_heads(samples: xr.Dataset, x: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Volumes less what a line, fitted to the training samples, predicts from the size of the head, where that is wanted.

    The data set's own line was fitted to everybody.  Residuals are linear in the volumes, so the second line takes away
    exactly what the first took too much or too little, up to a constant and the scale, which are fitted next.
    """
    if samples.attrs.get("icv") != "residual":
        return x
    heads = covariates_of(samples)["intracranial_volume"]
    return adjust(x.astype(np.float64), heads, "residual", training)


def standardised(x: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Scale each feature to mean 0 and standard deviation 1 over the training samples.

    Parameters
    ----------
    x : ndarray, shape (samples, ...)
        All samples.
    training : ndarray of bool, shape (samples,)
        Those that count.

    Returns
    -------
    ndarray of float32
        Features that do not vary over the training samples become 0 there.
    """
    exact = x.astype(np.float64)
    mean, deviation = exact[training].mean(0), exact[training].std(0)
    # Rounding of the mean leaves a constant feature with a deviation that is not quite zero.
    constant = deviation <= 1e-12 * np.abs(mean)
    return ((exact - mean) / np.where(constant, 1.0, deviation)).astype(np.float32)


def _require_fewer_groups(
    labels: dict[str, list[str | None]], crossed: list[tuple[str, str]], count: int, name: str
) -> None:
    columns: list[set[Any]] = [set(column) - {None} for column in labels.values()]
    columns += [{pair for pair in zip(labels[a], labels[b], strict=True) if None not in pair} for a, b in crossed]
    groups = sum(map(len, columns))
    if groups > count:
        raise UserError(f"{name} has {groups} groups, but only {count} samples to train on: choose fewer groupings.")


def _network(settings: RunSettings, shape: Sequence[int], classes: Sequence[str], device: torch.device) -> nn.Module:
    seed_random_numbers(settings["training"]["seed"])
    return build_model(
        settings["model"], settings["task"], tuple(shape), len(classes), settings["hidden"], settings["activation"]
    ).to(device)


def _placed(x: Tensor, device: torch.device) -> Tensor:
    """Samples on the device, or where they are if it has no room for them."""
    try:
        return x.to(device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    free_memory(device)
    return x
