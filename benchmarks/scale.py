"""Large models watched within a budget: what autospec.watch chooses, what that costs, and the peak memory.

``python benchmarks/scale.py`` trains an encoder of the size of BERT-base and a 3D ResNet of the size of ResNet-18,
each beside an unwatched copy of itself, in turn, one period of the chosen schedule at a time.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from models import Mean, cohort
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from autospec import watch
from autospec.introspection.schedule import CALIBRATION


class Encoder(nn.Module):
    """Twelve layers of 768 over time windows, as large as BERT-base without its vocabulary."""

    def __init__(self, features: int = 53, width: int = 768) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, activation="gelu", batch_first=True)
        self.embed = nn.Linear(features, width)
        self.encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.classify = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.encoder(self.embed(x)).mean(1))


class Residual(nn.Module):
    """ResNet's basic block over volumes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm3d(outputs), nn.BatchNorm3d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.skip(x))


def resnet18(widths: tuple[int, ...] = (64, 128, 256, 512)) -> nn.Sequential:
    """ResNet-18 over volumes of one channel."""
    layers: list[nn.Module] = [nn.Conv3d(1, widths[0], 7, 2, padding=3, bias=False), nn.BatchNorm3d(widths[0])]
    layers += [nn.ReLU(), nn.MaxPool3d(3, 2, padding=1), Residual(widths[0], widths[0], 1)]
    layers += [Residual(widths[0], widths[0], 1)]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [Residual(inputs, outputs, 2), Residual(outputs, outputs, 1)]
    return nn.Sequential(*layers, Mean(2, 4), nn.Linear(widths[-1], 2))


@dataclass(frozen=True)
class Large:
    """A large model, and the shape of its batch on a processor and on a GPU."""

    title: str
    make_model: Callable[[], nn.Module]
    shapes: dict[str, tuple[int, ...]]


MODELS = {
    "bert": Large("encoder, 12 layers, 768 wide", Encoder, {"cpu": (4, 32, 53), "cuda": (64, 128, 53)}),
    "resnet": Large("3D ResNet-18", resnet18, {"cpu": (4, 1, 32, 40, 32), "cuda": (32, 1, 96, 112, 96)}),
}


class Trainer:
    """A model and what its training step needs."""

    def __init__(self, name: str, device: str) -> None:
        torch.manual_seed(0)
        x, target, _ = cohort(*MODELS[name].shapes[device])
        self.model = MODELS[name].make_model().to(device)
        self.x, self.target = torch.from_numpy(x).to(device), torch.from_numpy(target).to(device)
        self.labels = np.where(target == 1, "SZ", "HC")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.cuda = device != "cpu"

    def watched(self, budget: float) -> object:
        """A watcher of this model."""
        return watch(self.model, groups=self.labels, budget=budget, singular_values=8)

    def train(self, steps: int, watcher: object = None) -> float:
        """Train, and return the seconds: of the processor, or of the clock on a GPU."""
        clock = time.perf_counter if self.cuda else time.process_time
        self.wait()
        begin = clock()
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.target).backward()
            if watcher is not None:
                watcher.step()
            self.optimizer.step()
        self.wait()
        return clock() - begin

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()


def peak_memory(name: str, device: str, budget: float | None) -> int:
    """Bytes at the peak of a process that trains, watched or not, for as long as the calibration takes."""
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    trainer = Trainer(name, device)
    if budget is None:
        trainer.train(len(CALIBRATION))
    else:
        with trainer.watched(budget) as watcher:
            trainer.train(len(CALIBRATION), watcher)
    if trainer.cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_process(function: Callable[..., int], *arguments: object) -> int:
    """Run a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(name: str, device: str, steps: int, budget: float) -> str:
    """Train a watched and an unwatched copy in turn, and say what was found."""
    plain_peak, watched_peak = (in_a_process(peak_memory, name, device, choice) for choice in (None, budget))
    plain, own = Trainer(name, device), Trainer(name, device)
    plain.train(2)
    base = watched = 0.0
    clock = time.perf_counter if plain.cuda else time.process_time
    with own.watched(budget) as watcher:
        calibration = own.train(len(CALIBRATION), watcher)
        every = int(watcher.trajectories.attrs["schedule"]["every"])
        periods = max(1, (steps - len(CALIBRATION)) // every)
        for _ in range(periods):
            base += plain.train(every)
            watched += own.train(every, watcher)
        begin = clock()
    recorded = watcher.trajectories.sizes["step"]
    closing = clock() - begin
    count = periods * every
    step = base / count
    whole = (calibration + watched + closing) / (step * (count + len(CALIBRATION))) - 1
    parameters = sum(parameter.numel() for parameter in own.model.parameters())
    batch = " x ".join(map(str, own.x.shape))
    return (
        f"{MODELS[name].title}, {parameters / 1e6:.0f} million parameters, batch {batch}, {1e3 * step:.0f} ms a plain step\n"
        f"  schedule chosen for a budget of {budget:.0%}: every {every} steps; {recorded} of "
        f"{count + len(CALIBRATION)} steps recorded\n"
        f"  overhead after the calibration: {watched / base - 1:.1%} over {count} steps; "
        f"with the calibration and leaving the block: {whole:.1%}\n"
        f"  calibration: {calibration / step - len(CALIBRATION):.1f} plain steps beyond its own {len(CALIBRATION)}\n"
        f"  peak memory: {plain_peak / 1e9:.2f} GB plain, {watched_peak / 1e9:.2f} GB watched"
    )


def main() -> None:
    """Measure the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=40, help="watched steps; at least one period is trained")
    parser.add_argument("--budget", type=float, default=0.1)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
        threadpool_limits(1)  # numpy's
    for name in options.models:
        print(measure(name, options.device, options.steps, options.budget), flush=True)


if __name__ == "__main__":
    main()
