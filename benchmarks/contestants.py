"""The ways to get spectra during training that are compared, written as a competent user would write them.

Each is a `Contestant`: `open`, then `step` once per parameter update (the whole training step, with the
measuring in it), then `close`, which returns what was recorded.  To add one, subclass and list it in
`CONTESTANTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from models import Batch, Case
from torch import Tensor, nn

Recorded = dict[tuple[str, str], np.ndarray]
"""(parameter, statistic) -> array (step, group, index); group 0 is the whole batch."""


class Contestant:
    """One way to train and to record; this one records nothing: the plain step."""

    title = "plain step"
    statistics: tuple[str, ...] = ("gradient", "activation", "adjoint")
    """What it can record."""
    groups_recorded = True
    """Whether it records each group, not just the whole batch."""
    training_unchanged = True
    """Whether weights stay bitwise those of the plain training."""

    def __init__(self, case: Case, model: nn.Module, batch: Batch, statistics: Sequence[str]) -> None:
        self.case, self.model, self.batch = case, model, batch
        self.wanted = tuple(statistics)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        modules = dict(model.named_modules())
        self.layers = {f"{name}.weight": m for name, m in modules.items() if isinstance(m, nn.Linear)}
        self.rows = batch.rows_of_groups()
        self.spectra: dict[tuple[str, str], list[Tensor]] = {}

    def open(self) -> None:
        """Do what comes before the first step."""

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.case.loss(self.model(self.batch.x), self.batch.target).backward()
        self.optimizer.step()

    def close(self) -> Recorded:
        """Do what comes after the last step, and hand over everything as arrays."""
        return {key: torch.stack(values).cpu().numpy() for key, values in self.spectra.items()}

    def keep(self, layer: str, statistic: str, matrices: Sequence[Tensor]) -> None:
        """Record the leading singular values of the matrices, one a group (or just the batch's)."""
        count = min(self.layers[layer].weight.shape)
        values = torch.full((len(matrices), count), torch.nan, device=matrices[0].device)
        if len({matrix.shape for matrix in matrices}) == 1:
            found = torch.linalg.svdvals(torch.stack(list(matrices)))
            values[:, : found.shape[1]] = found[:, :count]
        else:
            for row, matrix in zip(values, matrices, strict=True):
                found = torch.linalg.svdvals(matrix)[:count]
                row[: len(found)] = found
        self.spectra.setdefault((layer, statistic), []).append(values)


class _WithFactors(Contestant):
    """Base of the rivals that look at what enters a layer (A) and at the derivative at its output (Delta)."""

    def open(self) -> None:
        self.activations: dict[str, Tensor] = {}
        self.adjoints: dict[str, Tensor] = {}
        self.handles = [module.register_forward_hook(self._forward_hook(name)) for name, module in self.layers.items()]

    def _forward_hook(self, name: str) -> Callable:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.activations[name] = args[0].detach()
            if output.requires_grad:
                output.register_hook(lambda adjoint: self.adjoints.__setitem__(name, adjoint))

        return hook

    def close(self) -> Recorded:
        for handle in self.handles:
            handle.remove()
        return super().close()


class Svdvals(_WithFactors):
    """Spectra of the whole batch alone: no groups at all."""

    title = "svdvals of the batch alone"
    groups_recorded = False
    repeats = 1

    def open(self) -> None:
        if self.wanted != ("gradient",):
            super().open()
        else:
            self.handles = []

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.case.loss(self.model(self.batch.x), self.batch.target).backward()
        for name, module in self.layers.items():
            if "gradient" in self.wanted:
                self.keep(name, "gradient", [module.weight.grad] * self.repeats)
            if "activation" in self.wanted:
                self.keep(name, "activation", [self.activations[name]])
            if "adjoint" in self.wanted:
                self.keep(name, "adjoint", [self.adjoints[name]])
        self.optimizer.step()


class SvdvalsRepeated(Svdvals):
    """As many decompositions as there are groups, and the batch, but of the batch's gradient each time.

    What anyone pays who calls svdvals for the batch and each group, however cheaply the gradients came.
    """

    title = "svdvals alone, C + 1 times"
    statistics = ("gradient",)

    def open(self) -> None:
        super().open()
        self.repeats = 1 + len(self.rows)


class Naive(Contestant):
    """C + 1 backward passes through one graph: the batch's loss, then each group's part of it."""

    title = "naive: C + 1 backward passes"
    statistics = ("gradient",)

    def step(self) -> None:
        self.optimizer.zero_grad()
        output = self.model(self.batch.x)
        weights = [module.weight for module in self.layers.values()]
        parts = []
        for rows in self.rows:
            loss = self.case.loss(output[rows], self.batch.target[rows]) * (len(rows) / len(output))
            parts.append(torch.autograd.grad(loss, weights, retain_graph=True))
        self.case.loss(output, self.batch.target).backward()
        for position, (name, module) in enumerate(self.layers.items()):
            self.keep(name, "gradient", [module.weight.grad, *(part[position] for part in parts)])
        self.optimizer.step()


class SubBatch(_WithFactors):
    """The batch's pass, then one forward and backward pass for each group's samples."""

    title = "sub-batch"

    def open(self) -> None:
        if self.wanted != ("gradient",):
            super().open()
        else:
            self.handles = []
        # The batch is the same at every step, so its groups are cut out once.
        self.parts = [(self.batch.x[rows], self.batch.target[rows]) for rows in self.rows]

    def step(self) -> None:
        weights = [module.weight for module in self.layers.values()]
        gradients, factors = [], []
        for x, target in self.parts:
            loss = self.case.loss(self.model(x), target) * (len(x) / len(self.batch.x))
            gradients.append(torch.autograd.grad(loss, weights))
            if self.handles:
                factors.append((dict(self.activations), dict(self.adjoints)))
        self.optimizer.zero_grad()
        self.case.loss(self.model(self.batch.x), self.batch.target).backward()
        if self.handles:
            factors.insert(0, (self.activations, self.adjoints))
        for position, (name, module) in enumerate(self.layers.items()):
            if "gradient" in self.wanted:
                self.keep(name, "gradient", [module.weight.grad, *(part[position] for part in gradients)])
            for which, statistic in enumerate(("activation", "adjoint")):
                if statistic in self.wanted:
                    self.keep(name, statistic, [factor[which][name] for factor in factors])
        self.optimizer.step()


class SubBatchAccumulated(SubBatch):
    """One forward and backward pass for each group's samples, INSTEAD of the batch's pass.

    The sum of the groups' gradients trains the model.  This changes the training's rounding, and is wrong
    with BatchNorm and with any loss that couples samples; where it is allowed, it is a cheap rival.
    """

    title = "sub-batch in place of the batch"
    training_unchanged = False

    def step(self) -> None:
        parameters = list(self.model.parameters())
        gradients, factors = [], []
        for x, target in self.parts:
            loss = self.case.loss(self.model(x), target) * (len(x) / len(self.batch.x))
            gradients.append(torch.autograd.grad(loss, parameters))
            if self.handles:
                factors.append((dict(self.activations), dict(self.adjoints)))
        for parameter, parts in zip(parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = torch.stack(parts).sum(0)
        positions = {id(parameter): position for position, parameter in enumerate(parameters)}
        for name, module in self.layers.items():
            if "gradient" in self.wanted:
                position = positions[id(module.weight)]
                self.keep(name, "gradient", [module.weight.grad, *(part[position] for part in gradients)])
            for which, statistic in enumerate(("activation", "adjoint")):
                if statistic in self.wanted:
                    groups = [factor[which][name] for factor in factors]
                    self.keep(name, statistic, [torch.cat(groups), *groups])
        self.optimizer.step()


class Hooks(_WithFactors):
    """Forward and tensor hooks, each group's rows gathered, one product per group, svdvals."""

    title = "hooks"

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.case.loss(self.model(self.batch.x), self.batch.target).backward()
        for name, module in self.layers.items():
            activations = [self.activations[name], *(self.activations[name][rows] for rows in self.rows)]
            adjoints = [self.adjoints[name], *(self.adjoints[name][rows] for rows in self.rows)]
            if "gradient" in self.wanted:
                shares = [d.T @ a for a, d in zip(activations[1:], adjoints[1:], strict=True)]
                self.keep(name, "gradient", [module.weight.grad, *shares])
            if "activation" in self.wanted:
                self.keep(name, "activation", activations)
            if "adjoint" in self.wanted:
                self.keep(name, "adjoint", adjoints)
        self.optimizer.step()


class Watch(Contestant):
    """`autospec.watch` with all that it does by default: the probe, the guard, the audit, the tree."""

    title = "**autospec.watch**"

    def open(self) -> None:
        import autospec

        self.watcher = autospec.watch(self.model, groups=self.batch.labels, statistics=self.wanted)
        self.watcher.__enter__()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.case.loss(self.model(self.batch.x), self.batch.target).backward()
        self.watcher.step()
        self.optimizer.step()

    def close(self) -> Recorded:
        self.watcher.__exit__(None, None, None)
        tree = self.watcher.trajectories
        return {
            (name, statistic): tree[f"layers/{name}/{statistic}"].values
            for name in self.layers
            for statistic in self.wanted
        }


CONTESTANTS: dict[str, type[Contestant]] = {
    "plain": Contestant,
    "svdvals": Svdvals,
    "svdvals-repeated": SvdvalsRepeated,
    "naive": Naive,
    "sub-batch": SubBatch,
    "sub-batch-accumulated": SubBatchAccumulated,
    "hooks": Hooks,
    "watch": Watch,
}
