"""Several processes with a part of the batch each: what is pending becomes that of the global batch.

DistributedDataParallel averages the processes' gradients, so the loss whose gradient trains the model is the mean
of the processes' losses, and a share or an adjoint of the global batch is the local one divided by their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .errors import WatchError
from .pending import Pending
from .stacks import IndexStack, RowStack
from .uses import WatchedLayer
from .workspace import Workspace


class Processes:
    """The processes that train one model together.

    Parameters
    ----------
    group : ProcessGroup
        The model's own.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.count = dist.get_world_size(group)

    def agree(self, value: int) -> int:
        """Everybody takes the largest of the processes' numbers."""
        return max(self._everybody(value))

    def require_same(self, groups: Sequence[str]) -> None:
        """Refuse groups that differ between processes."""
        if len({tuple(each) for each in self._everybody(list(groups))}) > 1:
            raise WatchError(
                "the processes were given different groups: give watch(groups=...) the labels of the whole data set in each "
                "process, then set_groups() those of its own part."
            )

    def require_all(self, model: Any) -> None:
        """Refuse training in which processes may end at different steps.

        At each recorded step every process waits for the others.
        """
        joining = getattr(model, "_join_config", None)  # torch's Join sets it, and does not take it back
        if joining is not None and joining.enable:
            raise WatchError(
                "the processes train under Join, which lets one end before another, but watching needs all of them at each step: "
                "give every process as many batches, with DistributedSampler(drop_last=True) say, leave Join out, and wrap anew a "
                "model that was under it before."
            )

    def join(self, layers: Sequence[WatchedLayer], workspace: Workspace) -> None:
        """Replace what is pending by that of the global batch; every process calls this at the same steps."""
        described = self._everybody([_describe(layer) for layer in layers])
        for layer, descriptions in zip(layers, zip(*described, strict=True), strict=True):
            if any(descriptions):
                layer.pending = self._joined(layer, descriptions, workspace)
                layer.note_widths(layer.pending.widths())
                layer.true_factor = all(each["true_factor"] for each in descriptions if each)
                layer.has_positions = any(each["has_positions"] for each in descriptions if each)
                layer.computed = any(each["computed"] for each in descriptions if each)
                layer.inputs_first = all(each["inputs_first"] for each in descriptions if each)
                constants = tuple(each.get("constant") for each in descriptions)
                own = layer.inputs[0] if layer.inputs and None not in constants else None
                layer.inputs = [] if own is None else [replace(own, everywhere=constants)]

    def total(self, sizes: np.ndarray | None) -> np.ndarray | None:
        """Add the sizes of the groups in every process's part of the batch."""
        there = [each for each in self._everybody(sizes) if each is not None]
        return np.sum(there, axis=0) if there else None

    def _joined(self, layer: WatchedLayer, descriptions: Sequence[dict[str, Any]], workspace: Workspace) -> Pending:
        like = layer.parameter
        own = layer.pending or Pending(layer.shape, workspace)
        total = Pending(layer.shape, workspace)
        there = [each for each in descriptions if each]
        total.dtype = next(each["dtype"] for each in there)
        keys = sorted({key for each in there for key in each["rows"]}, reverse=True)
        total.rows = {key: sum(each["rows"].get(key, 0) for each in there) for key in keys}
        if any(each["shares"] for each in there):
            for key in keys:
                zeros = torch.zeros(*layer.shape, dtype=torch.float64, device=like.device)
                matrix = own.shares.matrix([key]).double() if key in own.shares.counts else zeros
                total.shares.put(key, self._mean(matrix.clone()), total.rows[key])
        for statistic in ("activation", "adjoint"):
            for width in sorted({width for each in there for width in each[statistic]}):
                stacks = own.stacks[statistic].get(width, {})
                joined = total.stacks[statistic][width] = {}
                for key in sorted({key for each in there for key in each[statistic].get(width, ())}, reverse=True):
                    counts = [each.get(statistic, {}).get(width, {}).get(key, (0, True)) for each in descriptions]
                    joined[key] = self._joined_rows(
                        stacks.get(key), width, counts, like, statistic == "adjoint", workspace
                    )
                total.note_width(statistic, width)
        for width in sorted({width for each in there for width in each["indices"]}):
            table = total.indices[width] = {}
            for key in keys:
                mine = own.indices.get(width, {}).get(key)
                none = torch.zeros(width, dtype=torch.int64, device=like.device)
                stack = table[key] = IndexStack(width)
                stack.count = sum(each.get("indices", {}).get(width, {}).get(key, 0) for each in descriptions)
                stack.counts = self._sum(none if mine is None or mine.counts is None else mine.counts.clone())
            total.note_width("activation", width)
        positions = max(each["positions"] for each in there)
        if positions:
            for key in keys:
                whole = like.new_zeros(positions, *layer.shape)
                if key in own.by_position:
                    whole[: len(own.by_position[key])] = own.by_position[key]
                total.by_position[key] = self._mean(whole)
        if any(each["exact"] for each in there):
            zeros = torch.zeros(*layer.shape, dtype=torch.float64, device=like.device)
            total.exact = {key: self._mean(own.exact.get(key, zeros).clone()) for key in keys}
        if any(each["arrived"] for each in there):
            zeros = torch.zeros(*layer.shape, dtype=torch.float64, device=like.device)
            total.arrived = self._mean(zeros if own.arrived is None else own.arrived.clone())
            total.unnoted = any(each["unnoted"] for each in there)
        return total

    def _joined_rows(
        self,
        stack: RowStack | None,
        width: int,
        counts: Sequence[tuple[int, bool]],
        like: Tensor,
        scaled: bool,
        workspace: Workspace,
    ) -> RowStack:
        """Rows of every process while they are few, else their Gram matrices' sum."""
        joined = RowStack(width, workspace)
        factor = 1 / self.count if scaled else 1.0
        total = sum(count for count, _ in counts)
        if all(kept for count, kept in counts if count):
            most = max(count for count, _ in counts)
            rows = like.new_zeros(most, width)
            if stack is not None:
                rows[: stack.count] = torch.cat(stack.flat_rows())
            parts = [torch.empty_like(rows) for _ in counts]
            dist.all_gather(parts, rows, group=self.group)
            joined.rows = [torch.cat([part[:count] for part, (count, _) in zip(parts, counts, strict=True)]) * factor]
        else:
            zeros = torch.zeros(width, width, dtype=torch.float64, device=like.device)
            gram = zeros if stack is None else stack.column_gram().clone()
            joined.set_column_gram(self._sum(gram) * factor**2)
        joined.count = total
        return joined

    def _sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _mean(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor).div_(self.count)

    def _everybody(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values


def _describe(layer: WatchedLayer) -> dict[str, Any]:
    """What the other processes must know; empty where nothing is pending."""
    pending = layer.pending
    if pending is None:
        return {}
    constant = layer.inputs[0] if len(layer.inputs) == 1 else None
    stacks = {
        statistic: {
            width: {key: (stack.count, bool(stack.rows)) for key, stack in table.items()}
            for width, table in pending.stacks[statistic].items()
        }
        for statistic in ("activation", "adjoint")
    }
    return {
        "dtype": pending.dtype,
        "rows": pending.rows,
        "shares": bool(pending.shares.counts),
        "indices": {
            width: {key: stack.count for key, stack in table.items()} for width, table in pending.indices.items()
        },
        "positions": max((len(total) for total in pending.by_position.values()), default=0),
        "exact": bool(pending.exact),
        "arrived": pending.arrived is not None,
        "unnoted": pending.unnoted,
        "true_factor": layer.true_factor,
        "has_positions": layer.has_positions,
        "computed": layer.computed,
        "inputs_first": layer.inputs_first,
        "constant": constant and constant.told(),
        **stacks,
    }
