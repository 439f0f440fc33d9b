"""Processor time of a permutation test: two networks of the paper's size, two groups, all measures, one thread.

``python benchmarks/permutations.py`` prints one line a network.  A few of the scheduled steps are measured and the time
is multiplied; drawing the labellings and the tables of all steps count once, in full.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import torch
from models import chain, cnn1d, digits
from torch import nn
from torch.nn import functional as F

from autospec.introspection.sample_shares import sample_shares
from autospec.statistics.measures import STATISTICS
from autospec.statistics.permutation_test import NullDistributions, evaluate
from autospec.statistics.permutations import compare, draw_labellings

BAR = 60.0  # seconds for 1,000 permutations and 20 steps


class SeriesAutoencoder(nn.Module):
    """Convolutions over time and back: the labels have no part in its training."""

    def __init__(self, networks: int = 53, channels: int = 32) -> None:
        super().__init__()
        self.encode = cnn1d(channels)[:5]
        self.decode = nn.Conv1d(channels, networks, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.relu(self.encode(x)))


def mlp(width: int) -> tuple[nn.Module, torch.Tensor]:
    """512 digits."""
    return chain(784, width, 784), torch.from_numpy(digits(512)[0])


def series() -> tuple[nn.Module, torch.Tensor]:
    """Noise with the shape of a cohort's time courses."""
    return SeriesAutoencoder(), torch.randn(157, 53, 150)


NETWORKS = {
    **{f"MLP autoencoder 784-{width}-784, N 512": partial(mlp, width) for width in (32, 64, 128)},
    "1D CNN autoencoder, 32 channels, (157, 53, 150)": series,
}


def seconds_of(make, statistics, permutations: int, measured: int, steps: int) -> dict[str, float]:
    """Processor time of the parts, in seconds for all steps."""
    torch.manual_seed(0)
    model, x = make()
    labels = np.random.default_rng(0).permutation(np.where(np.arange(len(x)) % 2, "a", "b"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    begin = time.process_time()
    comparison = compare(labels, "a", "b")
    labellings = draw_labellings(comparison, permutations, seed=0)
    drawing = time.process_time() - begin
    distributions = NullDistributions(comparison, labellings, statistics)
    taken = {"shares": 0.0, "statistics": 0.0}
    for step in range(measured):
        begin = time.process_time()
        shares = sample_shares(model, lambda model: F.mse_loss(model(x), x), len(x))
        between = time.process_time()
        distributions.add(step, shares)
        taken["shares"] += between - begin
        taken["statistics"] += time.process_time() - between
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
    for step in range(measured, steps):  # the tables of as many steps as there would be
        distributions.steps[step] = distributions.steps[step % measured]
    begin = time.process_time()
    evaluate(distributions)
    tables = time.process_time() - begin
    return {"drawing": drawing, **{key: value * steps / measured for key, value in taken.items()}, "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20, help="scheduled steps")
    parser.add_argument("--measured", type=int, default=3, help="steps that are measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {"gradient, contrast": ("contrast", "difference"), "all measures": STATISTICS}
    print("| network | measures | seconds | of these shares | statistics | tables | bar |")
    print("|---|---|---|---|---|---|---|")
    for title, make in NETWORKS.items():
        for words, statistics in chosen.items():
            taken = seconds_of(make, statistics, options.permutations, options.measured, options.steps)
            parts = " | ".join(f"{taken[key]:.1f}" for key in ("shares", "statistics", "tables"))
            print(f"| {title} | {words} | {sum(taken.values()):.1f} | {parts} | {BAR:.0f} |", flush=True)


if __name__ == "__main__":
    main()
