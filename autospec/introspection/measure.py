"""From what has arrived for each parameter to the spectra of one step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .capture import ConstantInput, WatchedLayer
from .errors import WatchError
from .pending import IndexStack, Pending, RowStack, cells_of_groups, share_grams, share_matrices
from .spectra import float64, leading_directions, lower_gram, noise_floor, principal_angles, singular_values
from .tree import Record

CONTRASTS = ("contrast", "cosine", "angles")


@dataclass
class _Job:
    """One spectrum to be computed: a Gram matrix, or the values where they are known already."""

    layer: WatchedLayer
    statistic: str
    group: int
    gram: Tensor | None
    values: Tensor | None = None


class Measurement:
    """Computes records.

    Parameters
    ----------
    layers : sequence of WatchedLayer
        The watched parameters.
    statistics : sequence of str
        What is recorded.
    wanted : int, tuple of int, "all" or None
        Which singular values.
    directions : int
        Dimension of the subspaces whose principal angles are recorded.
    solver : {"exact", "tracked"}
        How activations' and adjoints' leading singular values are found.
    """

    def __init__(
        self,
        layers: Sequence[WatchedLayer],
        statistics: Sequence[str],
        wanted: int | tuple[int, ...] | str | None,
        directions: int,
        solver: str,
    ) -> None:
        self.layers, self.statistics, self.wanted, self.directions = layers, statistics, wanted, directions
        self.solver = solver
        self.groups: tuple[str, ...] = ("all",)
        self.pairs: list[tuple[int, int]] = []
        self._cells: tuple[tuple[bytes, ...], list[list[bytes]]] = ((), [])
        self._constants: dict[str, tuple[ConstantInput, np.ndarray, np.ndarray, np.ndarray]] = {}

    def name_groups(self, names: Sequence[str], groupings: Sequence[str]) -> None:
        """Take the groups: pairs are compared within a grouping."""
        self.groups = tuple(names)
        self.pairs = [
            (a, b) for a, b in itertools.combinations(range(1, len(names)), 2) if groupings[a] == groupings[b]
        ]
        self._cells = ((), [])

    def forget(self) -> None:
        """Let go of what is kept from step to step."""
        self._constants = {}

    def solver_state(self) -> dict[str, Any]:
        """What the tracked solver must keep in a checkpoint."""
        return {}

    def restore_solver(self, state: Mapping[str, Any]) -> None:
        """Continue from `solver_state`."""

    def index(self, layer: WatchedLayer) -> np.ndarray:
        """Which singular values the layer's node holds, counted from 1."""
        wanted = self.wanted
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

    def record(self, step: int) -> Record:
        """Spectra of everything pending, all decompositions of equal size in one call."""
        record = Record(step, self._group_sizes())
        jobs: list[_Job] = []
        computed: list[tuple[WatchedLayer, ConstantInput]] = []
        complete: dict[tuple[str, str], np.ndarray] = {}
        for layer in self.layers:
            pending = layer.pending
            if pending is None:
                continue
            cells_of = self._cells_of(tuple(pending.rows))
            rows = np.array([sum(pending.rows[key] for key in cells) for cells in cells_of])
            limit = np.minimum(min(layer.shape), rows)
            layer.rank_limit = limit if layer.rank_limit is None else np.maximum(layer.rank_limit, limit)
            record.rows[layer.name] = rows
            present = [group for group, cells in enumerate(cells_of) if cells]
            if "gradient" in self.statistics:
                grams = share_grams([[pending.shares[key] for key in cells_of[group]] for group in present])
                jobs += [_Job(layer, "gradient", group, gram) for group, gram in zip(present, grams, strict=True)]
            for statistic in ("activation", "adjoint"):
                if statistic not in self.statistics:
                    continue
                constant = layer.inputs[0] if statistic == "activation" and len(layer.inputs) == 1 else None
                if constant is not None:
                    known = self._constants.get(layer.name)
                    if known is not None and known[0].same(constant):
                        key = (layer.name, statistic)
                        record.spectra[key], record.sigma_1[key], complete[key] = known[1:]
                        continue
                    computed.append((layer, constant))
                for group in present:
                    jobs += self._factor_jobs(layer, pending, statistic, group, cells_of[group])
        self._store(record, jobs, complete)
        for layer, constant in computed:
            key = (layer.name, "activation")
            self._constants[layer.name] = (constant, record.spectra[key], record.sigma_1[key], complete[key])
        for layer in self.layers:
            if layer.pending is not None:
                self._floors(record, layer, layer.pending)
                self._more(record, layer, layer.pending, complete)
        return record

    def _factor_jobs(
        self, layer: WatchedLayer, pending: Pending, statistic: str, group: int, cells: Sequence[bytes]
    ) -> list[_Job]:
        jobs = []
        for stacks in pending.stacks[statistic].values():
            there = [stacks[key] for key in cells if key in stacks]
            if there:
                jobs.append(_Job(layer, statistic, group, RowStack.merged_gram(there)))
        if statistic == "activation":
            for indices in pending.indices.values():
                found = [indices[key] for key in cells if key in indices]
                if found:
                    jobs.append(_Job(layer, statistic, group, None, IndexStack.merged_spectrum(found)))
        return jobs

    def _cells_of(self, keys: tuple[bytes, ...]) -> list[list[bytes]]:
        """Cells of each group; the same every step, as a rule."""
        if self._cells[0] != keys:
            self._cells = (keys, cells_of_groups(keys, len(self.groups)))
        return self._cells[1]

    def _store(self, record: Record, jobs: list[_Job], complete: dict[tuple[str, str], np.ndarray]) -> None:
        groups = len(self.groups)
        open_jobs = [job for job in jobs if job.values is None]
        for job, values in zip(
            open_jobs, singular_values([job.gram for job in open_jobs if job.gram is not None]), strict=True
        ):
            job.values = values
        merged: dict[tuple[str, str, int], tuple[WatchedLayer, np.ndarray]] = {}
        for job in jobs:
            assert job.values is not None
            key = (job.layer.name, job.statistic, job.group)
            found = job.values.cpu().numpy()
            if key in merged:  # rows from different spaces: the spectra of both
                found = np.sort(np.concatenate([merged[key][1], found]))[::-1]
            merged[key] = (job.layer, found)
        for (name, statistic, group), (layer, found) in merged.items():
            spectrum = (name, statistic)
            index = self.index(layer)
            limit = min(layer.shape)
            if spectrum not in record.spectra:
                record.spectra[spectrum] = np.full((groups, len(index)), np.nan, dtype=np.float32)
                record.sigma_1[spectrum] = np.full(groups, np.nan)
                complete[spectrum] = np.full((groups, limit), np.nan)
            # A share of few rows was reduced to as many values: the others are zero, not missing.
            width = limit if statistic == "gradient" else len(found)
            usable = np.flatnonzero(index <= min(width, layer.widths.get(statistic, width)))
            padded = _padded(found, max(width, limit))
            record.spectra[spectrum][group, usable] = padded[index[usable] - 1]
            record.sigma_1[spectrum][group] = found[0]
            complete[spectrum][group] = padded[:limit]

    def _floors(self, record: Record, layer: WatchedLayer, pending: Pending) -> None:
        rows = record.rows[layer.name]
        shapes = {"gradient": layer.shape}
        for statistic, width in layer.widths.items():
            shapes[statistic] = (width, 1)
        for statistic in ("gradient", "activation", "adjoint"):
            key = (layer.name, statistic)
            if key in record.sigma_1:
                dtype = pending.dtype or torch.float32
                floor = noise_floor(record.sigma_1[key], shapes[statistic], rows, dtype, statistic)
                record.floors[key] = floor.astype(np.float32)

    def _group_sizes(self) -> np.ndarray:
        """Count the samples in each group, over all micro-batches of the step."""
        sizes = [layer.pending.sizes for layer in self.layers if layer.pending and layer.pending.sizes is not None]
        return np.max(sizes, axis=0) if sizes else np.zeros(len(self.groups), dtype=np.int64)

    # ------------------------------------------------------------------ what goes beyond one spectrum a group

    def _more(
        self, record: Record, layer: WatchedLayer, pending: Pending, complete: dict[tuple[str, str], np.ndarray]
    ) -> None:
        parts = [complete.get((layer.name, statistic)) for statistic in ("gradient", "activation", "adjoint")]
        forms = len(pending.stacks["activation"]) + len(pending.indices)
        if layer.true_factor and forms <= 1 and all(part is not None for part in parts):
            gradient, activation, adjoint = parts
            assert gradient is not None
            assert activation is not None
            assert adjoint is not None
            largest = (activation * adjoint).sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):
                record.alignment[layer.name] = (gradient.sum(1) / largest).astype(np.float32)
        if max((len(total) for total in pending.by_position.values()), default=0) > 1:
            record.by_position[layer.name] = self._by_position(layer, pending)
        if any(statistic in self.statistics for statistic in CONTRASTS):
            self._contrasts(record, layer, pending)

    def _by_position(self, layer: WatchedLayer, pending: Pending) -> np.ndarray:
        cells_of = self._cells_of(tuple(pending.rows))
        positions = max(len(total) for total in pending.by_position.values())
        index = self.index(layer)
        index = index[index <= min(layer.shape)]
        result = np.full((len(self.groups), positions, len(self.index(layer))), np.nan, dtype=np.float32)
        for group, cells in enumerate(cells_of):
            if not cells:
                continue
            totals = [pending.by_position[key] for key in cells]
            total = totals[0].new_zeros(positions, *layer.shape)
            for each in totals:
                total[: len(each)] += each
            values = singular_values([lower_gram(total)])[0].cpu().numpy()
            result[group, :, : len(index)] = values[:, index - 1]
        return result

    def _contrasts(self, record: Record, layer: WatchedLayer, pending: Pending) -> None:
        cells_of = self._cells_of(tuple(pending.rows))
        present = sorted({group for pair in self.pairs for group in pair if cells_of[group]})
        if not present:
            return
        shares = [[pending.shares[key] for key in cells_of[group]] for group in present]
        matrices = dict(zip(present, float64(share_matrices(shares)), strict=True))
        index = self.index(layer)
        usable = index <= min(layer.shape)
        bases: dict[int, Tensor] = {}
        floors = record.floors.get((layer.name, "gradient"))
        pairs = [(a, b) for a, b in self.pairs if a in matrices and b in matrices]
        sizes = record.group_size
        if "contrast" in self.statistics:
            grams = [lower_gram(matrices[a] / int(sizes[a]) - matrices[b] / int(sizes[b])) for a, b in pairs]
            for (a, b), values in zip(pairs, singular_values(grams), strict=True):
                spectrum = np.full(len(index), np.nan, dtype=np.float32)
                spectrum[usable] = values.cpu().numpy()[index[usable] - 1]
                record.contrasts[self._pair(a, b), layer.name, "gradient"] = spectrum
                if floors is not None:
                    floor = np.float32(floors[a] / sizes[a] + floors[b] / sizes[b])
                    record.contrasts[self._pair(a, b), layer.name, "gradient_noise_floor"] = np.asarray(floor)
        if "cosine" in self.statistics:
            norms = {group: torch.linalg.vector_norm(matrix) for group, matrix in matrices.items()}
            for a, b in pairs:
                cosine = (matrices[a] * matrices[b]).sum() / (norms[a] * norms[b])
                record.contrasts[self._pair(a, b), layer.name, "cosine"] = np.asarray(float(cosine), np.float32)
        if "angles" in self.statistics:
            count = min(self.directions, *layer.shape)
            bases = {group: leading_directions(matrix, count) for group, matrix in matrices.items()}
            for a, b in pairs:
                angles = np.full(len(index), np.nan, dtype=np.float32)
                found = principal_angles(bases[a], bases[b]).cpu().numpy()[: len(index)]
                angles[: len(found)] = found
                record.contrasts[self._pair(a, b), layer.name, "angles"] = angles

    def pair_names(self) -> list[str]:
        """The pairs of groups that are compared."""
        wanted = any(statistic in self.statistics for statistic in CONTRASTS)
        return [self._pair(a, b) for a, b in self.pairs] if wanted else []

    def _pair(self, a: int, b: int) -> str:
        return f"{self.groups[a]} - {self.groups[b]}"


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    """Fill up with zeros, or with NaN where the values are not finite."""
    if len(values) >= width:
        return values
    return np.concatenate([values, np.full(width - len(values), values[0] * 0)])
