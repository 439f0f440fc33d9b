"""Spectra of one training step in double precision, by the plainest means: what everyone is compared with."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from contestants import as_matrix, as_rows, layers_of
from models import matrices_of
from torch import Tensor, nn
from torch.nn import functional as F


class Products:
    """Every product of a model with one of its matrices: what entered it, and what came out."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(parameter): name for name, parameter in matrices_of(model).items()}
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)

    def keep(self, weight: nn.Parameter, activation: Tensor, output: Tensor) -> None:
        """Take note of one product; both tensors have the shape (sample, position, channel)."""
        self.inputs[self.names[id(weight)]].append(activation.detach())
        self.outputs[self.names[id(weight)]].append(output)

    def linear(self, activation: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        """Multiply, and take note."""
        output = F.linear(activation, weight, bias)
        self.keep(weight, activation, output)
        return output


class UnrolledLSTM(nn.Module):
    """One layer of nn.LSTM, one step after the other."""

    def __init__(self, lstm: nn.LSTM, products: Products) -> None:
        super().__init__()
        if (lstm.num_layers, lstm.bidirectional, lstm.proj_size, lstm.batch_first) != (1, False, 0, True):
            raise NotImplementedError("the oracle knows one layer, one direction, batch_first, no projection")
        self.lstm, self.products = lstm, products

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        lstm, linear = self.lstm, self.products.linear
        hidden = cell = x.new_zeros(len(x), 1, lstm.hidden_size)
        outputs = []
        for now in x.split(1, dim=1):
            gates = linear(now, lstm.weight_ih_l0, lstm.bias_ih_l0) + linear(hidden, lstm.weight_hh_l0, lstm.bias_hh_l0)
            i, f, g, o = gates.chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            outputs.append(hidden)
        return torch.cat(outputs, 1), None


class PlainAttention(nn.Module):
    """Self-attention with the weights of nn.MultiheadAttention."""

    def __init__(self, attention: nn.MultiheadAttention, products: Products) -> None:
        super().__init__()
        self.attention, self.products, self.batch_first = attention, products, attention.batch_first

    def forward(self, x: Tensor, *_: Tensor, **__: object) -> tuple[Tensor, None]:
        attention = self.attention
        packed = self.products.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        return self.products.linear(mixed, attention.out_proj.weight, attention.out_proj.bias), None


class Switched(nn.Module):
    """A ReLU whose units are on or off as they are in float32: one that switches at rounding is another function."""

    def __init__(self, on: Tensor) -> None:
        super().__init__()
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        return x * self.on


def switches(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Which units of each ReLU are on."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):

            def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                found[name] = output > 0

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def plainly(model: nn.Module, products: Products) -> None:
    """Put layers that hide their products in plain words, and look on at the others."""
    for layer in layers_of(model).values():

        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            products.keep(layer.weight, args[0], output)

        layer.register_forward_hook(hook)
    plain = {nn.LSTM: UnrolledLSTM, nn.MultiheadAttention: PlainAttention}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in plain:
                setattr(parent, name, plain[type(child)](child, products))


def exact_spectra(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    rows: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    factors: bool = True,
) -> dict[tuple[str, str], list[Tensor]]:
    """Compute gradient, activation and adjoint spectra of a model's matrices in float64.

    A group's share of the gradient is taken as the gradient of the group's part of the loss, by autograd,
    which is the same because these models do not couple samples (no BatchNorm, a loss that is a mean).

    Parameters
    ----------
    model : nn.Module
        Copied and cast up; itself unchanged.
    x, target : Tensor
        The full batch.
    rows : sequence of Tensor
        Sample numbers of each group.
    loss : callable
        Mean over samples.
    factors : bool
        Whether activations and adjoints are wanted too.

    Returns
    -------
    dict of (parameter, statistic) to list of Tensor
        Singular values of the batch, then of each group; all of them, float64.
    """
    twin = copy.deepcopy(model).double()
    for name, on in switches(model, x).items():
        twin.set_submodule(name, Switched(on))
    matrices = matrices_of(twin)
    products = Products(twin)
    layers = layers_of(twin)
    plainly(twin, products)
    x = x.double()
    target = target.double() if target.is_floating_point() else target
    prediction = twin(x)
    whole = loss(prediction, target)
    gradients = [torch.autograd.grad(whole, list(matrices.values()), retain_graph=True)]
    for group in rows:
        part = loss(prediction[group], target[group]) * (len(group) / len(x))
        gradients.append(torch.autograd.grad(part, list(matrices.values()), retain_graph=True))
    spectra: dict[tuple[str, str], list[Tensor]] = {}
    for position, name in enumerate(matrices):
        spectra[name, "gradient"] = [torch.linalg.svdvals(as_matrix(parts[position])) for parts in gradients]
        if not factors:
            continue
        outputs = products.outputs[name]
        adjoints = torch.autograd.grad(whole, outputs, retain_graph=True)
        for statistic, uses in (("activation", products.inputs[name]), ("adjoint", adjoints)):
            layer = layers.get(name)
            spectra[name, statistic] = [
                torch.linalg.svdvals(torch.cat([_rows(layer, use[samples]) for use in uses]))
                for samples in (slice(None), *rows)
            ]
    return spectra


def _rows(layer: nn.Module | None, use: Tensor) -> Tensor:
    return use.flatten(0, -2) if layer is None else as_rows(layer, use)
