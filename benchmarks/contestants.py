"""The ways to get spectra during training that are compared, written as a competent user would write them.

Each is a `Contestant`: `open`, then `step` once per parameter update (the whole training step, with the
measuring in it), then `close`, which returns what was recorded.  To add one, subclass and list it in
`CONTESTANTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import ClassVar

import numpy as np
import torch
from models import Batch, Case, matrices_of
from torch import Tensor, nn

Recorded = dict[tuple[str, str], np.ndarray]
"""(parameter, statistic) -> array (step, group, index); group 0 is the whole batch."""
CONVOLUTIONS = {
    nn.Conv1d: torch.nn.grad.conv1d_weight,
    nn.Conv2d: torch.nn.grad.conv2d_weight,
    nn.Conv3d: torch.nn.grad.conv3d_weight,
}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions that are called as modules, by the name of their weight."""
    inside = {id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.modules()}
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, *CONVOLUTIONS) and id(module) not in inside
    }


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight, or its gradient, as a matrix."""
    return tensor.flatten(1)


def as_rows(layer: nn.Module, tensor: Tensor) -> Tensor:
    """What enters or leaves a layer, one row a sample and position."""
    return (tensor if isinstance(layer, nn.Linear) else tensor.movedim(1, -1)).flatten(0, -2)


def weight_gradient(layer: nn.Module, activation: Tensor, adjoint: Tensor) -> Tensor:
    """Gradient of a layer's weight for the given samples."""
    if isinstance(layer, nn.Linear):
        return as_rows(layer, adjoint).T @ as_rows(layer, activation)
    product = CONVOLUTIONS[type(layer)]
    return product(activation, layer.weight.shape, adjoint, layer.stride, layer.padding, layer.dilation, layer.groups)


class Contestant:
    """One way to train and to record; this one records nothing: the plain step."""

    title = "plain step"
    statistics: tuple[str, ...] = ("gradient", "activation", "adjoint")
    """What it can record."""
    least: tuple[str, ...] = ()
    """What it must record to make sense."""
    groups_recorded = True
    """Whether it records each group, not just the whole batch."""
    training_unchanged = True
    """Whether weights stay bitwise those of the plain training."""
    tolerance = 1e-3
    """Deviation from float64, in units of the spectrum's first value, from which it is called wrong.

    What svdvals in float32 loses on tall matrices is not: it takes the norm of a million rows to 2e-4.
    """
    library: str | None = None
    """The distribution that it needs."""
    may_fail = False
    """Whether an error in it is its own affair, shown in the table."""

    def __init__(self, case: Case, model: nn.Module, batch: Batch, statistics: Sequence[str]) -> None:
        self.case, self.model, self.batch = case, model, batch
        self.wanted = tuple(statistics)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.matrices = matrices_of(model)
        self.layers = layers_of(model)
        self.rows = batch.rows_of_groups()
        self.spectra: dict[tuple[str, str], list[Tensor]] = {}

    @classmethod
    def takes_part(cls, statistics: Sequence[str]) -> bool:
        """Whether it is meant to record these."""
        return set(cls.least) <= set(statistics) <= set(cls.statistics)

    @classmethod
    def installed(cls) -> bool:
        """Whether the library that it needs is there."""
        try:
            return cls.library is None or bool(metadata.version(cls.library))
        except metadata.PackageNotFoundError:
            return False

    def able(self) -> bool:
        """Whether it can record every matrix of this model."""
        return True

    def open(self) -> None:
        """Do what comes before the first step."""

    def step(self) -> None:
        """One training step."""
        self.backward()
        self.optimizer.step()

    def backward(self) -> None:
        """The plain step up to the gradients."""
        self.optimizer.zero_grad()
        self.case.loss(self.model(self.batch.x), self.batch.target).backward()

    def close(self) -> Recorded:
        """Do what comes after the last step, and hand over everything as arrays."""
        return {key: torch.stack(values).cpu().numpy() for key, values in self.spectra.items()}

    def state(self) -> Mapping[str, Tensor]:
        """The weights, as the plain model calls them."""
        return self.model.state_dict()

    def keep(self, name: str, statistic: str, matrices: Sequence[Tensor]) -> None:
        """Record the leading singular values of the matrices, one a group (or just the batch's)."""
        count = min(as_matrix(self.matrices[name]).shape)
        values = torch.full((len(matrices), count), torch.nan, device=matrices[0].device)
        if len({matrix.shape for matrix in matrices}) == 1:
            found = torch.linalg.svdvals(torch.stack(list(matrices)))[:, :count]
            values[:, : found.shape[1]] = found
        else:
            for row, matrix in zip(values, matrices, strict=True):
                found = torch.linalg.svdvals(matrix)[:count]
                row[: len(found)] = found
        self.spectra.setdefault((name, statistic), []).append(values)

    def keep_gradients(self, shares: Sequence[Sequence[Tensor]]) -> None:
        """Record the batch's gradients and the groups', given group by group in the order of `matrices`."""
        for position, (name, parameter) in enumerate(self.matrices.items()):
            whole = as_matrix(parameter.grad)
            self.keep(name, "gradient", [whole, *(as_matrix(share[position]) for share in shares)])


class WithFactors(Contestant):
    """Base of the rivals that look at what enters a layer (A) and at the derivative at its output (Delta)."""

    def able(self) -> bool:
        return self.wanted == ("gradient",) or set(self.layers) == set(self.matrices)

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

    def keep_factors(self, factors: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
        """Record the factors' spectra, given for the batch and for each group."""
        for which, statistic in enumerate(("activation", "adjoint")):
            if statistic in self.wanted:
                for name, layer in self.layers.items():
                    self.keep(name, statistic, [as_rows(layer, factor[which][name]) for factor in factors])


class Svdvals(WithFactors):
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
        self.backward()
        for name, parameter in self.matrices.items():
            self.keep(name, "gradient", [as_matrix(parameter.grad)] * self.repeats)
        if self.handles:
            self.keep_factors([(self.activations, self.adjoints)])
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
        matrices = list(self.matrices.values())
        parts = []
        for rows in self.rows:
            loss = self.case.loss(output[rows], self.batch.target[rows]) * (len(rows) / len(output))
            parts.append(torch.autograd.grad(loss, matrices, retain_graph=True))
        self.case.loss(output, self.batch.target).backward()
        self.keep_gradients(parts)
        self.optimizer.step()


class SubBatch(WithFactors):
    """The batch's pass, then one forward and backward pass for each group's samples."""

    title = "sub-batch"

    def open(self) -> None:
        if self.wanted != ("gradient",):
            super().open()
        else:
            self.handles = []
        # The batch is the same at every step, so its groups are cut out once.
        self.parts = [(self.batch.x[rows], self.batch.target[rows]) for rows in self.rows]

    def passes(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Gradients of each group's pass."""
        for x, target in self.parts:
            loss = self.case.loss(self.model(x), target) * (len(x) / len(self.batch.x))
            yield torch.autograd.grad(loss, parameters)

    def step(self) -> None:
        gradients, factors = [], []
        for gradient in self.passes(list(self.matrices.values())):
            gradients.append(gradient)
            if self.handles:
                factors.append((dict(self.activations), dict(self.adjoints)))
        self.backward()
        self.keep_gradients(gradients)
        if self.handles:
            self.keep_factors([(self.activations, self.adjoints), *factors])
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
        for gradient in self.passes(parameters):
            gradients.append(gradient)
            if self.handles:
                factors.append((dict(self.activations), dict(self.adjoints)))
        for parameter, parts in zip(parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = torch.stack(parts).sum(0)
        matrices = [position for position, parameter in enumerate(parameters) if parameter.ndim > 1]
        self.keep_gradients([[gradient[position] for position in matrices] for gradient in gradients])
        if self.handles:
            whole = tuple(
                {name: torch.cat([f[which][name] for f in factors]) for name in self.layers} for which in (0, 1)
            )
            self.keep_factors([whole, *factors])
        self.optimizer.step()


class Hooks(WithFactors):
    """Forward and tensor hooks, each group's rows gathered, one product per group, svdvals."""

    title = "hooks"

    def able(self) -> bool:
        return set(self.layers) == set(self.matrices)

    def step(self) -> None:
        self.backward()
        groups = [
            tuple(
                {name: tensor[rows] for name, tensor in factor.items()} for factor in (self.activations, self.adjoints)
            )
            for rows in self.rows
        ]
        self.keep_gradients(
            [[weight_gradient(layer, a[name], d[name]) for name, layer in self.layers.items()] for a, d in groups]
        )
        if self.wanted != ("gradient",):
            self.keep_factors([(self.activations, self.adjoints), *groups])
        self.optimizer.step()


class _PerSample(Contestant):
    """Base of the libraries: the gradient of each sample, then one product with the groups' members."""

    statistics = ("gradient",)
    may_fail = True

    def open(self) -> None:
        self.members = torch.zeros(len(self.rows), len(self.batch.x), device=self.batch.x.device)
        for member, rows in zip(self.members, self.rows, strict=True):
            member[rows] = 1.0

    def sums(self, gradient: Tensor) -> Tensor:
        """Sums over the samples of each group."""
        return (self.members @ gradient.flatten(1)).unflatten(1, gradient.shape[1:])


class Backpack(_PerSample):
    """BackPACK's BatchGrad in the batch's own backward pass."""

    title = "BackPACK"
    library = "backpack-for-pytorch"

    @property
    def modules(self) -> list[nn.Module]:
        """Modules that BackPACK knows."""
        return [*self.layers.values(), *(module for module in self.model.modules() if isinstance(module, nn.LSTM))]

    def able(self) -> bool:
        known = {id(parameter) for module in self.modules for parameter in module.parameters()}
        return all(id(parameter) in known for parameter in self.matrices.values())

    def open(self) -> None:
        super().open()
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        for module in self.modules:
            extend(module)
        self.context = lambda: backpack(BatchGrad())

    def step(self) -> None:
        with self.context():
            self.backward()
        self.keep_gradients(list(zip(*(self.sums(p.grad_batch) for p in self.matrices.values()), strict=True)))
        for parameter in self.model.parameters():
            if hasattr(parameter, "grad_batch"):
                del parameter.grad_batch
        self.optimizer.step()


class Opacus(_PerSample):
    """Opacus' GradSampleModule, on the model in which it puts layers of its own where it must."""

    title = "Opacus"
    library = "opacus"

    def open(self) -> None:
        super().open()
        from opacus import GradSampleModule
        from opacus.validators import ModuleValidator

        if not ModuleValidator.is_valid(self.model):
            self.training_unchanged = False
            self.model = ModuleValidator.fix(self.model).to(self.batch.x.device)
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.wrapped = GradSampleModule(self.model)
        own = dict(self.model.named_parameters())
        self.pieces = {name: [own[piece] for piece in self._pieces(name)] for name in self.matrices}

    @staticmethod
    def _pieces(name: str) -> list[str]:
        """What Opacus calls a parameter; the packed projections of an attention are three to it."""
        stem = name.removesuffix("in_proj_weight")
        return [name] if stem == name else [f"{stem}{which}linear.weight" for which in "qkv"]

    def state(self) -> Mapping[str, Tensor]:
        # The cells of its own LSTM stand there twice, once under the names that nn.LSTM has.
        found = {name: value for name, value in self.model.state_dict().items() if ".l0." not in name}
        for name in list(found):
            if name.endswith("qlinear.weight") or name.endswith("qlinear.bias"):
                kind = name.rpartition(".")[2]
                stem = name.removesuffix(f"qlinear.{kind}")
                found[f"{stem}in_proj_{kind}"] = torch.cat(
                    [found.pop(f"{stem}{which}linear.{kind}") for which in "qkv"]
                )
        return found

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.wrapped.set_grad_sample_to_none()
        self.case.loss(self.wrapped(self.batch.x), self.batch.target).backward()
        scale = 1 / len(self.batch.x)  # Opacus takes the loss's mean back
        for name, pieces in self.pieces.items():
            whole = torch.cat([as_matrix(piece.grad) for piece in pieces])
            shares = torch.cat([self.sums(piece.grad_sample) * scale for piece in pieces], 1).flatten(2)
            self.keep(name, "gradient", [whole, *shares])
        self.optimizer.step()


class TorchFunc(_PerSample):
    """The batch's pass, then vmap over grad."""

    title = "torch.func: vmap(grad)"

    def open(self) -> None:
        super().open()
        from torch.func import functional_call, grad, vmap

        def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
            output = functional_call(self.model, parameters, (x.unsqueeze(0),))
            return self.case.loss(output, target.unsqueeze(0)) / len(self.batch.x)

        self.per_sample = vmap(grad(loss), in_dims=(None, 0, 0))

    def shares(self) -> dict[str, Tensor]:
        """Each group's share of every parameter's gradient."""
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        found = self.per_sample(parameters, self.batch.x, self.batch.target)
        return {name: self.sums(gradient) for name, gradient in found.items()}

    def step(self) -> None:
        self.backward()
        self.finish(self.shares())

    def finish(self, shares: dict[str, Tensor]) -> None:
        """Record, and update the weights."""
        self.keep_gradients(list(zip(*(shares[name] for name in self.matrices), strict=True)))
        self.optimizer.step()


class TorchFuncInPlace(TorchFunc):
    """vmap over grad INSTEAD of the batch's pass: the sum of the samples' gradients trains the model.

    As with `SubBatchAccumulated`, rounding differs and nothing may couple samples.
    """

    title = "torch.func in place of the batch"
    training_unchanged = False

    def step(self) -> None:
        shares = self.shares()
        for name, parameter in self.model.named_parameters():
            parameter.grad = shares[name].sum(0)
        self.finish(shares)


class Watch(Contestant):
    """`autospec.watch` with all that it does by default: the probe, the guard, the audit, the tree."""

    title = "**autospec.watch**"
    tolerance = 2e-5
    options: ClassVar[Mapping[str, str]] = {}

    def open(self) -> None:
        import autospec

        labels = self.batch.labels
        self.watcher = autospec.watch(self.model, groups=labels, statistics=self.wanted, quiet=True, **self.options)
        self.watcher.__enter__()

    def step(self) -> None:
        self.backward()
        self.watcher.step()
        self.optimizer.step()

    def close(self) -> Recorded:
        self.watcher.__exit__(None, None, None)
        tree = self.watcher.trajectories
        groups = ["all", *self.batch.group_names]
        return {
            (name, statistic): tree[f"layers/{name}/{statistic}"].sel(group=groups).values
            for name in self.matrices
            for statistic in self.wanted
        }


class WatchTracked(Watch):
    """The same, following the leading values of activations and adjoints from step to step."""

    title = '**autospec.watch(solver="tracked")**'
    least = ("activation", "adjoint")
    options: ClassVar[Mapping[str, object]] = {"solver": "tracked"}


class WatchLeading(WatchTracked):
    """The same, the eight leading values alone."""

    title = '**autospec.watch(solver="tracked", singular_values=8)**'
    options: ClassVar[Mapping[str, object]] = {"solver": "tracked", "singular_values": 8}


CONTESTANTS: dict[str, type[Contestant]] = {
    "plain": Contestant,
    "svdvals": Svdvals,
    "svdvals-repeated": SvdvalsRepeated,
    "naive": Naive,
    "sub-batch": SubBatch,
    "sub-batch-accumulated": SubBatchAccumulated,
    "hooks": Hooks,
    "backpack": Backpack,
    "opacus": Opacus,
    "torch-func": TorchFunc,
    "torch-func-in-place": TorchFuncInPlace,
    "watch": Watch,
    "watch-tracked": WatchTracked,
    "watch-leading": WatchLeading,
}
