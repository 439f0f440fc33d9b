"""The training loop, watched: full batch, Adam, spectra of every layer by group."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import nn

from autospec.datasets.labelled import group_labels, open_labelled
from autospec.errors import UserError
from autospec.models import build_model
from autospec.storage import pack
from autospec.trajectories import add_training_curves
from autospec.watching import watch

SECONDS_BETWEEN_LINES = 5.0


class TrainingSettings(TypedDict):
    """What the loop reads from the configuration."""

    epochs: int
    learning_rate: float
    seed: int


class RunSettings(TypedDict):
    """What the stage reads from the configuration."""

    name: str
    model: str
    task: str
    hidden: list[int]
    activation: str
    groupings: list[str]
    training: TrainingSettings
    introspection: dict[str, Any]


def train_run(settings: RunSettings, code: str, dataset: str, output: str, work: str, device: str = "auto") -> str:
    """Train one network and pack its trajectories.

    Parameters
    ----------
    settings : RunSettings
        The run's settings.
    code : str
        Fingerprint of the code, recorded with the results.
    dataset : str
        The labelled data set.
    output : str
        The ``.zarr.zip`` file to write; it appears whole or not at all.
    work : str
        Folder below which the trajectories grow meanwhile, in ``<run>/<digest of all that decides the result>``.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``mps``: where to train, not part of the settings.

    Returns
    -------
    str
        One line that says how the training ended.

    Raises
    ------
    UserError
        If the loss stops being finite, a group has no member, or the device does not exist.
    """
    samples = open_labelled(dataset)
    digest = hashlib.sha256(Path(dataset).read_bytes()).hexdigest()[:16]
    place = chosen_device(device)
    labels = group_labels(samples, settings["groupings"][0] if settings["groupings"] else None)
    classes = sorted(set(map(str, samples["target"].values)))
    x = torch.from_numpy(samples["x"].values).to(place)
    target = torch.tensor([classes.index(str(label)) for label in samples["target"].values], device=place)

    torch.manual_seed(settings["training"]["seed"])
    model = build_model(
        settings["model"], settings["task"], x.shape[1:], len(classes), settings["hidden"], settings["activation"]
    ).to(place)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["training"]["learning_rate"])
    criterion: Callable[..., torch.Tensor]
    criterion, answer = (
        (nn.functional.mse_loss, x) if settings["task"] == "autoencoder" else (nn.functional.cross_entropy, target)
    )

    identity = json.dumps([settings, code, digest], sort_keys=True)
    folder = Path(work) / settings["name"] / hashlib.sha256(identity.encode()).hexdigest()[:16]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    epochs = settings["training"]["epochs"]
    curves = {"loss": np.full(epochs, np.nan)}
    if settings["task"] == "classifier":
        curves["accuracy"] = np.full(epochs, np.nan)
    store = folder / "trajectories.zarr"
    attributes = {
        "settings": settings,
        "seed": settings["training"]["seed"],
        "device": place.type,
        "code": code,
        "data": digest,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "dataset": dict(samples.attrs),
    }
    choices = settings["introspection"]
    progress = Progress(settings["name"], epochs)
    with watch(
        model,
        labels,
        statistics=choices["statistics"],
        every=choices["every"] if choices["steps"] is None else 1,
        steps=choices["steps"],
        layers=choices["layers"],
        singular_values=choices["singular_values"],
        audit=choices["audit"],
        attributes=attributes,
        store=store,
    ) as watcher:
        for epoch in range(epochs):
            optimizer.zero_grad()
            prediction = model(x)
            loss = criterion(prediction, answer)
            loss.backward()
            watcher.step()
            optimizer.step()
            curves["loss"][epoch] = loss.item()
            if "accuracy" in curves:
                curves["accuracy"][epoch] = (prediction.argmax(1) == target).float().mean().item()
            if not np.isfinite(curves["loss"][epoch]):
                raise UserError(
                    f"{settings['name']}: the loss is no longer finite at update {epoch}: lower learning_rate "
                    f"({settings['training']['learning_rate']}); what was recorded until then is in {store}."
                )
            progress.show(epoch, curves["loss"][epoch])
    add_training_curves(store, curves)
    pack(store, output)
    shutil.rmtree(folder)
    sizes = ", ".join(f"{label}: {count}" for label, count in sorted(Counter(labels).items()))
    return f"{settings['name']}: {epochs} updates, final loss {curves['loss'][-1]:.4g}, samples by group {sizes}"


def chosen_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises
    ------
    UserError
        If the device is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name, False):
        there = [kind for kind, yes in available.items() if yes]
        raise UserError(f"the device '{name}' is not available here: choose one of {['auto', *there]}.")
    return torch.device(name)


class Progress:
    """Lines that say how far a training is, a few seconds apart.

    Parameters
    ----------
    name : str
        The run.
    total : int
        Updates to make.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.started = self.last = time.monotonic()

    def show(self, done: int, loss: float) -> None:
        """Print a line if the last one is long enough ago."""
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and done + 1 < self.total:
            return
        self.last = now
        left = (now - self.started) / (done + 1) * (self.total - done - 1)
        print(
            f"{self.name}: update {done + 1} of {self.total}, loss {loss:.4g}, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def host() -> dict[str, Any]:
    """Where a training ran: for the file beside the results, since it would change their bytes."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"host": platform.node(), "processor": platform.machine(), "cores": os.cpu_count(), "cuda_device": cuda}
