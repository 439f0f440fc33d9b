"""The definitions of group share, activation and adjoint, run literally and without the package's code."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

import autospec

SEED = 11
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AFFINE = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)

SampleOf = Callable[[Tensor], Tensor]
"""Takes a layer's output; returns the sample of each of its entries along the leading dimensions."""
Where = int | SampleOf | tuple[Any, ...]
"""Where a layer's output holds the samples: along a dimension, as a function says, or so for each of several outputs."""


def sample_first(y: Tensor) -> Tensor:
    """Sample of each row of (sample, ..., feature)."""
    samples = torch.arange(y.shape[0]).reshape(-1, *[1] * (y.ndim - 2))
    return samples.expand(y.shape[:-1])


def sample_second(y: Tensor) -> Tensor:
    """Sample of each row of (time, sample, feature)."""
    return torch.arange(y.shape[1]).expand(y.shape[:-1])


def shared_by(count: int, dim: int = 0) -> SampleOf:
    """An output (..., feature) that all samples share and that is broadcast along a new dimension, or one of size 1."""

    def samples(y: Tensor) -> Tensor:
        new = y.ndim == 2
        shape = [1] * (y.ndim + new)
        shape[dim] = count
        return torch.arange(count).reshape(shape)

    return samples


def sample_index(where: int | SampleOf, y: Tensor) -> Tensor:
    """Sample of each entry of an output, with as many dimensions as needed to broadcast against it."""
    if isinstance(where, int):
        return torch.arange(y.shape[where]).reshape([-1 if axis == where else 1 for axis in range(y.ndim)])
    index = where(y)
    return index.reshape(*index.shape, *[1] * (y.ndim - index.ndim))


@dataclass
class Problem:
    """A model, its batch and its loss: everything that one training step needs.

    `samples` says, by module name, where the outputs of a layer hold the samples; along the first dimension by default.
    """

    model: nn.Module
    x: Tensor
    loss_of_output: Callable[[Any], Tensor]
    labels: Any
    samples: Mapping[str, Where] | Where = 0

    def loss(self, model: nn.Module | None = None) -> Tensor:
        """Loss of the whole batch in the model's own precision, always with the same random numbers."""
        model = self.model if model is None else model
        torch.manual_seed(SEED)
        x = self.x.to(next(model.parameters()).dtype) if self.x.is_floating_point() else self.x
        return self.loss_of_output(model(x))

    def where(self, module_name: str) -> Where:
        return self.samples.get(module_name, 0) if isinstance(self.samples, Mapping) else self.samples

    def names(self) -> dict[str, str]:
        """First name of every parameter, by each of its names."""
        first: dict[int, str] = {}
        names = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[name] = first.setdefault(id(parameter), name)
        return names


def watched_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Layers with matrices: name, module, and the names of its matrices."""
    inside_attention: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.add(id(module.out_proj))
        if (
            isinstance(module, (nn.MultiheadAttention, *RECURRENT, *CELLS, *AFFINE))
            and id(module) not in inside_attention
        ):
            yield name, module, [key for key, p in module.named_parameters() if p.ndim > 1 and "weight" in key]


def share_by_copies(problem: Problem, member: np.ndarray) -> dict[str, Tensor]:
    """dL/dW_c as matrices in float64, where the rows of the members use their own copy W_c of each weight.

    Each layer runs twice, with the common weights and with the copies, and each sample gets the outputs of its own
    weights.  Everything between the layers, batch normalisation say, sees the whole batch.
    """
    twin = copy.deepcopy(problem.model).double()
    first_names = problem.names()
    inside = torch.from_numpy(np.asarray(member, dtype=bool))
    copies: dict[str, Tensor] = {}
    for module_name, module, keys in list(watched_modules(twin)):
        own = {}
        for key in keys:
            name = first_names[f"{module_name}.{key}" if module_name else key]
            weight = module.get_parameter(key)
            own[key] = copies.setdefault(name, weight.detach().clone().requires_grad_())
        _use_copies(module, own, problem.where(module_name), inside)
    gradients = torch.autograd.grad(problem.loss(twin), list(copies.values()), allow_unused=True)
    shares = {}
    for (name, weight), gradient in zip(copies.items(), gradients, strict=True):
        if gradient is not None:  # the loss may not use a layer at all
            shares[name] = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(len(weight), -1)
    return shares


def _use_copies(module: nn.Module, own: dict[str, Tensor], where: Where, inside: Tensor) -> None:
    plain = type(module).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        common = plain(module, *args, **kwargs)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        del module.forward
        try:
            copied = functional_call(module, own, args, kwargs)
        finally:
            module.forward = forward
            torch.set_rng_state(after)
        return _mixed(common, copied, where, inside)

    module.forward = forward


def _mixed(common: Any, copied: Any, where: Where, inside: Tensor) -> Any:
    """Outputs of the copies for the members, of the common weights for the others."""
    if isinstance(common, Tensor):
        return torch.where(inside[sample_index(where, common)], copied, common)
    if isinstance(common, PackedSequence):
        return PackedSequence(_mixed(common.data, copied.data, where, inside), *common[1:])
    if isinstance(common, tuple):
        parts = where if isinstance(where, tuple) else (where,) * len(common)
        return tuple(_mixed(*each, inside) for each in zip(common, copied, parts, strict=True))
    return common


@dataclass
class Capture:
    """One use of an affine layer in a step: its input, dL/d(output), and the sample of each entry of the output."""

    module: Any
    x: Tensor
    zeros: Tensor
    samples: Tensor

    @property
    def delta(self) -> Tensor:
        return self.zeros.grad

    def share(self, member: np.ndarray) -> Tensor:
        """The group's share as a matrix, from these very float32 rows in float64: the layer is affine in its weight."""
        twin = copy.deepcopy(self.module).double()
        twin.sparse = False
        with torch.enable_grad():
            y = twin(self.x.double() if self.x.is_floating_point() else self.x)
            inside = torch.from_numpy(member)[self.samples]
            weight = twin.weight
            (share,) = torch.autograd.grad((y * self.delta.double() * inside).sum(), weight)
        return share.reshape(len(weight), -1)

    def activation(self, member: np.ndarray) -> Tensor:
        """Rows of the members that enter the layer."""
        if isinstance(self.module, nn.Embedding):
            index = self.x.expand(self.delta.shape[:-1])
            return F.one_hot(index[self._kept(member)], self.module.num_embeddings).double()
        if isinstance(self.module, CONVOLUTIONS):
            inside = torch.from_numpy(member)[self.samples.flatten()]
            return self.x[inside].double().flatten(2).movedim(1, 2).flatten(0, 1)
        return self.x[self._kept(member)].double()

    def adjoint(self, member: np.ndarray) -> Tensor:
        """Derivatives of the loss at the output, for the rows of the members."""
        if isinstance(self.module, CONVOLUTIONS):
            inside = torch.from_numpy(member)[self.samples.flatten()]
            return self.delta[inside].double().flatten(2).movedim(1, 2).flatten(0, 1)
        return self.delta[self._kept(member)].double()

    def _kept(self, member: np.ndarray) -> Tensor:
        kept = torch.from_numpy(member)[self.samples.squeeze(-1)].expand(self.delta.shape[:-1])
        if isinstance(self.module, nn.Embedding) and self.module.padding_idx is not None:
            kept = kept & (self.x.expand(kept.shape) != self.module.padding_idx)
        return kept


def captures(problem: Problem) -> dict[str, list[Capture]]:
    """Every use of every affine layer in the very step, in the model's own precision, without a hook.

    Zeros are added to each layer's output; the derivative with respect to them is Delta.
    """
    twin = copy.deepcopy(problem.model)
    first_names = problem.names()
    uses: dict[str, list[Capture]] = {}
    for module_name, module, _ in watched_modules(twin):
        if not isinstance(module, AFFINE):
            continue

        name = first_names[f"{module_name}.weight" if module_name else "weight"]
        _add_zeros(module, problem.where(module_name), uses.setdefault(name, []))
    problem.loss(twin).backward()
    for _, module, _ in watched_modules(twin):
        module.__dict__.pop("forward", None)
    # a checkpointed block runs twice, and a layer may have no part in the loss
    return {name: [use for use in found if use.zeros.grad is not None] for name, found in uses.items()}


def _add_zeros(module: Any, where: Any, uses: list[Capture]) -> None:
    def forward(input: Tensor) -> Tensor:
        y = type(module).forward(module, input)
        index = sample_index(where, y)
        zeros = y.new_zeros(torch.broadcast_shapes(y.shape, index.shape), requires_grad=True)
        uses.append(Capture(module, input.detach().clone(), zeros, index))
        return y + zeros

    module.forward = forward


def factors(problem: Problem) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A, Delta and the sample of each row of every Linear layer in the very step, in float64."""
    stacked = {}
    for name, uses in captures(problem).items():
        if all(isinstance(use.module, nn.Linear) for use in uses):
            a = torch.cat([use.x.reshape(-1, use.x.shape[-1]) for use in uses]).double()
            d = torch.cat([use.delta.reshape(-1, use.delta.shape[-1]) for use in uses]).double()
            rows = [use.samples.squeeze(-1).expand(use.delta.shape[:-1]).reshape(-1) for use in uses]
            stacked[name] = a, d, torch.cat(rows)
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
    with autospec.watch(problem.model, problem.labels, **{"quiet": True, **options}) as watcher:
        problem.model.zero_grad()
        problem.loss().backward()
        watcher.step()
    return watcher.trajectories


def spectrum(tree: Any, layer: str, statistic: str, group: str = "all", step: int = 0) -> np.ndarray:
    """One recorded spectrum in float64, without what was not recorded."""
    values = tree[f"layers/{layer}/{statistic}"].sel(group=group).values[step].astype(np.float64)
    return values[~np.isnan(values)]


def weights_after_training(
    model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor], labels: Any, steps: int, lr: float, **options: Any
) -> dict[str, Tensor]:
    """State of a model after some steps, watched if there are labels."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    watched = contextlib.nullcontext() if labels is None else autospec.watch(model, labels, quiet=True, **options)
    with watched as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(x)).backward()
            if watcher is not None:
                watcher.step()
            optimizer.step()
    return model.state_dict()


def svdvals(matrix: Tensor) -> np.ndarray:
    return torch.linalg.svdvals(matrix.double()).numpy()


def error(recorded: np.ndarray, expected: np.ndarray, scale: float | None = None) -> float:
    """Largest deviation in units of sigma_1."""
    assert len(recorded) > 0
    assert len(recorded) <= len(expected)
    return float(np.abs(recorded - expected[: len(recorded)]).max() / (scale or expected[0]))


def assert_shares(trees: Mapping[float, Any], problem: Problem, table: Mapping[str, np.ndarray]) -> None:
    """Hold every gradient spectrum of one-step trees, each with its tolerance, against an independent run in float64."""
    for group, member in table.items():
        shares = share_by_copies(problem, member)
        for tolerance, tree in trees.items():
            assert shares.keys() <= set(tree["layers"].children)
            for layer in tree["layers"].children:
                if layer not in shares:
                    assert tree[f"layers/{layer}/gradient"].isnull().all(), layer
                    continue
                recorded = spectrum(tree, layer, "gradient", group)
                assert len(recorded) == min(shares[layer].shape), (layer, group)
                assert error(recorded, svdvals(shares[layer])) < tolerance, (layer, group)


def assert_exact(
    tree: Any, problem: Problem, table: Mapping[str, np.ndarray], statistics: Any = None, tolerance: float = 1e-6
) -> None:
    """Hold every spectrum of a one-step tree against float64 svdvals of the rows of that very step."""
    for layer, uses in captures(problem).items():
        if layer not in tree["layers"].children:
            continue
        batch_sigma_1 = svdvals(sum(use.share(np.ones_like(table["all"])) for use in uses))[0]
        for group, member in table.items():
            share = sum(use.share(member) for use in uses)
            for statistic in statistics or ("gradient", "activation", "adjoint"):
                if statistic == "gradient":
                    matrices = [share]
                else:
                    # Rows of several widths, an embedding's and a Linear's of one weight, are spectra side by side.
                    by_width: dict[int, list[Tensor]] = {}
                    for use in uses:
                        rows = getattr(use, statistic)(member)
                        by_width.setdefault(rows.shape[1], []).append(rows)
                    matrices = [torch.cat(rows) for rows in by_width.values()]
                expected = np.sort(np.concatenate([svdvals(matrix) for matrix in matrices]))[::-1]
                recorded = spectrum(tree, layer, statistic, group)
                assert len(recorded) == min(len(expected), *share.shape), (layer, group, statistic)
                small = statistic == "gradient" and expected[0] < 1e-3 * batch_sigma_1
                deviation = error(recorded, expected, batch_sigma_1 if small else None)
                assert deviation < tolerance, (layer, group, statistic, deviation)


# ---------------------------------------------------------------------- recurrent layers, unrolled by hand

Affine = Callable[[str, int, Tensor], Tensor]
"""Takes a weight's name, a time step and rows; returns the rows times the transposed weight."""


def recurrent_step(
    mode: str, layer: nn.Module, suffix: str, t: int, x: Tensor, h: Tensor, c: Tensor, affine: Affine
) -> tuple[Tensor, Tensor]:
    """One step of a recurrent layer or a cell, as torch's documentation writes it."""
    of_x, of_h = affine(f"weight_ih{suffix}", t, x), affine(f"weight_hh{suffix}", t, h)
    if layer.bias:
        of_x, of_h = of_x + getattr(layer, f"bias_ih{suffix}"), of_h + getattr(layer, f"bias_hh{suffix}")
    if mode == "LSTM":
        i, f, g, o = (of_x + of_h).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (affine(f"weight_hr{suffix}", t, h) if getattr(layer, "proj_size", 0) else h), c
    if mode == "GRU":
        (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3, -1), of_h.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        return (1 - z) * torch.tanh(xn + r * hn) + z * h, c
    return (torch.relu if mode == "RNN_RELU" else torch.tanh)(of_x + of_h), c


def unrolled(layer: nn.RNNBase, x: Tensor, states: Any, lengths: Tensor | None, affine: Affine) -> tuple[Tensor, Any]:
    """A recurrent layer in plain operations; x and the output are (time, sample, width)."""
    steps, count = x.shape[:2]
    lengths = torch.full((count,), steps) if lengths is None else lengths
    width = getattr(layer, "proj_size", 0) or layer.hidden_size
    first_h, first_c = states if isinstance(states, tuple) else (states, None)
    last_h, last_c = [], []
    for level in range(layer.num_layers):
        outputs = []
        for direction in range(2 if layer.bidirectional else 1):
            h = x.new_zeros(count, width) if first_h is None else first_h[len(last_h)]
            c = x.new_zeros(count, layer.hidden_size) if first_c is None else first_c[len(last_h)]
            suffix, found = f"_l{level}{'_reverse' * direction}", [x.new_zeros(count, width)] * steps
            for t in reversed(range(steps)) if direction else range(steps):
                new_h, new_c = recurrent_step(layer.mode, layer, suffix, t, x[t], h, c, affine)
                runs = (t < lengths).unsqueeze(1)
                h, c = torch.where(runs, new_h, h), torch.where(runs, new_c, c)
                found[t] = torch.where(runs, new_h, found[t])
            outputs.append(torch.stack(found))
            last_h.append(h)
            last_c.append(c)
        x = torch.cat(outputs, -1)
        if layer.training and layer.dropout and level < layer.num_layers - 1:
            x = F.dropout(x, layer.dropout)
    last = torch.stack(last_h)
    return x, ((last, torch.stack(last_c)) if layer.mode == "LSTM" else last)


class Rows:
    """An `Affine` that keeps the rows, and the derivatives at the products by way of zeros added to them."""

    def __init__(self, layer: nn.Module, lengths: Tensor | None = None) -> None:
        self.layer, self.lengths = layer, lengths
        self.uses: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def __call__(self, name: str, t: int, rows: Tensor) -> Tensor:
        product = rows @ self.layer.get_parameter(name).T
        zeros = torch.zeros_like(product, requires_grad=True)
        self.uses.setdefault(name, []).append((t, rows.detach(), zeros))
        return product + zeros

    def factors(self, name: str, member: np.ndarray) -> tuple[Tensor, Tensor]:
        """A and Delta of the members; steps beyond the end of a sequence are no rows."""
        inside = torch.from_numpy(member)
        kept = [inside if self.lengths is None else inside & (t < self.lengths) for t, _, _ in self.uses[name]]
        a = torch.cat([rows[k] for k, (_, rows, _) in zip(kept, self.uses[name], strict=True)])
        d = torch.cat([zeros.grad[k] for k, (_, _, zeros) in zip(kept, self.uses[name], strict=True)])
        return a, d


class CopyOfEachStep:
    """An `Affine` in which the members use, at each time step, a copy of the weight of its own."""

    def __init__(self, layer: nn.Module, steps: int, member: np.ndarray) -> None:
        self.layer, self.inside = layer, torch.from_numpy(member).unsqueeze(1)
        self.copies = {
            name: weight.detach().repeat(steps, 1, 1).requires_grad_()
            for name, weight in layer.named_parameters()
            if name.startswith("weight")
        }

    def __call__(self, name: str, t: int, rows: Tensor) -> Tensor:
        return torch.where(self.inside, rows @ self.copies[name][t].T, rows @ self.layer.get_parameter(name).T)


# ---------------------------------------------------------------------- attention, written out


@dataclass
class Projection:
    """One product of an attention layer with a weight, or with some of its rows."""

    name: str
    x: Tensor
    zeros: Tensor
    first: int
    total: int

    def factors(self, member: np.ndarray) -> tuple[Tensor, Tensor]:
        """A and Delta of the members, with zeros for the outputs of the weight that were not used."""
        inside = torch.from_numpy(member)
        a, d = (tensor[inside].flatten(0, 1) for tensor in (self.x, self.zeros.grad))
        return a, F.pad(d, (self.first, self.total - self.first - d.shape[1]))


class WrittenOut:
    """nn.MultiheadAttention without dropout in plain operations, with zeros added at each projection.

    Where query, key and value are one tensor there is one product, and one for key and value where these are.
    """

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        self.layer = layer
        self.projections: list[Projection] = []

    def project(self, name: str, x: Tensor, bias: Tensor | None, first: int = 0, count: int | None = None) -> Tensor:
        weight = self.layer.get_parameter(name)
        rows = slice(first, None if count is None else first + count)
        y = F.linear(x, weight[rows], None if bias is None else bias[rows])
        zeros = torch.zeros_like(y, requires_grad=True)
        self.projections.append(Projection(name, x.detach(), zeros, first, len(weight)))
        return y + zeros

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        layer, width, heads = self.layer, self.layer.embed_dim, self.layer.num_heads
        one, pair = query is key is value, key is value
        query, key, value = (x if layer.batch_first else x.transpose(0, 1) for x in (query, key, value))
        bias = layer.in_proj_bias
        if not layer._qkv_same_embed_dim:
            parts = zip("qkv", (query, key, value), bias.chunk(3), strict=True)
            q, k, v = (self.project(f"{letter}_proj_weight", x, b) for letter, x, b in parts)
        elif one:
            q, k, v = self.project("in_proj_weight", query, bias).chunk(3, -1)
        elif pair:
            q = self.project("in_proj_weight", query, bias, 0, width)
            k, v = self.project("in_proj_weight", key, bias, width, 2 * width).chunk(2, -1)
        else:
            parts = enumerate((query, key, value))
            q, k, v = (self.project("in_proj_weight", x, bias, i * width, width) for i, x in parts)
        if layer.bias_k is not None:
            k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, layer.bias_k), (v, layer.bias_v)))
        if layer.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
            if mask is not None:
                mask = mask if mask.dtype == torch.bool else mask.isneginf()
                scores = scores.masked_fill(F.pad(mask, (0, scores.shape[-1] - mask.shape[-1])), -torch.inf)
        weights = scores.softmax(-1)
        output = self.project("out_proj.weight", (weights @ v).transpose(1, 2).flatten(2), layer.out_proj.bias)
        output = output if layer.batch_first else output.transpose(0, 1)
        return output, (weights.mean(1) if average_attn_weights else weights) if need_weights else None


def train_watched(problem: Problem, model: nn.Module, x: Tensor, options: Mapping[str, Any] | None = None) -> Any:
    """Train a model on the problem's batch for three steps; with options it is watched, and the watcher comes back."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watching = (
        contextlib.nullcontext() if options is None else autospec.watch(model, problem.labels, quiet=True, **options)
    )
    with watching as watcher:
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(step)
            problem.loss_of_output(model(x)).backward()
            if watcher is not None:
                watcher.step()
            optimizer.step()
    return watcher
