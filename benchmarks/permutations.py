"""Processor time of a permutation test: two networks of the paper's size, two groups, all measures, one thread.

``python benchmarks/permutations.py`` prints a Markdown table for README.md, two lines a network.  A few of the steps that a
training of 1,000 updates schedules, spread over them, are measured and the time is multiplied; drawing the labellings and
the tables of all steps count once, in full.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import torch
from battery import machine
from models import chain, cnn1d, digits
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F

from autospec.introspection.sample_shares import sample_shares
from autospec.introspection.spectra import singular_values
from autospec.statistics import measures
from autospec.statistics.measures import STATISTICS
from autospec.statistics.permutation_test import NullDistributions, evaluate
from autospec.statistics.permutations import compare, draw_labellings
from autospec.training.snapshots import snapshot_updates

UPDATES = 1000
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


def seconds_of(make, measured_as, permutations: int, measured: int, steps: int) -> dict[str, dict[str, float]]:
    """Processor time of the parts, in seconds for all steps, of each set of measures in ``measured_as``."""
    torch.manual_seed(0)
    model, x = make()
    one = torch.ones(1, 64, 64, dtype=torch.float64)
    torch.linalg.eigvalsh(one @ one)  # loading libraries is not counted
    labels = np.random.default_rng(0).permutation(np.where(np.arange(len(x)) % 2, "a", "b"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    begin = time.process_time()
    comparison = compare(labels, "a", "b")
    labellings = draw_labellings(comparison, permutations, seed=0)
    drawing = time.process_time() - begin
    distributions = {name: NullDistributions(comparison, labellings, each) for name, each in measured_as.items()}
    taken = {name: {"shares": 0.0, "statistics": 0.0, "eigenvalues": 0.0} for name in measured_as}
    now = next(iter(measured_as))

    def timed(grams):
        """LAPACK's part of the statistics."""
        began = time.process_time()
        values = singular_values(grams)
        taken[now]["eigenvalues"] += time.process_time() - began
        return values

    measures.singular_values = timed
    scheduled = snapshot_updates(steps, UPDATES)
    chosen = [scheduled[round((i + 0.5) * len(scheduled) / measured - 0.5)] for i in range(measured)]
    for step in range(max(chosen) + 1):
        if step in chosen:
            begin = time.process_time()
            shares = sample_shares(model, lambda model: F.mse_loss(model(x), x), len(x))
            of_shares = time.process_time() - begin
            for now, each in distributions.items():
                begin = time.process_time()
                each.add(step, shares)
                taken[now]["statistics"] += time.process_time() - begin
                taken[now]["shares"] += of_shares
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
    measures.singular_values = singular_values
    found = {}
    for name, each in distributions.items():
        for place, step in enumerate(scheduled):  # the tables of as many steps as there would be
            each.steps.setdefault(step, each.steps[chosen[place * measured // len(scheduled)]])
        begin = time.process_time()
        evaluate(each)
        tables = time.process_time() - begin
        parts = {key: value * steps / measured for key, value in taken[name].items()}
        found[name] = {**parts, "tables": tables, "all": drawing + parts["shares"] + parts["statistics"] + tables}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20, help="scheduled steps")
    parser.add_argument("--measured", type=int, default=5, help="steps that are measured")
    parser.add_argument("--only", default="", help="networks whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's
    chosen = {"contrast, difference of spectra": ("contrast", "difference"), "all five": STATISTICS}
    print(
        f"On {machine('cpu')}. Processor time, one thread; {options.permutations} permutations, {options.measured} of "
        f"{options.steps} scheduled steps measured.\n",
        flush=True,
    )
    print("| network | measures | seconds | of these shares | statistics | of these eigenvalues | tables | bar |")
    print("|---|---|---|---|---|---|---|---|")
    for title, make in ((title, make) for title, make in NETWORKS.items() if options.only in title):
        found = seconds_of(make, chosen, options.permutations, options.measured, options.steps)
        for words, taken in found.items():
            parts = " | ".join(f"{taken[key]:.1f}" for key in ("shares", "statistics", "eigenvalues", "tables"))
            print(f"| {title} | {words} | {taken['all']:.1f} | {parts} | {BAR:.0f} |", flush=True)


if __name__ == "__main__":
    main()
