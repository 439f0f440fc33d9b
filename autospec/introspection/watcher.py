"""The watcher: hooks around a model that record spectra while the user's own loop trains it."""

from __future__ import annotations

import json
import sys
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
import xarray as xr
from torch import nn

from .arguments import as_array
from .audit import Audit
from .capture import Capture
from .distributed import Processes
from .errors import WatchError
from .gathering import Gathering
from .groups import Groups, listed
from .hooks import full_precision
from .measure import CONTRASTS, Measurement
from .parameters import find_parameters
from .schedule import Budget, Schedule, make_schedule
from .tree import LayerLayout, Record, build_tree
from .uses import WatchedLayer
from .workspace import keep_freed_memory

SPECTRA = ("gradient", "activation", "adjoint")
STATISTICS = (*SPECTRA, *CONTRASTS)
# Names of the root's attributes that are not the user's.
OWN_ATTRIBUTES = {"layers", "audit", "schedule"}
_DISTRIBUTED = nn.parallel.DistributedDataParallel
_watched_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Sink(Protocol):
    """Where finished records go: `autospec.trajectories` provides one that writes zarr."""

    steps_per_chunk: int

    def append(self, tree: xr.DataTree) -> None:
        """Take the records of some more steps."""
        ...

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` recorded steps."""
        ...

    def finish(self, attributes: dict[str, Any], complete: bool) -> None:
        """Take the final attributes; ``complete`` is False if the block ended in an exception."""
        ...

    def open(self) -> xr.DataTree:
        """Open what was written."""
        ...


class Watcher:
    """Record spectra of gradients, activations and adjoints while a model trains.

    See `autospec.watch` for the parameters.  Use it as a context manager around the training loop and call
    `step` once per parameter update, any time after the backward pass and before the next forward pass.

    Attributes
    ----------
    trajectories : xarray.DataTree
        What has been recorded so far.
    groups : tuple of str
        Names of the groups, ``all`` first.
    cost : dict
        Steps seen and recorded, and the seconds that went into the block and into watching.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Any = None,
        *,
        statistics: Sequence[str] = SPECTRA,
        every: int = 1,
        steps: Iterable[int] | Schedule | None = None,
        budget: float | None = None,
        layers: Sequence[str] | None = None,
        singular_values: int | Sequence[int] | str | None = None,
        solver: str = "exact",
        per_position: bool | str = False,
        activation: str = "channels",
        angles: int = 5,
        crossed: Sequence[Sequence[str]] = (),
        valid: Any = None,
        batch_dim: int | None = None,
        rows: Mapping[str, Any] | None = None,
        unknown: str = "refuse",
        audit: int | None = None,
        attributes: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        _check_choices(statistics, unknown, solver, per_position, activation)
        for name, number in (("audit", audit), ("angles", angles)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or number < 1):
                raise WatchError(f"{name}={number!r} is not a whole number of at least 1.")
        if per_position and groups is None:
            raise WatchError(
                "per_position= needs groups=, which say how many samples a batch has: give each sample a label, the same one "
                "to all if there are no groups."
            )
        if batch_dim is not None and (isinstance(batch_dim, bool) or not isinstance(batch_dim, Integral)):
            raise WatchError(f"batch_dim={batch_dim!r} is not a whole number, the dimension that indexes samples.")
        self._processes = Processes(model.process_group) if isinstance(model, _DISTRIBUTED) else None
        if self._processes is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                "several processes train, but the model that is watched is not the DistributedDataParallel one: each process "
                "records the shares of its own part of the batch alone.",
                stacklevel=3,
            )
        self._outer, self._model = model, _inner(model)
        self._statistics = tuple(s for s in STATISTICS if s in statistics)
        agree = None if self._processes is None else self._processes.agree
        self._budget = None if budget is None else Budget(budget, every, steps, agree)
        self._schedule = self._budget or make_schedule(every, steps)
        self._audit = Audit(audit)
        self._sink: Sink | None = None
        self._crossed = tuple(crossed)
        self._everything = all(name.startswith("!") for name in layers or ())
        self._skips_unknown = unknown == "skip"
        self._matrices: set[str] = set()
        self._layers = [WatchedLayer(found) for found in find_parameters(self._model, layers, unknown)]
        given = self._checked_rows(rows)
        wanted = _checked_singular_values(singular_values)
        self._measurement = Measurement(self._layers, self._statistics, wanted, angles, solver)
        for layer in self._layers:
            self._measurement.index(layer)  # refuses singular values that a layer does not have
        self._gathering = Gathering(
            self._layers,
            self._statistics,
            unfolded=activation == "unfolded",
            per_position=bool(per_position),
            spatial=per_position == "space",
            audit=self._audit,
        )
        if solver == "tracked":
            self._gathering.follows = self._measurement.follows
        self._capture = Capture(self._model, self._gathering, given, batch_dim)
        self._attributes = dict(attributes or {})
        if taken := OWN_ATTRIBUTES & set(self._attributes):
            raise WatchError(
                f"attributes= holds {sorted(taken)}, which the record's own attributes are called: choose other names."
            )
        self._quiet, self._angles = quiet, int(angles)
        self._recorded = 0
        self._count = 0
        self._valid_by_batch = False
        self._set_labels(groups, valid, None)
        self._labelled, self._labelled_in_a_row = False, 0
        self._active = False
        self._buffer: list[Record] = []
        self._records: list[Record] = []
        self._warned_nan = False
        self._seconds = {"watching": 0.0, "block": 0.0}
        self._entered = 0.0

    @property
    def shared_inputs(self) -> frozenset[int]:
        """Which of the model's floating-point inputs, by number, all samples share, as the last batch that was traced shows."""
        return self._capture.shared_inputs

    def write_to(self, sink: Sink) -> None:
        """Send records to a store instead of keeping them in memory."""
        try:
            json.dumps(self._attributes)
        except (TypeError, ValueError) as error:
            raise WatchError(
                f"attributes= holds what a store cannot hold ({error}): give text, numbers, lists and dicts."
            ) from error
        self._sink = sink

    # ------------------------------------------------------------------ the block

    def __enter__(self) -> Watcher:
        if self._model in _watched_models:
            raise WatchError("this model is already being watched: leave the first watch() block before another.")
        _watched_models.add(self._model)
        self._active = True
        self._entered = time.perf_counter()
        known = {name for layer in self._layers for name in (layer.name, *layer.also)}
        # What has no rule and is frozen is not refused; that it learns later is told of.
        self._matrices = {
            name
            for name, each in _matrices(self._model).items()
            if name in known or each.requires_grad or self._skips_unknown
        }
        try:
            if self._processes is not None:
                self._processes.require_same(self.groups)
            keep_freed_memory()
            self._capture.attach()
            self._plan()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seen = self._capture.forwards
        try:
            self._detach()
            if self._sink is not None:
                self._flush()
                self._sink.finish(self._final_attributes(), complete=kind is None)
        except Exception as unwritten:
            if kind is None:
                raise
            # What ended the loop is what the user has to see.
            warnings.warn(f"the last records could not be stored: {unwritten}", stacklevel=2)
        self._seconds["block"] += time.perf_counter() - self._entered
        if kind is None and seen and not self._count:
            warnings.warn(
                "nothing was recorded, because watcher.step() was never called: call it after loss.backward().",
                stacklevel=2,
            )
        there = _matrices(self._model)
        added = [name for name, parameter in there.items() if parameter.requires_grad and name not in self._matrices]
        if kind is None and added and self._everything:
            warnings.warn(
                f"{sorted(added)} came to the model, or began to learn, within the block and were not recorded: add layers before it, "
                "or leave it and make another watcher.",
                stacklevel=2,
            )
        if not self._quiet and self._count and kind is None:
            print(self._cost_in_words(), file=sys.stderr)

    def _detach(self) -> None:
        try:
            self._finish()
        finally:
            self._capture.detach()
            self._measurement.forget()
            self._active = False
            _watched_models.discard(self._model)

    # ------------------------------------------------------------------ what the user calls

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, ``all`` first."""
        return self._measurement.groups

    @property
    def cost(self) -> dict[str, float]:
        """Steps seen and recorded; seconds in the block, and of these in watching."""
        seconds = self._seconds["block"] + (time.perf_counter() - self._entered if self._active else 0.0)
        watching = self._seconds["watching"] + self._capture.seconds
        return {"steps": self._count, "recorded": self._recorded, "seconds": seconds, "watching_seconds": watching}

    def set_groups(self, labels: Any, valid: Any = None, rows: Mapping[str, Any] | None = None) -> None:
        """Give the labels of the next batch, in the order of its samples.

        Parameters
        ----------
        labels : as for `autospec.watch`
            One label a sample.
        valid : array-like of bool, shape (samples, positions), optional
            Which positions of each sample count.
        rows : dict of str to array-like of int, optional
            As for `autospec.watch`, where the sample of each row changes from batch to batch, as the number of nodes of a
            graph does; without it, what was given last holds.

        Raises
        ------
        WatchError
            If a label was not among those given at the start, or a name is not that of a watched parameter.
        """
        if valid is None and self._capture.valid is not None and not self._valid_by_batch:
            warnings.warn(
                "watch() was given valid=, but set_groups() was not: positions that do not count are recorded too from here on. "
                "Give set_groups() the valid= of each batch.",
                stacklevel=2,
            )
        self._valid_by_batch = self._valid_by_batch or valid is not None
        self._set_labels(labels, valid, rows)
        self._labelled = True

    def step(self) -> None:
        """Close one step of the training: compute and keep its spectra if the schedule says so.

        Call it once per parameter update, after the backward pass and before the next forward pass; before or
        after ``optimizer.step()`` makes no difference.

        Raises
        ------
        WatchError
            If no gradient has arrived since the last step.
        """
        if not self._active:
            raise WatchError("step() was called outside the watch() block: call it within, after loss.backward().")
        begin = time.perf_counter()
        if self._capture.recording:
            if all(layer.pending is None for layer in self._layers):
                raise WatchError(self._why_nothing_arrived())
            if self._capture.valid is not None and not self._gathering.masked:
                raise WatchError(
                    f"valid= has {self._capture.valid.shape[1]} positions, but no watched layer has as many rows a sample: give "
                    "one column for each time step or token."
                )
            sizes = self._gathering.group_sizes()
            with full_precision(self._layers[0].parameter.device):
                if self._processes is not None:
                    self._processes.require_all(self._outer)
                    self._processes.join(self._layers, self._gathering.workspace)
                    sizes = self._processes.total(sizes)
                self._measurement.audit = self._audit if self._gathering.audited is not None else None
                record = self._measurement.record(self._count, sizes)
                self._recorded += 1
                (self._records if self._sink is None else self._buffer).append(record)
                calibrating = self._budget is not None and self._budget.every is None
                if self._measurement.due or self._gathering.audited is not None or calibrating:
                    self._finish()  # a step that is timed bears the whole of its cost
                self._prove(record)
        self._capture.clear()
        self._notice_missing_labels()
        end = time.perf_counter()
        self._seconds["watching"] += end - begin
        if self._budget is not None:
            # Processor time does not count what other programs do; a GPU's work takes no processor time.
            on_cpu = self._layers[0].parameter.device.type == "cpu"
            self._budget.took(self._count, time.process_time() if on_cpu else end, self._capture.recording)
        self._count += 1
        self._plan()
        # Last, so that a step which could not be stored is closed all the same.
        if self._sink is not None and len(self._buffer) >= self._sink.steps_per_chunk:
            begin = time.perf_counter()
            self._flush()
            self._seconds["watching"] += time.perf_counter() - begin

    def _notice_missing_labels(self) -> None:
        """Warn, once, of a recorded step without set_groups() after two that each had one: the old labels stayed."""
        if not self._capture.recording:
            self._labelled = False
            return
        if not self._labelled and self._labelled_in_a_row >= 2:
            warnings.warn(
                f"set_groups() was called for each step before, but not for step {self._count}: it was recorded with the labels "
                "of the batch before (said once).",
                stacklevel=3,
            )
            self._labelled_in_a_row = -sys.maxsize
        self._labelled_in_a_row = self._labelled_in_a_row + 1 if self._labelled else min(self._labelled_in_a_row, 0)
        self._labelled = False

    def discard(self) -> None:
        """Forget what has arrived since the last step, as after a pass that ran out of memory and is made again.

        ``zero_grad()`` has the same effect, but only at the next backward pass; this lets go of the memory at once.
        """
        self._capture.clear()

    @property
    def trajectories(self) -> xr.DataTree:
        """Everything recorded so far, as a labelled tree (see `autospec.open_trajectories`)."""
        if self._active:
            self._finish()
        if self._sink is not None:
            if self._active:
                self._flush()
            return self._sink.open()
        return self._tree(self._records, self._final_attributes())

    def state_dict(self) -> dict[str, Any]:
        """Return what a training loop must keep to go on recording after an interruption.

        Returns
        -------
        dict
            Load it with `load_state_dict` into a watcher made in the same way.  With a store, the records stay
            there and only their number is kept.
        """
        self._finish()
        if self._sink is not None:
            self._flush()
        return {
            "made": self._made(),
            "count": self._count,
            "recorded": self._recorded,
            "audit": self._audit.summary(),
            "rank_limits": {
                layer.name: layer.rank_limit.tolist() for layer in self._layers if layer.rank_limit is not None
            },
            "solver": self._measurement.solver_state(),
            "budget": None if self._budget is None else self._budget.state(),
            "records": [record.state() for record in self._records],
        }

    def _made(self) -> dict[str, Any]:
        """What records depend on that a watcher is made with; plain lists, which a checkpoint can hold."""
        wanted = self._measurement.wanted
        return {
            "groups": list(self.groups),
            "layers": [[layer.name, *layer.shape] for layer in self._layers],
            "statistics": sorted(self._statistics),
            "singular_values": list(wanted) if isinstance(wanted, tuple) else wanted,
            "options": {
                "activation": "unfolded" if self._gathering.unfolded else "channels",
                "per_position": "space" if self._gathering.spatial else self._gathering.per_position,
                "angles": self._angles,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`: records made after it are dropped.

        Raises
        ------
        WatchError
            If the watcher that made it had other groups, layers, statistics or options that these depend on.
        """
        made = state["made"]
        for what, value in self._made().items():
            if value != made.get(what, value):
                raise WatchError(
                    f"the state was saved by a watcher with other {what.replace('_', ' ')} ({made[what]} instead of {value}): "
                    "make the watcher as that one was, or begin a new record."
                )
        self._count, self._recorded = state["count"], state["recorded"]
        self._audit.restore(state["audit"])
        for layer in self._layers:
            limit = state["rank_limits"].get(layer.name)
            layer.rank_limit = None if limit is None else np.array(limit)
        self._measurement.restore_solver(state["solver"])
        if self._budget is not None:
            self._budget.restore(state["budget"], self._count)
        self._buffer = []
        self._records = [Record.from_state(record) for record in state["records"]]
        if self._sink is not None:
            self._sink.truncate(self._recorded)
        self._plan()

    # ------------------------------------------------------------------ steps

    def _plan(self) -> None:
        """Decide whether the next step is recorded, and audited."""
        self._capture.recording = self._schedule(self._count)
        learned = [layer.name for layer in self._layers if layer.parameter.requires_grad]
        # A layer that the loss does not reach proves nothing.
        reached = [layer.name for layer in self._layers if layer.rank_limit is not None]
        learned = [name for name in learned if name in reached] or learned
        due = self._capture.recording and self._audit.due(self._recorded) and learned
        self._gathering.audited = self._audit.chosen(learned, self._count) if due else None
        self._gathering.guard_due = self._capture.recording and self._audit.guard_due(self._recorded)

    def _set_labels(self, labels: Any, valid: Any, rows: Mapping[str, Any] | None) -> None:
        capture = self._capture
        if rows is not None:
            capture.rows = {**capture.rows, **self._checked_rows(rows)}
        if labels is not None:
            labels = listed(labels)
            if capture.groups is None:
                if self._recorded:
                    raise WatchError("set_groups() came after steps without groups: give watch(groups=...) the labels.")
                capture.groups = Groups(labels, self._crossed)
                self._measurement.name_groups(capture.groups.names, capture.groups.groupings)
            capture.assignment = capture.groups.assign(labels)
        capture.valid = None
        if valid is not None:
            mask = as_array(valid).astype(bool)
            if capture.assignment is None:
                raise WatchError("valid= needs groups=, so that rows can be traced to samples.")
            if mask.ndim != 2 or len(mask) != len(capture.assignment.cells):
                raise WatchError(
                    f"valid= has the shape {mask.shape}: give one row for each of the {len(capture.assignment.cells)} "
                    "samples, and one column for each position."
                )
            capture.valid = mask

    def _why_nothing_arrived(self) -> str:
        if not self._capture.forwards and any(layer.parameter.grad is not None for layer in self._layers):
            return (
                f"step() was called at step {self._count}, but no forward pass of the watched model was seen, although it "
                "has gradients: a compiled model must not be called before watch() is entered (torch._dynamo.reset() "
                "makes it compile again), and the model that is watched must be the one that is called."
            )
        if self._capture.returned:
            return (
                f"step() was called at step {self._count}, but no gradient was added to a watched layer's: torch.autograd.grad "
                "returned them, which is not recorded, so call loss.backward()."
            )
        return (
            f"step() was called at step {self._count}, but no gradient of a watched layer has arrived "
            "since the last step: call it after loss.backward(), and not for a batch without samples."
        )

    def _finish(self) -> None:
        """Carry out the decompositions that were put off."""
        for record in self._measurement.finish():
            self._warn_if_not_finite(record)

    def _prove(self, record: Record) -> None:
        """Audit the record, if it is due, and compare with the gradient that arrived, if there is reason to."""
        if not self._gathering.guarded:
            return
        if self._gathering.audited is not None:
            self._audit.audited(self._count, any(layer.pending and layer.pending.exact for layer in self._layers))
        for layer in self._layers:
            if layer.pending is None:
                continue
            self._audit.guard(layer.name, layer.pending)
            if layer.pending.exact and "gradient" in self._statistics:
                spectra = record.spectra[layer.name, "gradient"]
                self._audit.compare(
                    layer.name, layer.pending, spectra, self._measurement.index(layer), len(self.groups)
                )

    def _warn_if_not_finite(self, record: Record) -> None:
        if self._warned_nan:
            return
        for (name, statistic), sigma_1 in record.sigma_1.items():
            sizes = record.rows[name] > 0
            if np.isnan(sigma_1[sizes]).any():
                self._warned_nan = True
                warnings.warn(
                    f"the {statistic} of '{name}' holds values that are not finite, or too large for single precision, at step "
                    f"{record.step}: its spectrum is recorded as NaN (said once).",
                    stacklevel=4,
                )
                return

    # ------------------------------------------------------------------ results

    def _cost_in_words(self) -> str:
        cost = self.cost
        share = cost["watching_seconds"] / max(cost["seconds"], 1e-9)
        return (
            f"autospec: recorded {self._recorded} of {self._count} steps, {len(self._layers)} matrices, "
            f"{len(self.groups)} groups; watching took {cost['watching_seconds']:.2g} of {cost['seconds']:.2g} s "
            f"({share:.0%})."
        )

    def _final_attributes(self) -> dict[str, Any]:
        attributes = {**self._attributes, "audit": self._audit.summary()}
        if self._budget is not None:
            attributes["schedule"] = self._budget.summary()
        return attributes

    def _flush(self) -> None:
        self._finish()
        if self._buffer and self._sink is not None:
            self._sink.append(self._tree(self._buffer, self._final_attributes()))
            self._buffer = []

    def _tree(self, records: Sequence[Record], attributes: Mapping[str, Any]) -> xr.DataTree:
        layouts = [
            LayerLayout(layer.name, tuple(layer.also), layer.shape, self._measurement.index(layer), layer.rank_limit)
            for layer in self._layers
        ]
        groups = self._capture.groups
        groupings = groups.groupings if groups is not None else ("all",)
        return build_tree(
            records, layouts, self.groups, groupings, self._statistics, attributes, self._measurement.pair_names()
        )

    def _checked_rows(self, rows: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        names = [layer.name for layer in self._layers]
        for name in rows or {}:
            if name not in names:
                raise WatchError(f"rows= names '{name}', which is not a watched parameter (watched: {names}).")
        return {name: as_array(value).reshape(-1) for name, value in (rows or {}).items()}


def _inner(model: nn.Module) -> nn.Module:
    """The user's own module inside torch's wrappers, so that parameters keep their names."""
    wrapped: Any = model
    while True:
        if isinstance(wrapped, _DISTRIBUTED):
            wrapped = wrapped.module
        elif hasattr(wrapped, "_orig_mod"):  # torch.compile's
            wrapped = wrapped._orig_mod
        else:
            return wrapped


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that are matrices, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}


def _check_choices(
    statistics: Sequence[str], unknown: str, solver: str, per_position: bool | str, activation: str
) -> None:
    bad = [s for s in statistics if s not in STATISTICS]
    if bad or isinstance(statistics, str) or not statistics:
        raise WatchError(f"statistics={statistics!r}: choose one or more of {list(STATISTICS)} in a list.")
    for name, value, choices in (
        ("unknown", unknown, ("refuse", "skip")),
        ("solver", solver, ("exact", "tracked")),
        ("per_position", per_position, (False, True, "space")),
        ("activation", activation, ("channels", "unfolded")),
    ):
        if value not in choices:
            raise WatchError(f"{name}={value!r}: choose one of {list(choices)}.")


def _checked_singular_values(value: int | Sequence[int] | str | None) -> int | tuple[int, ...] | str | None:
    if value is None or (isinstance(value, str) and value == "all"):
        return value
    single = isinstance(value, Integral)
    numbers: list[Any] = [] if isinstance(value, str) else np.atleast_1d(np.array(value, dtype=object)).tolist()
    if not numbers or not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 1 for n in numbers):
        raise WatchError(
            f"singular_values={value!r}: give how many to keep, a list of their numbers (from 1), 'all' or None."
        )
    return int(numbers[0]) if single else tuple(sorted({int(n) for n in numbers}))
