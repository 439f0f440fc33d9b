"""The definitions of group share, activation and adjoint, run literally and without the package's code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autospec

RowSamples = Callable[[Tensor], Tensor]
SEED = 11


def sample_first(x: Tensor) -> Tensor:
    """Sample of each row of an input (sample, ..., feature)."""
    samples = torch.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 2))
    return samples.expand(x.shape[:-1])


def sample_second(x: Tensor) -> Tensor:
    """Sample of each row of an input (time, sample, feature)."""
    return torch.arange(x.shape[1]).expand(x.shape[:-1])


@dataclass
class Problem:
    """A model, its batch and its loss: everything that one training step needs.

    `samples` overrides, by module name, how the rows of a layer's input belong to samples.
    """

    model: nn.Module
    x: Tensor
    loss_of_output: Callable[[Tensor], Tensor]
    labels: Any
    samples: Mapping[str, RowSamples] | RowSamples = sample_first

    def loss(self, model: nn.Module | None = None) -> Tensor:
        """Loss of the whole batch in the model's own precision, always with the same random numbers."""
        model = self.model if model is None else model
        torch.manual_seed(SEED)
        return self.loss_of_output(model(self.x.to(next(model.parameters()).dtype)))

    def samples_of(self, module_name: str) -> RowSamples:
        return self.samples if callable(self.samples) else self.samples.get(module_name, sample_first)

    def names(self) -> dict[int, str]:
        """First name of each Linear weight."""
        names: dict[int, str] = {}
        for module_name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                names.setdefault(id(module.weight), f"{module_name}.weight" if module_name else "weight")
        return names


def share_by_copies(problem: Problem, member: np.ndarray) -> dict[str, Tensor]:
    """dL/dW_c in float64, where the rows of the members use their own copy W_c of each weight."""
    twin = copy.deepcopy(problem.model).double()
    names = dict(zip((id(m.weight) for m in _linears(twin).values()), _names_in_order(problem), strict=True))
    inside = torch.from_numpy(np.asarray(member, dtype=bool))
    copies: dict[str, tuple[Tensor, Tensor]] = {}
    for module_name, module in _linears(twin).items():
        name, rows = names[id(module.weight)], problem.samples_of(module_name)
        if name not in copies:
            copies[name] = tuple(module.weight.detach().clone().requires_grad_() for _ in range(2))

        def forward(
            input: Tensor,
            bias: Tensor | None = module.bias,
            own: tuple[Tensor, Tensor] = copies[name],
            samples: RowSamples = rows,
        ) -> Tensor:
            mask = inside[samples(input)].unsqueeze(-1).to(input.dtype)
            y = mask * F.linear(input, own[0]) + (1 - mask) * F.linear(input, own[1])
            return y if bias is None else y + bias

        module.forward = forward
    gradients = torch.autograd.grad(problem.loss(twin), [pair[0] for pair in copies.values()], allow_unused=True)
    return dict(zip(copies, gradients, strict=True))


def factors(problem: Problem) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A, Delta and the sample of each row of the very float32 step, in float64, without a hook.

    Zeros are added to each layer's output; the derivative with respect to them is Delta.
    """
    twin = copy.deepcopy(problem.model)
    names = dict(zip((id(m.weight) for m in _linears(twin).values()), _names_in_order(problem), strict=True))
    uses: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for module_name, module in _linears(twin).items():
        rows = problem.samples_of(module_name)

        def forward(
            input: Tensor,
            layer: nn.Linear = module,
            name: str = names[id(module.weight)],
            samples: RowSamples = rows,
        ) -> Tensor:
            y = F.linear(input, layer.weight, layer.bias)
            zeros = torch.zeros_like(y, requires_grad=True)
            uses.setdefault(name, []).append((input.detach().clone(), zeros, samples(input)))
            return y + zeros

        module.forward = forward
    problem.loss(twin).backward()
    stacked = {}
    for name, parts in uses.items():
        parts = [part for part in parts if part[1].grad is not None]  # a checkpointed block runs twice
        a = torch.cat([x.reshape(-1, x.shape[-1]) for x, _, _ in parts]).double()
        d = torch.cat([zeros.grad.reshape(-1, zeros.shape[-1]) for _, zeros, _ in parts]).double()
        stacked[name] = a, d, torch.cat([rows.reshape(-1) for _, _, rows in parts])
    return stacked


def members(labels: Any, count: int) -> dict[str, np.ndarray]:
    """Membership of every group of one or several groupings, written out by hand."""
    table = {"all": np.ones(count, dtype=bool)}
    if labels is None:
        return table
    columns = labels if isinstance(labels, dict) else {"": labels}
    for grouping, values in columns.items():
        values = list(values)
        for label in dict.fromkeys(str(v) for v in values if v is not None and v == v):
            name = f"{grouping}={label}" if len(columns) > 1 else label
            table[name] = np.array([str(v) == label for v in values])
    return table


def record(problem: Problem, **options: Any) -> Any:
    """Watch one step of the problem and return the tree."""
    with autospec.watch(problem.model, problem.labels, **options) as watcher:
        problem.model.zero_grad()
        problem.loss().backward()
        watcher.step()
    return watcher.trajectories


def spectrum(tree: Any, layer: str, statistic: str, group: str = "all", step: int = 0) -> np.ndarray:
    """One recorded spectrum in float64, without what was not recorded."""
    values = tree[f"layers/{layer}/{statistic}"].sel(group=group).values[step].astype(np.float64)
    return values[~np.isnan(values)]


def svdvals(matrix: Tensor) -> np.ndarray:
    return torch.linalg.svdvals(matrix.double()).numpy()


def error(recorded: np.ndarray, expected: np.ndarray, scale: float | None = None) -> float:
    """Largest deviation in units of sigma_1."""
    assert len(recorded) > 0
    assert len(recorded) <= len(expected)
    return float(np.abs(recorded - expected[: len(recorded)]).max() / (scale or expected[0]))


def assert_exact(tree: Any, problem: Problem, table: Mapping[str, np.ndarray], statistics: Any = None) -> None:
    """Hold every spectrum of a one-step tree against float64 svdvals of the rows of that very step."""
    for layer, (a, d, samples) in factors(problem).items():
        batch_sigma_1 = svdvals(d.T @ a)[0]
        for group, member in table.items():
            rows = torch.from_numpy(member)[samples]
            matrices = {"gradient": d[rows].T @ a[rows], "activation": a[rows], "adjoint": d[rows]}
            for statistic in statistics or matrices:
                expected = svdvals(matrices[statistic])
                recorded = spectrum(tree, layer, statistic, group)
                assert len(recorded) == min(*expected.shape, *matrices["gradient"].shape), (layer, group, statistic)
                small = statistic == "gradient" and expected[0] < 1e-3 * batch_sigma_1
                deviation = error(recorded, expected, batch_sigma_1 if small else None)
                assert deviation < 1e-6, (layer, group, statistic, deviation)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _names_in_order(problem: Problem) -> list[str]:
    names = problem.names()
    return [names[id(module.weight)] for module in _linears(problem.model).values()]
