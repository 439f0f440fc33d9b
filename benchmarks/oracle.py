"""Spectra of one training step in double precision, by the plainest means: what everyone is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def exact_spectra(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    rows: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> dict[tuple[str, str], list[Tensor]]:
    """Compute gradient, activation and adjoint spectra of a model's Linear layers in float64.

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

    Returns
    -------
    dict of (parameter, statistic) to list of Tensor
        Singular values of the batch, then of each group; all of them, float64.
    """
    twin = copy.deepcopy(model).double()
    modules = dict(twin.named_modules())
    layers = {f"{name}.weight": module for name, module in modules.items() if isinstance(module, nn.Linear)}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in layers.items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        handles.append(module.register_forward_hook(hook))
    x = x.double()
    target = target.double() if target.is_floating_point() else target
    prediction = twin(x)
    for handle in handles:
        handle.remove()
    weights = [module.weight for module in layers.values()]
    whole = loss(prediction, target)
    adjoints = torch.autograd.grad(whole, list(outputs.values()), retain_graph=True)
    gradients = [torch.autograd.grad(whole, weights, retain_graph=True)]
    for group in rows:
        part = loss(prediction[group], target[group]) * (len(group) / len(x))
        gradients.append(torch.autograd.grad(part, weights, retain_graph=True))
    spectra: dict[tuple[str, str], list[Tensor]] = {}
    for position, (name, adjoint) in enumerate(zip(layers, adjoints, strict=True)):
        spectra[name, "gradient"] = [torch.linalg.svdvals(parts[position]) for parts in gradients]
        for statistic, matrix in (("activation", inputs[name]), ("adjoint", adjoint)):
            spectra[name, statistic] = [
                torch.linalg.svdvals(part) for part in (matrix, *(matrix[group] for group in rows))
            ]
    return spectra
