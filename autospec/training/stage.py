"""The stage that trains one network, watched, and goes on where it was stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from autospec.custom_model import is_path
from autospec.errors import UserError
from autospec.introspection import Watcher
from autospec.introspection.generators import random_state
from autospec.storage import pack
from autospec.trajectories import TrajectoryStore, add_attributes, add_training_curves

from .checkpoints import Checkpoints, Frequency
from .device import chosen_device, deterministic, environment, host, out_of_memory
from .loop import Trainer
from .prepare import Prepared, prepare
from .progress import Clock, Progress
from .settings import RunSettings
from .snapshots import growing_updates, kept_updates, snapshot_updates, weights_of, write_snapshots

# The updates before which held-out samples are looked at are as dense as so many snapshots.
EVALUATIONS = 20


class Trained(NamedTuple):
    """How a training ended.

    Attributes
    ----------
    message : str
        One line for people.
    record : dict
        Times, host and device: for the file beside the results, whose own bytes hold none of it.
    """

    message: str
    record: dict[str, Any]


def train_run(
    settings: RunSettings,
    code: str,
    dataset: str,
    output: str,
    work: str,
    device: str = "auto",
    weights: str | None = None,
    frequency: Frequency | None = None,
) -> Trained:
    """Train one network, pack its trajectories, and keep its weights at some updates.

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
        Folder below which the trajectories grow meanwhile, in ``<run>/<digest of all that decides the result>``, with the
        checkpoint beside them.  They stay there, so that more epochs go on from the last ones.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``mps``: where to train, not part of the settings.
    weights : str, optional
        The ``.weights.pt`` file to write; it appears whole or not at all.
    frequency : Frequency, optional
        How often checkpoints are written: every two minutes by default.

    Returns
    -------
    Trained

    Raises
    ------
    UserError
        If the loss stops being finite, memory or the disk does not suffice, the device does not exist, or the settings do
        not fit the samples.
    """
    began = time.perf_counter()
    place = chosen_device(device)
    name = settings["name"]
    run = None
    with deterministic(place):
        try:
            run = _Run(prepare(settings, dataset, place), code, Path(work), frequency or Frequency())
            run.clock.add("start_up", time.perf_counter() - began)
            run.train()
            with run.clock.measure("input_output"):
                if weights is not None:
                    run.write_weights(weights)
                pack(run.store, output)
                run.forget_others()
        except OSError as error:
            if run is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(run.disk_is_full()) from error
        except (RuntimeError, MemoryError) as error:
            reason = str(error).split("\n", 1)[0].removesuffix(".")
            if out_of_memory(error):
                raise UserError(
                    f"{name} ran out of memory where smaller batches do not help ({reason or 'MemoryError'}): record fewer "
                    "layers or groups, use a smaller model, or a device with more memory."
                ) from error
            if "deterministic" in reason:
                raise UserError(
                    f"{name} uses an operation that gives another result each time on {place.type} ({reason}): train on "
                    "the cpu, or use other layers."
                ) from error
            raise
    return Trained(run.message(), run.record())


class _Run:
    """A training under way."""

    def __init__(self, prepared: Prepared, code: str, work: Path, frequency: Frequency) -> None:
        settings = prepared.settings
        self.prepared, self.name, self.clock = prepared, settings["name"], Clock()
        self.trainer = Trainer(prepared)
        self.batches = self.trainer.batches
        self.total = settings["training"]["epochs"] * self.batches.in_an_epoch
        wanted = settings["training"]["snapshots"]
        if not isinstance(wanted, int) and max(wanted) >= self.total:
            raise UserError(
                f"{self.name} has no update {max(wanted)}, which training.snapshots names: its {self.total} updates are numbered "
                "from 0, so name earlier ones."
            )
        self.snapshots = snapshot_updates(wanted, self.total)
        self.put_aside = set(kept_updates(wanted, self.total))
        self.evaluated = {*growing_updates(EVALUATIONS, self.total), self.total - 1}
        self.folder = work / self.name / _digest(settings, code, prepared.data)
        self.store = self.folder / "trajectories.zarr"
        self.checkpoints = Checkpoints(self.folder, frequency)
        self.done = self.saved = 0
        self.sessions = 1
        self.elsewhere: list[dict[str, Any]] = []
        self.environment = environment(prepared.device)
        self.update_seconds: list[float] = []
        self.step_seconds = 0.0
        self.curves = self._empty_curves()
        self.attributes = {
            "settings": settings,
            "seed": settings["training"]["seed"],
            "device": prepared.device.type,
            "code": code,
            "data": prepared.data,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "dataset": prepared.attributes,
            "training_samples": prepared.group_sizes,
        }

    # ------------------------------------------------------------------ training

    def train(self) -> None:
        """Train to the end, from the checkpoint if there is one, and complete the store."""
        state = self.checkpoints.read()
        if state is not None and state["updates"] > self.total:  # fewer epochs than before
            state = None
        if state is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        watcher = self._watcher(resume=state is not None)
        try:
            if state is not None:
                self._restore(state, watcher)
            with watcher:
                progress = Progress(self.name, self.total, self.done)
                while self.done < self.total:
                    loss = self._update(watcher)
                    progress.show(self.done - 1, f"loss {loss:.4g}")
                    if self.done < self.total and self.checkpoints.due(self.done):
                        self._save(watcher)
                self._require_finite(self.trainer.finite())
                if self.done > self.saved or state is None:
                    self._save(watcher)
        except _NotFiniteError as error:
            if self.store.exists():
                add_training_curves(self.store, self._shown_curves(self.done))
            raise UserError(str(error)) from None
        self.clock.seconds = self._seconds(watcher)
        with self.clock.measure("evaluation"):
            self.performance = self.trainer.performance()
        with self.clock.measure("input_output"):
            add_training_curves(self.store, self._shown_curves(self.total))
            add_attributes(self.store, self._final_attributes())

    def _update(self, watcher: Watcher) -> float:
        """Make one update; return its loss."""
        update = self.done
        if update in self.put_aside:
            random = random_state(self.prepared.device) if is_path(self.prepared.settings["model"]) else None
            self.checkpoints.put_aside(update, weights_of(self.prepared.model), random)
        if update in self.evaluated and len(self.prepared.held_out):
            with self.clock.measure("evaluation"):
                self._evaluate(update)
        began = time.perf_counter()
        with self.clock.measure("training"):
            outcome = self.trainer.gradient(update, watcher)
        with self.clock.measure("introspection"):
            watching = time.perf_counter()
            watcher.step()
            self.step_seconds += time.perf_counter() - watching
        with self.clock.measure("training"):
            self.trainer.step()
        self.update_seconds.append(time.perf_counter() - began)
        self.curves["loss"][update] = outcome.loss
        if "accuracy" in self.curves:
            self.curves["accuracy"][update] = outcome.right / outcome.samples
        else:
            self.curves["explained"][update] = self.trainer.explained(outcome.loss)
        self.done = update + 1
        self._require_finite(bool(np.isfinite(outcome.loss)), update)
        return outcome.loss

    def _evaluate(self, update: int) -> None:
        loss, right = self.trainer.evaluate(self.prepared.held_out)
        self.curves["held_out_loss"][update] = loss
        if "accuracy" in self.curves:
            self.curves["held_out_accuracy"][update] = right.mean()
        else:
            self.curves["held_out_explained"][update] = self.trainer.explained(loss, held_out=True)

    def _require_finite(self, finite: bool, update: int | None = None) -> None:
        if not finite:
            raise _NotFiniteError(
                f"{self.name}: the loss is no longer finite at update {self.total if update is None else update}: lower "
                f"learning_rate ({self.prepared.settings['training']['learning_rate']}); what was recorded until then is "
                f"in {self.store}."
            )

    def _watcher(self, resume: bool) -> Watcher:
        choices = self.prepared.settings["introspection"]
        watcher = Watcher(
            self.prepared.model,
            self.prepared.groups(),
            crossed=self.prepared.crossed,
            statistics=choices["statistics"],
            every=choices["every"] if choices["steps"] is None else 1,
            steps=choices["steps"],
            layers=choices["layers"],
            singular_values=choices["singular_values"],
            solver=choices["solver"],
            per_position=choices["per_position"],
            audit=choices["audit"],
            attributes=self.attributes,
        )
        watcher.write_to(_TimedStore(self.store, resume, self.clock))
        return watcher

    # ------------------------------------------------------------------ checkpoints

    def _save(self, watcher: Watcher) -> None:
        with self.clock.measure("input_output"):
            state = {
                "updates": self.done,
                "environment": self.environment,
                "elsewhere": self.elsewhere,
                "sessions": self.sessions,
                "trainer": self.trainer.state(),
                "watcher": watcher.state_dict(),
                "curves": {name: torch.from_numpy(values[: self.done]) for name, values in self.curves.items()},
                "seconds": self._seconds(watcher),
                "update_seconds": torch.tensor(self.update_seconds, dtype=torch.float32),
            }
            self.checkpoints.write(state)
        self.saved = self.done

    def _restore(self, state: dict[str, Any], watcher: Watcher) -> None:
        self.done = self.saved = state["updates"]
        self.checkpoints.forget_later(self.done)
        self.trainer.restore(state["trainer"])
        watcher.load_state_dict(state["watcher"])
        for name, values in state["curves"].items():
            self.curves[name][: self.done] = values.numpy()
        for kind, seconds in state["seconds"].items():
            self.clock.add(kind, seconds)
        self.update_seconds = state["update_seconds"].tolist()
        self.sessions = state["sessions"] + 1
        self.elsewhere = state["elsewhere"]
        print(f"{self.name}: going on from update {self.done} of {self.total}", file=sys.stderr, flush=True)
        if state["environment"] != self.environment:
            self.elsewhere = [
                *self.elsewhere,
                {"update": self.done, "before": state["environment"], "now": self.environment},
            ]
            print(
                f"{self.name}: it was begun on {_in_words(state['environment'])} and goes on on "
                f"{_in_words(self.environment)}: the results are equal to rounding, not to the last bit",
                file=sys.stderr,
                flush=True,
            )

    def forget_others(self) -> None:
        """Remove what earlier trainings of this run, with other settings, code or data, have left."""
        for other in self.folder.parent.iterdir():
            if other != self.folder and re.fullmatch("[0-9a-f]{16}", other.name):
                shutil.rmtree(other)

    # ------------------------------------------------------------------ results

    def write_weights(self, path: str) -> None:
        """Write the snapshots and the final weights."""
        there = self.checkpoints.all_put_aside()
        kept = {update: there[update] for update in self.snapshots}
        random = {update: each["random"] for update, each in kept.items() if each["random"] is not None}
        write_snapshots(path, self.prepared, {update: each["weights"] for update, each in kept.items()}, random)

    def _empty_curves(self) -> dict[str, np.ndarray]:
        measure = "explained" if self.prepared.settings["task"] == "autoencoder" else "accuracy"
        names = ["loss", measure]
        if len(self.prepared.held_out):
            names += ["held_out_loss", f"held_out_{measure}"]
        return {name: np.full(self.total, np.nan) for name in names}

    def _shown_curves(self, updates: int) -> dict[str, np.ndarray]:
        """Curves until an update; an end that the training had before it was given more epochs leaves no trace."""
        usual = np.isin(np.arange(updates), list(self.evaluated))
        return {
            name: np.where(usual, values[:updates], np.nan) if name.startswith("held_out") else values[:updates]
            for name, values in self.curves.items()
        }

    def _final_attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "performance": self.performance,
            "microbatch": [{"update": update, "samples": size} for update, size in self.trainer.microbatches],
        }
        return {**attributes, **({"elsewhere": self.elsewhere} if self.elsewhere else {})}

    def _seconds(self, watcher: Watcher) -> dict[str, float]:
        """Seconds by kind; hooks work inside the backward pass, so their time is taken out of the training's."""
        hooks = watcher.cost["watching_seconds"] - self.step_seconds
        seconds = dict(self.clock.seconds)
        seconds["training"] = seconds.get("training", 0.0) - hooks
        seconds["introspection"] = seconds.get("introspection", 0.0) + hooks
        return seconds

    def disk_is_full(self) -> str:
        """Say what to do when the disk is full."""
        return (
            f"{self.name}: the disk is full at update {self.done}, in {self.folder} or where results are written: make room "
            f"and start again; the training goes on from update {self.saved}."
        )

    def message(self) -> str:
        """Say in one line how the training ended."""
        counts = Counter(label for column in self.prepared.labels.values() for label in column if label is not None)
        sizes = ", ".join(f"{label}: {count}" for label, count in sorted(counts.items()))
        return f"{self.name}: {self.total} updates, final loss {self.curves['loss'][-1]:.4g}, samples by group {sizes}"

    def record(self) -> dict[str, Any]:
        """What the file beside the results says: where the time went, and on what machine."""
        low, median, high = np.quantile(self.update_seconds, [0.05, 0.5, 0.95])
        return {
            "seconds": {kind: round(seconds, 3) for kind, seconds in self.clock.seconds.items()},
            "seconds_per_update": {"median": float(median), "5 %": float(low), "95 %": float(high)},
            "seconds_of_each_update": [round(seconds, 6) for seconds in self.update_seconds],
            "updates": self.total,
            "sessions": self.sessions,
            **self.environment,
            **host(),
        }


class _NotFiniteError(Exception):
    """The loss, or a weight, is not finite any more."""


class _TimedStore(TrajectoryStore):
    """A store whose writing is timed."""

    def __init__(self, path: Path, resume: bool, clock: Clock) -> None:
        super().__init__(path, resume)
        self._clock = clock

    def append(self, tree: Any) -> None:
        with self._clock.measure("input_output"):
            super().append(tree)


def _digest(settings: RunSettings, code: str, data: str) -> str:
    """Digest of all that decides the weights after an update: not of how many updates there will be."""
    training = {name: value for name, value in settings["training"].items() if name != "epochs"}
    identity = json.dumps([{**settings, "training": training}, code, data], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _in_words(place: dict[str, Any]) -> str:
    return f"{place['device']} ({place['threads']} threads, {place['processor']})"
