"""Adam and stochastic gradient descent by torch's own functions, without torch's classes around them.

`torch.optim.Adam` and its like import the compiler when one is made, which takes longer than most trainings of the demo.
The functions that they call do not, and the weights are the same, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Optimizer:
    """What the two have in common; like `torch.optim.Optimizer`, as far as training and `torch.amp.GradScaler` need it.

    Parameters
    ----------
    parameters : iterable of Tensor
        What is trained.
    lr : float
        Learning rate.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        self.param_groups = [{"params": self.parameters}]  # where GradScaler finds gradients

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Use the gradients; a parameter without one stays as it is."""
        raise NotImplementedError

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """What a checkpoint must keep: tensors by the number of the parameter."""
        return {}

    def load_state_dict(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Go on from `state_dict`."""

    def _with_gradient(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {
            number: (parameter, parameter.grad)
            for number, parameter in enumerate(self.parameters)
            if parameter.grad is not None
        }


class SGD(Optimizer):
    """Stochastic gradient descent as `torch.optim.SGD` with its defaults: no momentum, no weight decay."""

    @torch.no_grad()
    def step(self) -> None:  # noqa: D102
        found = self._with_gradient().values()
        sgd(
            [parameter for parameter, _ in found],
            [gradient for _, gradient in found],
            [None for _ in found],
            has_sparse_grad=any(gradient.is_sparse for _, gradient in found),
            weight_decay=0.0,
            momentum=0.0,
            lr=self.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class Adam(Optimizer):
    """Adam as `torch.optim.Adam` with its defaults."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, lr)
        self._state: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:  # noqa: D102
        found = self._with_gradient()
        for number, (parameter, _) in found.items():
            if number not in self._state:
                self._state[number] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        states = [self._state[number] for number in found]
        adam(
            [parameter for parameter, _ in found.values()],
            [gradient for _, gradient in found.values()],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def state_dict(self) -> dict[int, dict[str, Tensor]]:  # noqa: D102
        return self._state

    def load_state_dict(self, state: dict[int, dict[str, Tensor]]) -> None:  # noqa: D102
        self._state = {
            number: {
                name: value.clone() if name == "step" else value.to(self.parameters[number].device, copy=True)
                for name, value in kept.items()
            }
            for number, kept in state.items()
        }


OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "sgd": SGD}
