"""From what has arrived for each parameter to the spectra of one step."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .audit import Audit
from .errors import WatchError
from .pending import Pending
from .sorting import cells_of_groups
from .spectra import has_float64, leading_directions, noise_floor, principal_angles, singular_values, smaller_gram
from .stacks import IndexStack, RowStack, together
from .tracked import Block, leading_values, worthwhile
from .tree import Record
from .uses import ConstantInput, WatchedLayer

CONTRASTS = ("contrast", "cosine", "angles")
# Pairs of groups from which on their places in the tree take seconds.
MANY_PAIRS = 200
# Decompositions are put off until there are this many steps, or this much memory of Gram matrices, to solve together.
STEPS_TOGETHER = 16
BYTES_TOGETHER = 2**23
BYTES_TOGETHER_ON_A_GPU = 2**28  # to decompose, the processor waits for it


@dataclass
class _Spectra:
    """Gram matrices, or the values where they are known already."""

    grams: Tensor | None
    values: Tensor | None

    @property
    def bytes(self) -> int:
        """Memory that is held until they are decomposed."""
        return 0 if self.grams is None else self.grams.nbytes


@dataclass
class _Job(_Spectra):
    """Spectra of one layer for some groups."""

    layer: WatchedLayer
    statistic: str
    groups: list[int]


@dataclass
class _Other(_Spectra):
    """Other numbers of a layer, and what takes them into the record."""

    put: Callable[[np.ndarray], None]


@dataclass
class _Open:
    """A record whose decompositions have not been carried out."""

    record: Record
    jobs: list[_Job]
    dtypes: dict[str, torch.dtype]
    others: list[_Other] = field(default_factory=list)


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
        self._constants: dict[str, tuple[ConstantInput, list[_Job]]] = {}
        self._open: list[_Open] = []
        self._open_bytes = 0
        self._blocks: dict[str, Block | None] = {}
        self.audit: Audit | None = None
        self.iterations: dict[int, int] = {}

    def name_groups(self, names: Sequence[str], groupings: Sequence[str]) -> None:
        """Take the groups: pairs are compared within a grouping."""
        self.groups = tuple(names)
        self.pairs = [
            (a, b) for a, b in itertools.combinations(range(1, len(names)), 2) if groupings[a] == groupings[b]
        ]
        self._cells = ((), [])
        compared = [name for name in CONTRASTS if name in self.statistics]
        twice = [name for name, count in Counter(self.pair_names()).items() if count > 1]
        if twice:
            raise WatchError(
                f"{', '.join(compared)}: two pairs of groups have the name '{twice[0]}' in the tree: rename labels that hold ' - '."
            )
        if compared and len(self.pairs) > MANY_PAIRS:
            warnings.warn(
                f"{', '.join(compared)}: {len(self.pairs)} pairs of groups are compared at every layer, each with a place of its own "
                "in the tree, which takes long to write and to read: choose coarser groups.",
                stacklevel=5,
            )

    def forget(self) -> None:
        """Let go of what is kept from step to step."""
        self._constants = {}

    def solver_state(self) -> dict[str, Any]:
        """What the tracked solver must keep in a checkpoint."""
        return {key: None if block is None else block.state() for key, block in self._blocks.items()}

    def restore_solver(self, state: Mapping[str, Any]) -> None:
        """Continue from `solver_state`."""
        self._blocks = {key: None if block is None else Block.from_state(block) for key, block in state.items()}

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

    def record(self, step: int, sizes: np.ndarray | None) -> Record:
        """Take everything pending, of groups of these sizes; the spectra are in the record after `finish`."""
        record = Record(step, np.zeros(len(self.groups), dtype=np.int64) if sizes is None else sizes)
        opened = _Open(record, [], {})
        for layer in self.layers:
            pending = layer.pending
            if pending is None:
                continue
            cells_of = self._cells_of(tuple(pending.rows))
            rows = np.array([sum(pending.rows[key] for key in cells) for cells in cells_of])
            # What a weight is computed by may raise the rank of a parameter's share.
            limit = np.minimum(min(layer.shape), np.where(layer.computed, min(layer.shape) * (rows > 0), rows))
            layer.rank_limit = limit if layer.rank_limit is None else np.maximum(layer.rank_limit, limit)
            record.rows[layer.name] = rows
            opened.dtypes[layer.name] = pending.dtype or torch.float32
            present = [group for group, cells in enumerate(cells_of) if cells]
            if "gradient" in self.statistics:
                for positions, grams in pending.shares.grams([cells_of[group] for group in present]):
                    opened.jobs.append(_Job(grams, None, layer, "gradient", [present[i] for i in positions]))
            for statistic in ("activation", "adjoint"):
                if statistic in self.statistics:
                    self._factor_jobs(opened, layer, pending, statistic, present, cells_of)
        for layer in self.layers:
            if layer.pending is not None:
                self._more(opened, layer, layer.pending)
        self._open.append(opened)
        self._open_bytes += sum(each.bytes for each in (*opened.jobs, *opened.others))
        return record

    @property
    def due(self) -> bool:
        """Whether enough has been put off for `finish`."""
        return len(self._open) >= STEPS_TOGETHER or self._open_bytes >= self._most_bytes

    @property
    def _most_bytes(self) -> int:
        parameter = self.layers[0].parameter
        return BYTES_TOGETHER if parameter.is_cpu or not has_float64(parameter.device) else BYTES_TOGETHER_ON_A_GPU

    def _factor_jobs(
        self,
        opened: _Open,
        layer: WatchedLayer,
        pending: Pending,
        statistic: str,
        present: Sequence[int],
        cells_of: Sequence[Sequence[bytes]],
    ) -> None:
        constant = layer.inputs[0] if statistic == "activation" and len(layer.inputs) == 1 else None
        if constant is not None:
            known = self._constants.get(layer.name)
            if known is not None and known[0].same(constant) and known[0].everywhere == constant.everywhere:
                opened.jobs += known[1]
                return
        jobs = []
        for width, stacks in pending.stacks[statistic].items():
            there = {group: [stacks[key] for key in cells_of[group] if key in stacks] for group in present}
            there = {group: found for group, found in there.items() if found}
            if self.solver == "tracked" and constant is None:  # what stays the same is decomposed once
                jobs += self._follow(layer, statistic, width, there)
            by_size: dict[int, tuple[list[int], list[Tensor]]] = {}
            for group, found in there.items():
                gram = RowStack.merged_gram(found)
                groups, grams = by_size.setdefault(len(gram), ([], []))
                groups.append(group)
                grams.append(gram)
            jobs += [_Job(torch.stack(grams), None, layer, statistic, groups) for groups, grams in by_size.values()]
        if statistic == "activation":
            for indices in pending.indices.values():
                for group in present:
                    index_stacks = [indices[key] for key in cells_of[group] if key in indices]
                    if index_stacks:
                        values = IndexStack.merged_spectrum(index_stacks).unsqueeze(0)
                        jobs.append(_Job(None, values, layer, statistic, [group]))
        if constant is not None:
            self._constants[layer.name] = (constant, jobs)
        opened.jobs += jobs

    def _follow(self, layer: WatchedLayer, statistic: str, width: int, there: dict[int, list[RowStack]]) -> list[_Job]:
        """Leading values by the tracked solver, of the groups for which it is worthwhile; these leave the table.

        Where these groups are others than at the last step, there is nothing to follow, and maybe nothing will be.
        """
        count = self.wanted_count(layer)
        sizes = {group: sum(stack.count for stack in stacks) for group, stacks in there.items()}
        chosen = worthwhile(tuple(sizes.values()), width, count)
        # Rows that were not worth keeping when they came are gone.
        groups = [
            g for g, follow in zip(sizes, chosen, strict=True) if follow and all(stack.rows for stack in there[g])
        ]
        if not groups:
            return []
        place = f"{layer.name}/{statistic}/{width}/"
        key = place + ", ".join(self.groups[group] for group in groups)
        if key not in self._blocks:
            # Mini-batches may hold other groups each time: a block of such groups would be kept and never be used again.
            others = [each for each in self._blocks if each.startswith(place)]
            for each in others:
                del self._blocks[each]
            self._blocks[key] = None
            if others:
                return []
        matrices = [together([part for stack in there.pop(group) for part in stack.flat_rows()]) for group in groups]
        found = leading_values(matrices, count, self._blocks.get(key))
        self._blocks[key] = found.block
        if self.audit is not None and found.iterations:
            exact = leading_values(matrices, count, None).values
            what = f"{statistic}s of '{layer.name}'"
            self.audit.compare_followed(what, found.values, exact, not matrices[0].is_cpu)
        self.iterations[found.iterations] = self.iterations.get(found.iterations, 0) + 1
        return [_Job(None, found.values, layer, statistic, groups)]

    def follows(self, layer: WatchedLayer, counts: Sequence[int], width: int) -> bool:
        """Whether the tracked solver will need rows as they are, of which so many have come for each cell."""
        return any(worthwhile((sum(counts), *counts), width, self.wanted_count(layer)))

    def wanted_count(self, layer: WatchedLayer) -> int:
        """How many leading values of the factors are needed."""
        return int(self.index(layer).max())

    def _cells_of(self, keys: tuple[bytes, ...]) -> list[list[bytes]]:
        """Cells of each group; the same every step, as a rule."""
        if self._cells[0] != keys:
            self._cells = (keys, cells_of_groups(keys, len(self.groups)))
        return self._cells[1]

    # ------------------------------------------------------------------ decompositions

    def finish(self) -> list[Record]:
        """Carry out the decompositions that were put off; return the records."""
        opened, self._open, self._open_bytes = self._open, [], 0
        unsolved = list({id(job): job for each in opened for job in each.jobs if job.values is None}.values())
        others = [other for each in opened for other in each.others]
        self._solve([*unsolved, *others])
        self._put(others)
        # Steps whose jobs are alike are stored together.
        by_form: dict[tuple[tuple[str, str, tuple[int, ...], int], ...], list[_Open]] = {}
        for each in opened:
            form = tuple(
                (job.layer.name, job.statistic, tuple(job.groups), job.values.shape[-1])
                for job in each.jobs
                if job.values is not None
            )
            by_form.setdefault(form, []).append(each)
        for same in by_form.values():
            self._store(same)
        if "contrast" in self.statistics and "gradient" in self.statistics:
            for each in opened:
                self._contrast_floors(each.record)
        return [each.record for each in opened]

    @staticmethod
    def _put(others: Sequence[_Other]) -> None:
        """Take other numbers into their records, brought over from the device together."""
        found = [other.values for other in others if other.values is not None]
        if found:
            numbers = torch.cat([values.flatten() for values in found]).cpu()
            parts = numbers.split([values.numel() for values in found])
            for other, values, part in zip(others, found, parts, strict=True):
                other.put(part.view(values.shape).numpy())

    @staticmethod
    def _solve(jobs: Sequence[_Spectra]) -> None:
        """Decompose; on a GPU all matrices of equal size in one call.

        On the CPU the last bit of LAPACK's results depends on where a matrix lies in memory, and a training that is
        resumed shall record the same bits: there each job, which is alike at every step, has a call of its own.
        """
        together = [job for job in jobs if job.grams is not None and not job.grams.is_cpu]
        alone = [[job] for job in jobs if job.grams is not None and job.grams.is_cpu]
        for some in [together, *alone]:
            grams = [job.grams for job in some if job.grams is not None]
            for job, values in zip(some, singular_values(grams), strict=True):
                job.values, job.grams = values, None

    def _contrast_floors(self, record: Record) -> None:
        """The noise of a difference of shares is at most the sum of theirs."""
        for name, rows in record.rows.items():
            floors = record.floors[name, "gradient"]
            for a, b in self.pairs:
                if rows[a] and rows[b]:
                    floor = floors[a] / record.group_size[a] + floors[b] / record.group_size[b]
                    record.contrasts[self._pair(a, b), name, "gradient_noise_floor"] = np.asarray(floor, np.float32)

    def _store(self, opened: list[_Open]) -> None:
        """Spectra, largest values, noise floors and alignment of steps that have the same jobs."""
        steps, groups = len(opened), len(self.groups)
        jobs_of: dict[tuple[str, str], list[int]] = {}
        for number, job in enumerate(opened[0].jobs):
            jobs_of.setdefault((job.layer.name, job.statistic), []).append(number)
        complete: dict[tuple[str, str], np.ndarray] = {}
        incomplete: set[str] = set()
        for key, numbers in jobs_of.items():
            layer = opened[0].jobs[numbers[0]].layer
            statistic, limit, index = key[1], min(layer.shape), self.index(layer)
            widths = np.zeros(groups, dtype=np.int64)
            for number in numbers:
                job = opened[0].jobs[number]
                assert job.values is not None
                widths[job.groups] += job.values.shape[-1]
            values = np.full((steps, groups, max(int(widths.max()), limit)), np.nan)
            filled, parts = np.zeros(groups, dtype=np.int64), np.zeros(groups, dtype=np.int64)
            for number in numbers:
                found = torch.stack([_values(each.jobs[number]) for each in opened]).cpu().numpy()
                for group, row in zip(opened[0].jobs[number].groups, found.swapaxes(0, 1), strict=True):
                    values[:, group, filled[group] : filled[group] + row.shape[1]] = row
                    filled[group] += row.shape[1]
                    parts[group] += 1
            if filled.max() < min(
                limit, layer.widths.get(statistic, limit), int(opened[0].record.rows[layer.name].max())
            ):
                incomplete.add(key[0])  # the tracked solver found the leading ones alone
            if parts.max() > 1:
                values = -np.sort(-values, axis=-1)  # rows from different spaces: the spectra of both
                incomplete.add(key[0])
            # A share of few rows was reduced to as many values: the others are zero (NaN where it is not finite).
            for group in np.flatnonzero(filled).tolist():
                values[:, group, filled[group] :] = values[:, group, :1] * 0
            values[values[:, :, 0] > np.finfo(np.float32).max] = np.nan  # the record cannot hold it
            sigma_1 = values[:, :, 0].copy()
            complete[key] = values[:, :, :limit]
            kept = np.full((steps, groups, len(index)), np.nan, dtype=np.float32)
            for group in np.flatnonzero(filled).tolist():
                width = limit if statistic == "gradient" else int(filled[group])
                usable = np.flatnonzero(index <= min(width, layer.widths.get(statistic, width)))
                kept[:, group, usable] = values[:, group, index[usable] - 1]
            floors = self._floors(opened, layer, statistic, sigma_1)
            for step, each in enumerate(opened):
                each.record.spectra[key] = kept[step]
                each.record.sigma_1[key] = sigma_1[step]
                each.record.floors[key] = floors[step]
        self._align(opened, {key: values for key, values in complete.items() if key[0] not in incomplete})

    def _floors(self, opened: list[_Open], layer: WatchedLayer, statistic: str, sigma_1: np.ndarray) -> np.ndarray:
        shape = layer.shape if statistic == "gradient" else (layer.widths[statistic], 1)
        rows = np.array([each.record.rows[layer.name] for each in opened])
        dtype = opened[0].dtypes[layer.name]
        return noise_floor(sigma_1, shape, rows, dtype, statistic).astype(np.float32)

    def _align(self, opened: list[_Open], complete: dict[tuple[str, str], np.ndarray]) -> None:
        """Alignment, where the factors' whole spectra are known."""
        for name in {key[0] for key in complete}:
            parts = [complete.get((name, statistic)) for statistic in ("gradient", "activation", "adjoint")]
            layer = next(job.layer for job in opened[0].jobs if job.layer.name == name)
            if not layer.true_factor or any(part is None for part in parts):
                continue
            gradient, activation, adjoint = parts
            assert gradient is not None
            assert activation is not None
            assert adjoint is not None
            with np.errstate(invalid="ignore", divide="ignore"):
                alignment = (gradient.sum(2) / (activation * adjoint).sum(2)).astype(np.float32)
            for step, each in enumerate(opened):
                each.record.alignment[name] = alignment[step]

    # ------------------------------------------------------------------ what goes beyond one spectrum a group

    def _more(self, opened: _Open, layer: WatchedLayer, pending: Pending) -> None:
        positions = max((len(total) for total in pending.by_position.values()), default=0)
        layer.has_positions = layer.has_positions or positions > 1
        if positions and layer.has_positions:
            self._by_position(opened, layer, pending)
        if any(statistic in self.statistics for statistic in CONTRASTS):
            self._contrasts(opened, layer, pending)

    def _add(self, opened: _Open, other: _Other) -> None:
        """Put other spectra off, on a GPU and while they are small: on the processor nothing is gained by waiting."""
        opened.others.append(other)
        there = other.grams if other.values is None else other.values
        assert there is not None
        if there.is_cpu or sum(each.bytes for each in opened.others) >= self._most_bytes:
            self._solve(opened.others)
            self._put(opened.others)
            opened.others = []

    def _by_position(self, opened: _Open, layer: WatchedLayer, pending: Pending) -> None:
        cells_of = self._cells_of(tuple(pending.rows))
        positions = max(len(total) for total in pending.by_position.values())
        index = self.index(layer)
        index = index[index <= min(layer.shape)]
        result = np.full((len(self.groups), positions, len(self.index(layer))), np.nan, dtype=np.float32)

        def put(group: int, values: np.ndarray) -> None:
            result[group, :, : len(index)] = values[:, index - 1]

        for group, cells in enumerate(cells_of):
            if not cells:
                continue
            totals = [pending.by_position[key] for key in cells]
            total = totals[0].new_zeros(positions, *layer.shape)
            for each in totals:
                total[: len(each)] += each
            self._add(opened, _Other(smaller_gram(total), None, functools.partial(put, group)))
        opened.record.by_position[layer.name] = result

    def _contrasts(self, opened: _Open, layer: WatchedLayer, pending: Pending) -> None:
        cells_of = self._cells_of(tuple(pending.rows))
        present = sorted({group for pair in self.pairs for group in pair if cells_of[group]})
        if not present:
            return
        shares = pending.shares.matrices([cells_of[group] for group in present])
        matrices = dict(zip(present, shares, strict=True))
        index, record = self.index(layer), opened.record
        usable = index <= min(layer.shape)
        pairs = [(a, b) for a, b in self.pairs if a in matrices and b in matrices]
        names, sizes = [self._pair(a, b) for a, b in pairs], record.group_size
        if "contrast" in self.statistics and pairs:
            differences = (matrices[a] / int(sizes[a]) - matrices[b] / int(sizes[b]) for a, b in pairs)

            def put_spectra(values: np.ndarray) -> None:
                for name, of_pair in zip(names, values, strict=True):
                    spectrum = np.full(len(index), np.nan, dtype=np.float32)
                    spectrum[usable] = of_pair[index[usable] - 1]
                    record.contrasts[name, layer.name, "gradient"] = spectrum

            self._add(opened, _Other(torch.stack(list(map(smaller_gram, differences))), None, put_spectra))
        if "cosine" in self.statistics and pairs:
            norms = {group: torch.linalg.vector_norm(matrix) for group, matrix in matrices.items()}
            cosines = [(matrices[a] * matrices[b]).sum() / (norms[a] * norms[b]) for a, b in pairs]

            def put_cosines(values: np.ndarray) -> None:
                for name, value in zip(names, values, strict=True):
                    record.contrasts[name, layer.name, "cosine"] = np.asarray(value, np.float32)

            self._add(opened, _Other(None, torch.stack(cosines), put_cosines))
        if "angles" in self.statistics:
            # Subspaces as large as the whole space have no angle between them.
            outputs, inputs = layer.shape[::-1] if layer.inputs_first else layer.shape
            count = min(self.directions, outputs, max(inputs - 1, 1))
            dtype = pending.dtype or torch.float32
            bases = {
                group: leading_directions(matrix.mT if layer.inputs_first else matrix, count, dtype)
                for group, matrix in matrices.items()
            }
            for a, b in pairs:
                angles = np.full(len(index), np.nan, dtype=np.float32)
                found = principal_angles(bases[a], bases[b]).cpu().numpy()
                there = index <= len(found)
                angles[there] = found[index[there] - 1]
                record.contrasts[self._pair(a, b), layer.name, "angles"] = angles

    def pair_names(self) -> list[str]:
        """The pairs of groups that are compared."""
        wanted = any(statistic in self.statistics for statistic in CONTRASTS)
        return [self._pair(a, b) for a, b in self.pairs] if wanted else []

    def _pair(self, a: int, b: int) -> str:
        return f"{self.groups[a]} - {self.groups[b]}"


def _values(job: _Job) -> Tensor:
    assert job.values is not None
    return job.values
