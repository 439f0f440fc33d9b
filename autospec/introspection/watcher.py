"""The watcher: hooks around a model that record spectra while the user's own loop trains it."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .audit import Audit
from .errors import WatchError
from .groups import Assignment, Groups
from .hooks import Hook
from .layers import rule_for
from .parameters import WatchedParameter, find_parameters
from .pending import Pending, RowStack, share_grams
from .rows import RowMap, map_rows
from .schedule import Schedule, make_schedule
from .spectra import float64, noise_floor, singular_values
from .tree import LayerLayout, Record, build_tree

STATISTICS = ("gradient", "activation", "adjoint")
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


@dataclass
class _ConstantInput:
    """Identifies a layer input that is data, so that an unchanged one is decomposed once."""

    tensor: Tensor
    version: int
    checksum: tuple[float, float] | None
    assignment: Assignment | None

    def same(self, other: _ConstantInput) -> bool:
        return (
            self.tensor.data_ptr() == other.tensor.data_ptr()
            and self.tensor.shape == other.tensor.shape
            and self.tensor.stride() == other.tensor.stride()
            and self.version == other.version
            and self.checksum == other.checksum
            and self.assignment is other.assignment
        )


@dataclass
class _Use:
    """One use of a parameter in a forward pass whose adjoint has arrived."""

    activation: Tensor
    adjoint: Tensor
    samples: np.ndarray | None
    forward: _Forward
    constant: _ConstantInput | None
    backward: int


@dataclass
class _Forward:
    """One forward pass of the model: whose rows are whose, and how often each layer was called."""

    assignment: Assignment | None
    row_map: RowMap | None
    error: WatchError | None = None
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    orders: dict[int, tuple[Tensor, list[int], list[bytes]]] = field(default_factory=dict)


class _Layer(WatchedParameter):
    """A watched parameter with what its hooks have seen."""

    def __init__(self, found: WatchedParameter) -> None:
        super().__init__(found.name, found.parameter)
        self.also, self.places = found.also, found.places
        self.uses: list[_Use] = []
        self.pending: Pending | None = None
        self.handle: RemovableHandle | None = None
        self.constant: tuple[_ConstantInput, np.ndarray, np.ndarray] | None = None
        self.inputs: list[_ConstantInput | None] = []
        self.rank_limit: np.ndarray | None = None
        self.widths = {"activation": self.shape[1], "adjoint": self.shape[0]}

    def clear(self) -> None:
        """Forget what is pending."""
        self.uses, self.inputs, self.pending = [], [], None


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
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Any = None,
        *,
        statistics: Sequence[str] = STATISTICS,
        every: int = 1,
        steps: Iterable[int] | Schedule | None = None,
        layers: Sequence[str] | None = None,
        singular_values: int | Sequence[int] | str | None = None,
        crossed: Sequence[Sequence[str]] = (),
        batch_dim: int | None = None,
        rows: Mapping[str, Any] | None = None,
        unknown: str = "refuse",
        audit: int | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        if unknown not in ("refuse", "skip"):
            raise WatchError(f"unknown={unknown!r}: choose 'refuse' or 'skip'.")
        bad = [s for s in statistics if s not in STATISTICS]
        if bad or isinstance(statistics, str) or not statistics:
            raise WatchError(f"statistics={statistics!r}: choose one or more of {list(STATISTICS)} in a list.")
        if audit is not None and (isinstance(audit, bool) or not isinstance(audit, Integral) or audit < 1):
            raise WatchError(f"audit={audit!r} is not a whole number of at least 1.")
        self._model = model
        self._statistics = tuple(s for s in STATISTICS if s in statistics)
        self._schedule = make_schedule(every, steps)
        self._singular_values = _checked_singular_values(singular_values)
        self._batch_dim = batch_dim
        self._rows = {name: np.asarray(value).reshape(-1) for name, value in (rows or {}).items()}
        self._audit = Audit(audit)
        self._sink: Sink | None = None
        self._crossed = tuple(crossed)
        self._layers = [_Layer(found) for found in find_parameters(model, layers, unknown)]
        self._check_rows_names()
        for layer in self._layers:
            self._index(layer)  # refuses singular values that a layer does not have
        self._attributes = dict(attributes or {})
        self._groups: Groups | None = None
        self._assignment: Assignment | None = None
        self._recorded = 0
        self._set_labels(groups)
        self._row_maps: dict[Any, RowMap] = {}
        self._forward: _Forward | None = None
        self._handles: list[RemovableHandle] = []
        self._active = False
        self._paused = False
        self._backward = -1
        self._forwards = 0
        self._count = 0
        self._recording = self._schedule(0)
        self._buffer: list[Record] = []
        self._records: list[Record] = []
        self._warned_nan = False
        self._last_cells: tuple[tuple[bytes, ...], list[list[bytes]]] = ((), [[] for _ in self.groups])

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
        try:
            modules = dict(self._model.named_modules())
            by_place = {place: layer for layer in self._layers for place in layer.places}
            for module_name in dict.fromkeys(name for name, _ in by_place):
                rule = rule_for(modules[module_name])
                assert rule is not None
                on_use = self._use_hook(module_name, by_place)
                self._handles += rule.attach(modules[module_name], on_use)
            self._handles.append(self._model.register_forward_pre_hook(Hook(self._forward_begins), with_kwargs=True))
            self._handles.append(self._model.register_forward_hook(Hook(self._forward_ends), always_call=True))
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()
        if kind is None and self._forwards and not self._count:
            warnings.warn(
                "nothing was recorded, because watcher.step() was never called: call it after loss.backward().",
                stacklevel=2,
            )
        if self._sink is not None:
            self._flush()
            self._sink.finish(self._final_attributes(), complete=kind is None)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in self._layers:
            if layer.handle is not None:
                layer.handle.remove()
            layer.handle, layer.constant = None, None
            layer.clear()
        self._forward = None
        self._active = False
        _watched_models.discard(self._model)

    # ------------------------------------------------------------------ what the user calls

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, ``all`` first."""
        return self._groups.names if self._groups is not None else ("all",)

    def set_groups(self, labels: Any) -> None:
        """Give the labels of the next batch, in the order of its samples.

        Parameters
        ----------
        labels : as for `autospec.watch`
            One label a sample.

        Raises
        ------
        WatchError
            If a label was not among those given at the start.
        """
        self._set_labels(labels)

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
            raise WatchError("step() was called outside the watch() block.")
        if self._recording:
            if all(layer.pending is None for layer in self._layers):
                raise WatchError(
                    f"step() was called at step {self._count}, but no gradient of a watched layer has arrived "
                    "since the last step: call it after loss.backward()."
                )
            record = self._measure()
            self._recorded += 1
            (self._records if self._sink is None else self._buffer).append(record)
            if self._sink is not None and len(self._buffer) >= self._sink.steps_per_chunk:
                self._flush()
        for layer in self._layers:
            layer.clear()
        self._count += 1
        self._recording = self._schedule(self._count)

    @property
    def trajectories(self) -> xr.DataTree:
        """Everything recorded so far, as a labelled tree (see `autospec.open_trajectories`)."""
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
        if self._sink is not None:
            self._flush()
        return {
            "count": self._count,
            "recorded": self._recorded,
            "audit": self._audit.summary(),
            "rank_limits": {
                layer.name: layer.rank_limit.tolist() for layer in self._layers if layer.rank_limit is not None
            },
            "records": [record.state() for record in self._records],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`: records made after it are dropped."""
        self._count, self._recorded = state["count"], state["recorded"]
        self._recording = self._schedule(self._count)
        self._audit.restore(state["audit"])
        for layer in self._layers:
            limit = state["rank_limits"].get(layer.name)
            layer.rank_limit = None if limit is None else np.array(limit)
        self._buffer = []
        self._records = [Record.from_state(record) for record in state["records"]]
        if self._sink is not None:
            self._sink.truncate(self._recorded)

    # ------------------------------------------------------------------ hooks

    def _set_labels(self, labels: Any) -> None:
        if labels is None:
            return
        if self._groups is None:
            if self._recorded:
                raise WatchError("set_groups() came after steps without groups: give watch(groups=...) the labels.")
            self._groups = Groups(labels, self._crossed)
        self._assignment = self._groups.assign(labels)

    def _forward_begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused or not self._active:
            return
        if not (torch.is_grad_enabled() and self._recording):
            self._forward = None
            return
        self._forwards += 1
        for layer in self._layers:
            if layer.handle is None and layer.parameter.requires_grad:
                layer.handle = layer.parameter.register_hook(self._gradient_hook(layer))
        try:
            self._forward = _Forward(self._assignment, self._row_map(args, kwargs))
        except WatchError as error:
            if model.training:
                raise
            # A validation pass may have another batch; it matters only if a gradient comes back from it.
            self._forward = _Forward(self._assignment, None, error)

    def _forward_ends(self, *_: Any) -> None:
        if not self._paused:
            self._forward = None

    def _row_map(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RowMap | None:
        if self._assignment is None:
            return None
        watched = {place for layer in self._layers if layer.name not in self._rows for place in layer.places}
        samples = len(self._assignment.cells)
        if not watched:
            return RowMap({}, 0, ())
        signature = (samples, _signature((args, kwargs)))
        if signature not in self._row_maps:
            self._paused = True
            try:
                found = map_rows(self._model, args, kwargs, samples, watched, self._batch_dim)
            finally:
                self._paused = False
            self._row_maps[signature] = found
            assert self._groups is not None
            self._audit.probed(found, self._groups.missing)
        return self._row_maps[signature]

    def _use_hook(
        self, module_name: str, by_place: Mapping[tuple[str, str], _Layer]
    ) -> Callable[[str, Tensor, Tensor], None]:
        def on_use(parameter: str, activation: Tensor, output: Tensor) -> None:
            place = (module_name, parameter)
            if self._paused or not self._active or not self._recording:
                return
            if place not in by_place or not torch.is_grad_enabled():
                return
            layer, forward = by_place[place], self._forward
            if forward is None:
                if self._assignment is None:
                    forward = _Forward(None, None)
                else:
                    message = f"'{layer.name}' was used outside of a call of the watched model: call the model itself."
                    forward = _Forward(self._assignment, None, WatchError(message))
            call = forward.calls.get(place, 0)
            forward.calls[place] = call + 1
            if not output.requires_grad or not layer.parameter.requires_grad:
                return
            data, version = activation.detach(), activation._version
            constant = None
            if not activation.requires_grad and "activation" in self._statistics:
                constant = _ConstantInput(data, version, _checksum(data), forward.assignment)

            def adjoint_arrives(adjoint: Tensor) -> None:
                if not self._active:
                    return
                if forward.error is not None:
                    raise forward.error
                if data._version != version:
                    raise WatchError(f"the input of '{layer.name}' was modified in place before the backward pass.")
                samples = self._samples_of_rows(layer, forward, place, call, data)
                layer.uses.append(_Use(data, adjoint.detach(), samples, forward, constant, _backward_pass()))

            output.register_hook(adjoint_arrives)

        return on_use

    def _samples_of_rows(
        self, layer: _Layer, forward: _Forward, place: tuple[str, str], call: int, activation: Tensor
    ) -> np.ndarray | None:
        if forward.assignment is None or forward.row_map is None:
            return None
        count = activation.numel() // activation.shape[-1]
        if layer.name in self._rows:
            samples = self._rows[layer.name]
            if len(samples) and (samples.min() < 0 or samples.max() >= len(forward.assignment.cells)):
                raise WatchError(f"rows= names a sample that the batch does not have, for '{layer.name}'.")
        else:
            calls = forward.row_map.samples.get(place, [])
            if call >= len(calls):
                raise WatchError(
                    f"'{layer.name}' was used more often in training than in evaluation mode, so the rows of that use "
                    "are not known: give rows=."
                )
            samples = calls[call]
        if len(samples) != count:
            raise WatchError(
                f"'{layer.name}' received {count} rows, but {len(samples)} are known: "
                "give rows= with the sample of each row."
            )
        return samples

    def _gradient_hook(self, layer: _Layer) -> Callable[[Tensor], None]:
        def gradient_arrives(gradient: Tensor) -> None:
            if self._active and self._recording:
                self._gather(layer, gradient.detach())

        return gradient_arrives

    def _gather(self, layer: _Layer, gradient: Tensor) -> None:
        """Add one backward pass to what is pending for a parameter."""
        # Another backward pass, for the inputs' gradient say, may have crossed the layer without reaching here.
        uses, layer.uses = [use for use in layer.uses if use.backward == _backward_pass()], []
        if not uses:
            raise WatchError(
                f"a gradient reached '{layer.name}' that did not come through its layer's forward pass: the "
                "parameter is used outside its layer, which cannot be watched; leave it out with layers=."
            )
        if self._backward < _backward_pass():
            self._backward = _backward_pass()
            self._discard_zeroed()
        pending = layer.pending = layer.pending or Pending(layer.shape)
        batches = {id(use.forward.assignment): use.forward.assignment for use in uses}
        for assignment in batches.values():
            if assignment is not None:
                pending.sizes = assignment.sizes if pending.sizes is None else pending.sizes + assignment.sizes
        audited = self._audit.due(self._recorded)
        factors = [statistic for statistic in self._statistics if statistic != "gradient"]
        for use in uses:
            activation = use.activation.reshape(-1, use.activation.shape[-1])
            adjoint = use.adjoint.reshape(-1, use.adjoint.shape[-1])
            order, counts, keys = self._row_order(use)
            if order is None:  # what is kept must not change with the user's tensors
                activation, adjoint = activation.clone(), adjoint.clone()
            else:
                activation, adjoint = activation.index_select(0, order), adjoint.index_select(0, order)
            activation = activation.to(adjoint.dtype)
            layer.widths = {"activation": activation.shape[1], "adjoint": adjoint.shape[1]}
            shares = audited or "gradient" in self._statistics
            pending.add(activation, adjoint, counts, keys, shares, factors, use.constant is not None)
            layer.inputs.append(use.constant)
            if audited and layer.name == self._audited_name():
                pending.add_exact(activation, adjoint, counts, keys)
        if audited:
            flat = float64(gradient.reshape(layer.shape))
            pending.arrived = flat.clone() if pending.arrived is None else pending.arrived + flat

    def _discard_zeroed(self) -> None:
        """Forget, at the first gradient of a backward pass, what zero_grad() has discarded since the last one."""
        for layer in self._layers:
            if layer.pending is not None:
                before = layer.parameter.grad
                if before is None or not before.any():
                    layer.pending, layer.inputs = None, []

    def _row_order(self, use: _Use) -> tuple[Tensor | None, list[int], list[bytes]]:
        """How to sort rows by cell: the order (None if already sorted), rows a cell, and the cells' keys."""
        if use.samples is None or use.forward.assignment is None:
            rows = use.activation.numel() // use.activation.shape[-1]
            return None, [rows], [np.ones(1, dtype=bool).tobytes()]
        cached = use.forward.orders
        if id(use.samples) not in cached:
            assignment = use.forward.assignment
            cells = assignment.cells[use.samples]
            counts = np.bincount(cells, minlength=len(assignment.members))
            order = torch.from_numpy(np.argsort(cells, kind="stable")).to(use.activation.device)
            present = [i for i, count in enumerate(counts) if count]
            cached[id(use.samples)] = (
                order,
                [int(counts[i]) for i in present],
                [assignment.members[i].tobytes() for i in present],
            )
        return cached[id(use.samples)]

    # ------------------------------------------------------------------ measuring

    def _measure(self) -> Record:
        """Spectra of everything pending, all decompositions of equal size in one call."""
        record = Record(self._count, self._group_sizes())
        jobs: list[tuple[_Layer, str, int]] = []
        grams: list[Tensor] = []
        computed: list[tuple[_Layer, _ConstantInput]] = []
        for layer in self._layers:
            pending = layer.pending
            if pending is None:
                continue
            cells_of = self._cells_of(tuple(pending.rows))
            rows = np.array([sum(pending.rows[key] for key in cells) for cells in cells_of])
            limit = np.minimum(min(layer.shape), rows)
            layer.rank_limit = limit if layer.rank_limit is None else np.maximum(layer.rank_limit, limit)
            record.rows[layer.name] = rows
            present = [group for group, cells in enumerate(cells_of) if cells]
            if "gradient" in self._statistics:
                jobs += [(layer, "gradient", group) for group in present]
                grams += share_grams([[pending.shares[key] for key in cells_of[group]] for group in present])
            for statistic in self._statistics:
                if statistic == "gradient":
                    continue
                constant = layer.inputs[0] if statistic == "activation" and len(layer.inputs) == 1 else None
                if constant is not None:
                    if layer.constant is not None and layer.constant[0].same(constant):
                        record.spectra[layer.name, statistic] = layer.constant[1]
                        record.sigma_1[layer.name, statistic] = layer.constant[2]
                        continue
                    computed.append((layer, constant))
                stacks = pending.stacks[statistic]
                for group in present:
                    jobs.append((layer, statistic, group))
                    grams.append(RowStack.merged_gram([stacks[key] for key in cells_of[group]]))
        self._store_spectra(record, jobs, singular_values(grams))
        for layer, constant in computed:
            key = (layer.name, "activation")
            layer.constant = (constant, record.spectra[key], record.sigma_1[key])
        self._floors(record)
        self._prove(record)
        self._warn_if_not_finite(record)
        return record

    def _cells_of(self, keys: tuple[bytes, ...]) -> list[list[bytes]]:
        """Cells of each group; the same every step, as a rule."""
        if self._last_cells[0] != keys:
            members = {key: np.frombuffer(key, dtype=bool) for key in keys}
            groups = range(len(self.groups))
            self._last_cells = (keys, [[key for key in keys if members[key][group]] for group in groups])
        return self._last_cells[1]

    def _store_spectra(self, record: Record, jobs: list[tuple[_Layer, str, int]], solved: list[Tensor]) -> None:
        groups = len(self.groups)
        for (layer, statistic, group), values in zip(jobs, solved, strict=True):
            key = (layer.name, statistic)
            index = self._index(layer)
            if key not in record.spectra:
                record.spectra[key] = np.full((groups, len(index)), np.nan, dtype=np.float32)
                record.sigma_1[key] = np.full(groups, np.nan)
            array = values.cpu().numpy()
            # A share of few rows was reduced to as many values: the others are zero, not missing.
            width = min(layer.shape) if statistic == "gradient" else len(array)
            usable = np.flatnonzero(index <= min(width, layer.widths.get(statistic, width)))
            record.spectra[key][group, usable] = _padded(array, width)[index[usable] - 1]
            record.sigma_1[key][group] = array[0]

    def _index(self, layer: _Layer) -> np.ndarray:
        """Which singular values the layer's node holds, counted from 1."""
        wanted = self._singular_values
        limit = min(layer.shape)
        if wanted == "all":
            return np.arange(1, max([limit, *layer.widths.values()]) + 1)
        if wanted is None:
            return np.arange(1, limit + 1)
        if isinstance(wanted, int):
            return np.arange(1, min(wanted, limit) + 1)
        assert not isinstance(wanted, str)
        index = np.array([k for k in wanted if k <= limit], dtype=np.int64)
        if not len(index):
            raise WatchError(f"singular_values={list(wanted)}: '{layer.name}' has only {limit} singular values.")
        return index

    def _floors(self, record: Record) -> None:
        for layer in self._layers:
            rows = record.rows.get(layer.name)
            if rows is None or layer.pending is None:
                continue
            shapes = {"gradient": layer.shape}
            for statistic, width in layer.widths.items():
                shapes[statistic] = (width, 1)
            for statistic in self._statistics:
                sigma_1 = record.sigma_1[layer.name, statistic]
                floor = noise_floor(sigma_1, shapes[statistic], rows, layer.pending.dtype, statistic)
                record.floors[layer.name, statistic] = floor.astype(np.float32)

    def _group_sizes(self) -> np.ndarray:
        """Count the samples in each group, over all micro-batches of the step."""
        sizes = [layer.pending.sizes for layer in self._layers if layer.pending and layer.pending.sizes is not None]
        return np.max(sizes, axis=0) if sizes else np.zeros(len(self.groups), dtype=np.int64)

    # ------------------------------------------------------------------ proving itself

    def _audited_name(self) -> str:
        return self._audit.chosen([y.name for y in self._layers if y.parameter.requires_grad], self._count)

    def _prove(self, record: Record) -> None:
        """Audit the record, if it is due."""
        if not self._audit.due(self._recorded):
            return
        self._audit.audited(self._count)
        for layer in self._layers:
            if layer.pending is None:
                continue
            self._audit.guard(layer.name, layer.pending)
            if layer.pending.exact and "gradient" in self._statistics:
                spectra = record.spectra[layer.name, "gradient"]
                self._audit.compare(layer.pending, spectra, self._index(layer), len(self.groups))

    def _warn_if_not_finite(self, record: Record) -> None:
        if self._warned_nan:
            return
        for (name, statistic), sigma_1 in record.sigma_1.items():
            sizes = record.rows[name] > 0
            if np.isnan(sigma_1[sizes]).any():
                self._warned_nan = True
                warnings.warn(
                    f"the {statistic} of '{name}' holds values that are not finite at step {record.step}: its spectrum "
                    "is recorded as NaN (said once).",
                    stacklevel=3,
                )
                return

    # ------------------------------------------------------------------ results

    def _final_attributes(self) -> dict[str, Any]:
        return {**self._attributes, "audit": self._audit.summary()}

    def _flush(self) -> None:
        if self._buffer and self._sink is not None:
            self._sink.append(self._tree(self._buffer, self._final_attributes()))
            self._buffer = []

    def _tree(self, records: Sequence[Record], attributes: Mapping[str, Any]) -> xr.DataTree:
        layouts = [
            LayerLayout(layer.name, tuple(layer.also), layer.shape, self._index(layer), layer.rank_limit)
            for layer in self._layers
        ]
        groupings = self._groups.groupings if self._groups is not None else ("all",)
        return build_tree(records, layouts, self.groups, groupings, self._statistics, attributes)

    def _check_rows_names(self) -> None:
        names = [layer.name for layer in self._layers]
        for name in self._rows:
            if name not in names:
                raise WatchError(f"rows= names '{name}', which is not a watched parameter (watched: {names}).")


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    """Fill up with zeros, or with NaN where the values are not finite."""
    if len(values) >= width:
        return values
    return np.concatenate([values, np.full(width - len(values), values[0] * 0)])


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


def _checksum(tensor: Tensor) -> tuple[float, float] | None:
    """Notice changes that bypass torch, which only memory shared with numpy can have."""
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return None
    matrix = tensor.reshape(-1, tensor.shape[-1])
    # Weights without regularity notice rows or columns that change places, which a plain sum would not.
    by_row, by_column = (torch.arange(n, dtype=tensor.dtype).mul(0.618034).frac() - 0.5 for n in matrix.shape)
    return float(by_row @ (matrix @ by_column)), float(torch.linalg.vector_norm(tensor))


def _signature(value: Any) -> Any:
    """Shapes of all tensors in the arguments, and options: with the same ones the rows lie in the same order."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    return value if isinstance(value, bool | int | str) else type(value).__name__


def _backward_pass() -> int:
    """Return the number of the backward pass that is running; later ones have larger numbers."""
    return torch._C._current_graph_task_id()
