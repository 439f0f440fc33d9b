r"""Thousands of tiny networks trained at once, as batched matrix products.

Networks with one hidden layer, :math:`W_2 \max(W_1 x + b_1, 0) + b_2`, under full batch and Adam.  Axes: repetitions of a
study, each with its own samples and initial weights; then the networks of a repetition, which differ in their labels; then a
matrix in which samples are columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autospec.introspection.spectra import singular_values, smaller_gram

ENCODER, HEAD = LAYERS = ("encoder", "head")
# Adam's constants, PyTorch's.
MEAN_DECAY, SQUARE_DECAY, SMALL = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Factors:
    """What entered a layer and the derivative of the loss at what left it.

    Attributes
    ----------
    activation : Tensor
        Shape (repetitions, networks or 1, inputs, samples).
    adjoint : Tensor
        Shape (repetitions, networks, outputs, samples).
    """

    activation: Tensor
    adjoint: Tensor

    def share(self, weights: Tensor | None = None) -> Tensor:
        """Sum of the samples' shares of the gradient, in the type of the factors.

        Parameters
        ----------
        weights : Tensor, optional
            Weight of each sample, shape (repetitions, networks, samples), such as 1 in a group and 0 outside; by default 1.

        Returns
        -------
        Tensor
            Shape (repetitions, networks, outputs, inputs).
        """
        adjoint = self.adjoint if weights is None else self.adjoint * weights.unsqueeze(2)
        if self.activation.shape[1] == adjoint.shape[1]:
            return adjoint @ self.activation.mT
        # One activation for all networks of a repetition: one product in place of many.
        product = adjoint.flatten(1, 2) @ self.activation[:, 0].mT
        return product.unflatten(1, adjoint.shape[1:3])

    def double(self) -> Factors:
        """The same in float64."""
        return Factors(self.activation.double(), self.adjoint.double())


def initial_parameters(
    seeds: Sequence[int], networks: int, features: int, hidden: int, outputs: int
) -> tuple[Tensor, ...]:
    """Draw weights and biases from PyTorch's default distribution for linear layers.

    Parameters
    ----------
    seeds : sequence of int
        One for each repetition; its networks begin with the same weights.
    networks : int
        Networks of each repetition.
    features, hidden, outputs : int
        Widths of the layers.

    Returns
    -------
    tuple of Tensor
        Weight and bias of the encoder, weight and bias of the head; shapes (repetitions, networks, hidden, features),
        (repetitions, networks, hidden, 1), (repetitions, networks, outputs, hidden), (repetitions, networks, outputs, 1).
    """
    shapes = ((hidden, features), (hidden, 1), (outputs, hidden), (outputs, 1))
    bounds = (features**-0.5, features**-0.5, hidden**-0.5, hidden**-0.5)
    drawn: list[list[Tensor]] = [[], [], [], []]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parts, shape, bound in zip(drawn, shapes, bounds, strict=True):
            parts.append((2 * torch.rand(shape, generator=generator) - 1) * bound)
    return tuple(torch.stack(parts).unsqueeze(1).repeat(1, networks, 1, 1) for parts in drawn)


def derivatives(
    parameters: Sequence[Tensor], x: Tensor, target: Tensor | None
) -> tuple[dict[str, Factors], list[Tensor]]:
    """Factors of both layers, and the gradient of every parameter.

    Parameters
    ----------
    parameters : sequence of Tensor
        As `initial_parameters` returns them.
    x : Tensor
        Samples, shape (repetitions, features, samples).
    target : Tensor or None
        Class of each sample, shape (repetitions, networks, samples), for a classifier with its mean cross-entropy; None for
        an autoencoder with its mean squared error.
    """
    weight, bias, head, head_bias = parameters
    samples = x.shape[2]
    before = (weight.flatten(1, 2) @ x).unflatten(1, weight.shape[1:3]) + bias
    hidden = before.relu()
    output = head @ hidden + head_bias
    if target is None:
        adjoint = (output - x.unsqueeze(1)) * (2 / (samples * x.shape[1]))
    else:
        adjoint = output.softmax(2)
        adjoint.scatter_add_(2, target.unsqueeze(2), adjoint.new_full((), -1.0).expand_as(target.unsqueeze(2)))
        adjoint /= samples
    adjoint_before = (head.mT @ adjoint) * (before > 0)
    factors = {ENCODER: Factors(x.unsqueeze(1), adjoint_before), HEAD: Factors(hidden, adjoint)}
    gradients = [
        factors[ENCODER].share(),
        adjoint_before.sum(3, keepdim=True),
        factors[HEAD].share(),
        adjoint.sum(3, keepdim=True),
    ]
    return factors, gradients


def train(
    parameters: Sequence[Tensor], x: Tensor, target: Tensor | None, updates: int, learning_rate: float
) -> Iterator[dict[str, Factors]]:
    """Train with Adam and yield the factors of each step.

    Parameters
    ----------
    parameters : sequence of Tensor
        As `initial_parameters` returns them; they are changed.
    x, target
        As for `derivatives`.
    updates : int
        Number of updates.
    learning_rate : float
        Adam's.

    Yields
    ------
    dict of str to Factors
        Of both layers, before the first update and after each: ``updates + 1`` times.
    """
    means = [torch.zeros_like(parameter) for parameter in parameters]
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(1, updates + 2):
        factors, gradients = derivatives(parameters, x, target)
        yield factors
        if step > updates:
            return
        for parameter, gradient, mean, square in zip(parameters, gradients, means, squares, strict=True):
            mean.lerp_(gradient, 1 - MEAN_DECAY)
            square.mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
            root = (square / (1 - SQUARE_DECAY**step)).sqrt_().add_(SMALL)
            parameter.addcdiv_(mean, root, value=-learning_rate / (1 - MEAN_DECAY**step))


def spectra(matrices: Tensor) -> Tensor:
    """Singular values of matrices of shape (..., m, n), descending, float64."""
    return singular_values([smaller_gram(matrices.flatten(0, -3))])[0].unflatten(0, matrices.shape[:-2])
