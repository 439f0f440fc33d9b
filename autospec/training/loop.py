"""One update after another: the gradient of a batch, in parts where memory asks for them, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from autospec.custom_model import is_path
from autospec.errors import UserError
from autospec.introspection.generators import random_state, restore_random_state, torch_random_state

from .batches import Batches, parts
from .device import free_memory, out_of_memory
from .optimizers import OPTIMIZERS
from .performance import (
    autoencoder_performance,
    classifier_performance,
    explained,
    no_performance,
)
from .prepare import Prepared, Rows

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Watching(Protocol):
    """What the loop needs of a watcher."""

    def set_groups(self, labels: Any) -> None:
        """Take the labels of the samples that come next."""
        ...

    def discard(self) -> None:
        """Forget what has arrived since the last step."""
        ...


@dataclass
class Outcome:
    """What a batch has given: its mean loss, and how many of its samples were classified rightly."""

    loss: float
    right: int
    samples: int


class Trainer:
    """A network with its optimizer.

    Parameters
    ----------
    prepared : Prepared
        Samples and network.

    Attributes
    ----------
    batches : Batches
        The batches of every update.
    microbatches : list of (int, int)
        From which update on a batch came in parts of how many samples.

    Raises
    ------
    UserError
        If the precision is not to be had on the device, or parts are asked for where the network does not allow them.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.model, self.device = prepared.model, prepared.device
        training = prepared.settings["training"]
        self.name = prepared.settings["name"]
        self.optimizer = OPTIMIZERS[training["optimizer"]](self.model.parameters(), training["learning_rate"])
        batch = training["batch"]
        self.batches = Batches(len(prepared.training), None if batch == "full" else int(batch), training["seed"])
        # Networks of ours draw from torch's generator alone.
        self._random_state = random_state if is_path(prepared.settings["model"]) else torch_random_state
        self._half = HALF.get(training["precision"])
        self.scaler = self._scaler(training["precision"])
        self._asked = training["microbatch"]
        self._size = self._asked if isinstance(self._asked, int) and self._asked < self.batches.largest else None
        self.microbatches = [(0, self._size or self.batches.largest)]
        self._couples = next(
            (
                name
                for name, module in self.model.named_modules()
                if isinstance(module, nn.modules.batchnorm._BatchNorm)
            ),
            None,
        )
        self._mean_errors = self._errors_of_the_mean()
        if self._size is not None and self._couples is not None:
            raise UserError(
                f"{self.name} has batch normalisation ('{self._couples}'), whose result depends on the whole batch, so "
                f"microbatch ({self._size}) would train another network: set training.microbatch to none."
            )

    def gradient(self, update: int, watcher: Watching) -> Outcome:
        """Compute the gradient of an update's batch, and leave it in the parameters.

        Parameters
        ----------
        update : int
            Number of the update.
        watcher : Watching
            Told whose samples come next, where they are not all of them.

        Raises
        ------
        UserError
            If memory runs out and smaller parts cannot help or are not allowed.
        """
        rows = self.batches.rows(update)
        while True:
            before = self._state_before()
            try:
                return self._backward(rows, watcher)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            # Only now, when the exception is gone, nothing holds the failed pass's tensors any more.
            self.optimizer.zero_grad()
            watcher.discard()
            free_memory(self.device)
            self._halve(update, len(rows))
            self._restore(before)

    def step(self) -> None:
        """Let the optimizer use the gradient."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(cast(Any, self.optimizer))
            self.scaler.update()

    def evaluate(self, rows: Rows) -> tuple[float, np.ndarray]:
        """Loss of some samples, and whether each is classified rightly, leaving no trace in the training.

        Parameters
        ----------
        rows : Rows
            The samples.

        Returns
        -------
        loss : float
            Mean over the samples.
        right : ndarray of bool, shape (samples,)
            False throughout for an autoencoder.
        """
        size = self._size or self.batches.largest
        while True:
            try:
                with _looking_on(self.model, self.device):
                    return self._evaluated(rows, size)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
            free_memory(self.device)
            size = -(-size // 2)

    def explained(self, loss: float, held_out: bool = False) -> float:
        """Share of the variance about the training samples' mean that a loss leaves explained."""
        return explained(loss, self._mean_errors[held_out])

    def performance(self) -> dict[str, Any]:
        """How well the network does on the samples that were held out (see `autospec.training.performance`)."""
        rows = self.prepared.held_out
        if not len(rows):
            return no_performance()
        loss, right = self.evaluate(rows)
        if self.prepared.settings["task"] == "autoencoder":
            return autoencoder_performance(loss, self._mean_errors[True], rows.subjects)
        target = [self.prepared.classes[number] for number in rows.target.tolist()]
        return classifier_performance(right, target, rows.subjects)

    def finite(self) -> bool:
        """Whether all weights are finite."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random": random_state(self.device),
            "microbatches": [list(pair) for pair in self.microbatches],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.microbatches = [(update, size) for update, size in state["microbatches"]]
        size = self.microbatches[-1][1]
        self._size = size if size < self.batches.largest else None
        restore_random_state(state["random"], self.device)

    # ------------------------------------------------------------------ one pass

    def _backward(self, rows: np.ndarray, watcher: Watching) -> Outcome:
        self.optimizer.zero_grad()
        whole = self._size is None and self.batches.batch is None
        total, right = 0.0, 0
        for part in parts(rows, self._size):
            if whole:  # the same tensors at each update: the watcher sorts and decomposes them once
                x, answer = self.prepared.x, self.prepared.answer
            else:
                index = torch.from_numpy(part)
                x, answer = self._taken(self.prepared.x, index), self._taken(self.prepared.answer, index)
                watcher.set_groups(self.prepared.groups(part.tolist()))
            loss, prediction = self._loss(x.to(self.device), answer.to(self.device))
            share = len(part) / len(rows)
            weighted = loss if share == 1 else loss * share
            (weighted if self.scaler is None else self.scaler.scale(weighted)).backward()
            total += loss.item() * share
            right += int(self._right(prediction, answer).sum())
        return Outcome(total, right, len(rows))

    def _loss(self, x: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        with self._precision():
            prediction = self.model(x)
            self._require_shape(prediction, x)
            return self.prepared.criterion(prediction, answer), prediction

    def _require_shape(self, prediction: Any, x: Tensor) -> None:
        classes = (len(x), len(self.prepared.classes))
        wanted = tuple(x.shape) if self.prepared.settings["task"] == "autoencoder" else classes
        if not isinstance(prediction, Tensor) or tuple(prediction.shape) != wanted:
            came = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
            raise UserError(
                f"the model '{self.prepared.settings['model']}' of {self.name} returns {came} for {len(x)} samples, but its "
                f"task needs a tensor of shape {wanted}: correct its forward()."
            )

    def _right(self, prediction: Tensor, answer: Tensor) -> Tensor:
        if self.prepared.settings["task"] == "autoencoder":
            return torch.zeros(len(prediction), dtype=torch.bool)
        return prediction.detach().argmax(1) == answer.to(prediction.device)

    def _evaluated(self, rows: Rows, size: int) -> tuple[float, np.ndarray]:
        total, right = 0.0, []
        for part in parts(np.arange(len(rows)), size):
            chosen = slice(int(part[0]), int(part[-1]) + 1)
            x, answer = rows.x[chosen].to(self.device), rows.answer[chosen].to(self.device)
            loss, prediction = self._loss(x, answer)
            total += loss.item() * (len(part) / len(rows))
            right.append(self._right(prediction, answer).cpu().numpy())
        return total, np.concatenate(right)

    def _errors_of_the_mean(self) -> dict[bool, float]:
        """Mean squared error of the training samples' mean, as the answer to training and to held-out samples."""
        if self.prepared.settings["task"] != "autoencoder":
            return {}
        x, held_out = (rows.x.cpu().double() for rows in (self.prepared.training, self.prepared.held_out))
        mean = x.mean(0)
        return {is_held: float((rows - mean).square().mean()) for is_held, rows in ((False, x), (True, held_out))}

    @staticmethod
    def _taken(values: Tensor, index: Tensor) -> Tensor:
        return values[index.to(values.device)]

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._half is None else torch.autocast(self.device.type, self._half)

    def _scaler(self, precision: str) -> torch.amp.GradScaler | None:
        """A scaler of losses for float16, whose small values would vanish."""
        if precision == "float32":
            return None
        try:
            with torch.autocast(self.device.type, HALF[precision]):
                pass
            return torch.amp.GradScaler(self.device.type) if precision == "float16" else None
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.name} cannot be trained in {precision} on {self.device.type} "
                f"({str(error).splitlines()[0]}): set training.precision to float32."
            ) from error

    # ------------------------------------------------------------------ memory

    def _state_before(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What a pass changes beside the gradient: random numbers, and buffers."""
        return self._random_state(self.device), [buffer.detach().clone() for buffer in self.model.buffers()]

    def _restore(self, before: tuple[dict[str, Any], list[Tensor]]) -> None:
        restore_random_state(before[0], self.device)
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), before[1], strict=True):
                buffer.copy_(value)

    def _halve(self, update: int, samples: int) -> None:
        size = min(self._size or samples, samples)
        where = f"{self.name} ran out of memory at update {update} with {size} samples at once"
        if self._couples is not None:
            raise UserError(
                f"{where}, which cannot be split because of its batch normalisation ('{self._couples}'): use a smaller "
                "model, fewer groups, or a device with more memory."
            )
        if self._asked != "auto":
            raise UserError(f"{where}: set training.microbatch to auto, or to fewer samples.")
        if size == 1:
            raise UserError(f"{where}, the least there can be: use a smaller model, or a device with more memory.")
        self._size = -(-size // 2)
        self.microbatches.append((update, self._size))


@contextmanager
def _looking_on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random numbers are put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    random = random_state(device)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        restore_random_state(random, device)
