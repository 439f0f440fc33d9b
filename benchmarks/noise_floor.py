"""Calibrates NOISE_CONSTANTS and NOISE_CONSTANTS_OF_HALF of autospec/introspection/spectra.py.

Small networks are trained in float32 and watched.  At chosen steps the same step, from the same weights, is
computed again in float64, and the spectra are compared.  The largest deviation, in units of
``eps * sigma_1 * sqrt(max(m, n, rows))``, is what the constant c of the noise floor must cover.

``python benchmarks/noise_floor.py`` prints one table and the constants that follow from it;
``--precision bfloat16`` does so for a training under autocast, whose constants are others.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import chain, digits
from oracle import exact_spectra

import autospec
from autospec.introspection.spectra import NOISE_CONSTANTS, NOISE_CONSTANTS_OF_HALF

STATISTICS = ("gradient", "activation", "adjoint")
COMPARED_STEPS = {200: (0, 3, 10, 30, 100, 300), 2000: (0, 3, 30)}
"""How many samples, and at which steps float32 and float64 are compared."""
MEMORISED_STEPS = (1000,)
"""Shown, not used: see `main`."""
WIDTHS = {"8": (8,), "32": (32,), "64-16-64": (64, 16, 64)}
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "ReLU": nn.ReLU}
# ReLU is shown but not used: where the sign of an input differs between float32 and float64, one sample's row
# appears or vanishes, which is a change of the function and no rounding of its spectrum.
CALIBRATING = ("tanh", "sigmoid")

Key = tuple[str, str]
Deviation = tuple[float, str]
"""How many units, and where."""


def deviations(
    widths: Sequence[int],
    activation: type[nn.Module],
    task: str,
    samples: int,
    compared: Sequence[int],
    dtype: torch.dtype,
) -> dict[str, list[Deviation]]:
    """Train one network and list each compared step's largest deviation, by statistic."""
    torch.manual_seed(0)
    images, labels = digits(samples)
    x, classes = torch.from_numpy(images), torch.from_numpy(labels).long()
    model = chain(784, *widths, 784 if task == "autoencoder" else 4, activation=activation)
    target = x if task == "autoencoder" else classes
    loss = nn.functional.mse_loss if task == "autoencoder" else nn.functional.cross_entropy
    rows = [torch.nonzero(classes == label)[:, 0] for label in range(4)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    exact: dict[int, dict[Key, list[Tensor]]] = {}
    with autospec.watch(model, groups=labels, statistics=STATISTICS, steps=compared) as watcher:
        for step in range(max(compared) + 1):
            if step in compared:
                exact[step] = exact_of_copy(model, widths, activation, x, target, rows, loss)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                output = model(x)
            loss(output.float(), target).backward()
            watcher.step()
            optimizer.step()
    tree = watcher.trajectories
    found: dict[str, list[Deviation]] = {statistic: [] for statistic in STATISTICS}
    sizes = [samples, *(len(group) for group in rows)]
    for statistic, (position, step) in itertools.product(STATISTICS, enumerate(compared)):
        worst: Deviation = (0.0, "")
        for (layer, name), spectra in exact[step].items():
            if name != statistic:
                continue
            recorded = tree[f"layers/{layer}/{statistic}"].values[position]
            shape = dict(model.named_parameters())[layer].shape
            for group, right in enumerate(spectra):
                largest = max(sizes[group], *floor_shape(statistic, shape))
                kept = min(len(right), recorded.shape[1])
                error = np.abs(recorded[group, :kept] - right[:kept].numpy()).max()
                unit = torch.finfo(dtype).eps * float(right[0]) * math.sqrt(largest)
                if error / unit > worst[0]:
                    worst = (error / unit, f"{layer}, {'all' if group == 0 else f'digit {group - 1}'}")
        found[statistic].append(worst)
    return found


def exact_of_copy(
    model: nn.Module,
    widths: Sequence[int],
    activation: type[nn.Module],
    x: Tensor,
    target: Tensor,
    rows: Sequence[Tensor],
    loss,
) -> dict[Key, list[Tensor]]:
    """Compute the step about to be made in float64, in a network without hooks that has the same weights."""
    last = next(parameter for parameter in reversed(list(model.parameters())) if parameter.ndim == 2)
    twin = chain(784, *widths, last.shape[0], activation=activation)
    twin.load_state_dict(model.state_dict())
    return exact_spectra(twin, x, target, rows, loss)


def floor_shape(statistic: str, shape: Sequence[int]) -> tuple[int, int]:
    """The shape that the watcher gives to `noise_floor`: the matrix, or the width of the rows."""
    if statistic == "gradient":
        return shape[0], shape[1]
    return (shape[1], 1) if statistic == "activation" else (shape[0], 1)


def rounded_up(value: float) -> float:
    """Round up to one significant digit."""
    power = 10.0 ** math.floor(math.log10(value))
    return round(math.ceil(value / power * (1 - 1e-9)) * power, 12)


def main() -> None:
    """Print the table and the constants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    dtype = getattr(torch, parser.parse_args().precision)
    print("| task | hidden | activation | samples | " + " | ".join(STATISTICS) + " |")
    print("|---|---|---|---|---|---|---|")
    largest = dict.fromkeys(STATISTICS, 0.0)
    trainings = [
        (*choice, COMPARED_STEPS[choice[-1]], choice[2] in CALIBRATING)
        for choice in itertools.product(("autoencoder", "classifier"), WIDTHS, ACTIVATIONS, COMPARED_STEPS)
    ]
    # A classifier that knows its samples by heart: probability - 1 cancels in float32, the adjoint of the
    # output is rounding error of the loss itself, and the deviation grows as long as the training lasts.  No
    # constant can cover that.
    trainings += [("classifier", "64-16-64", "tanh", 200, MEMORISED_STEPS, False)]
    for task, hidden, activation, samples, compared, calibrates in trainings:
        found = deviations(WIDTHS[hidden], ACTIVATIONS[activation], task, samples, compared, dtype)
        cells = []
        for statistic in STATISTICS:
            units, where, step = max((*found[statistic][i], step) for i, step in enumerate(compared))
            cells.append(f"{units:.2g} (step {step}, {where})")
            if calibrates:
                largest[statistic] = max(largest[statistic], units)
        name = activation if calibrates else f"{activation}, not used"
        print(f"| {task} | {hidden} | {name} | {samples} | " + " | ".join(cells) + " |", flush=True)
    print("\nLargest of those used, in units of eps * sigma_1 * sqrt(max(m, n, rows)):")
    for statistic in STATISTICS:
        print(
            f"- {statistic}: {largest[statistic]:.3g}, so c = {rounded_up(2 * largest[statistic]):g} "
            f"(spectra.py has {(NOISE_CONSTANTS if dtype == torch.float32 else NOISE_CONSTANTS_OF_HALF)[statistic]:g})"
        )


if __name__ == "__main__":
    main()
