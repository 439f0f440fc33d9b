"""How many operations a step asks of a GPU: ``python benchmarks/operations.py``.

Each costs the processor some microseconds, however small it is, and a small network's training waits for nothing else.  They
are counted without a GPU, on the device that is one in name of ``tests/device``, where the ways for GPUs are taken: those that
move or compute numbers, not those that look at them differently.  Adam's are few, as on a GPU, where it updates all weights
together.  The device has no fused recurrent layer, so torch's own LSTM counts step by step there.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from models import CASES
from torch import Tensor, nn

import autospec

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.device.simulated import NAME, Operations, library, moved

# Operations that look at numbers differently.
LOOKS = {
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "alias",
    "as_strided",
    "split",
    "split_with_sizes",
    "slice",
}
LOOKS |= {"select", "unbind", "expand", "t", "transpose", "permute", "unsqueeze", "squeeze", "diagonal", "unfold"}
LOOKS |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # no number is there yet
STATISTICS = {"gradient": ("gradient",), "all three": ("gradient", "activation", "adjoint")}


def operations(model: nn.Module, x: Tensor, target: Tensor, name: str, watcher: autospec.Watcher | None) -> int:
    """Operations of a step after three others."""
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    for _ in range(4):
        with Operations(LOOKS) as found:
            optimizer.zero_grad()
            CASES[name].loss(model(x), target).backward()
            if watcher is not None:
                watcher.step()
            optimizer.step()
    return found.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "An output with one or more elements was resized")  # by the processor's loss
    library()
    print(f"`python benchmarks/operations.py`; torch {torch.__version__}.\n")
    print("| model | plain step | and recording the gradient | and recording all three |\n|---|---|---|---|")
    for name in options.models:
        case = CASES[name]
        torch.manual_seed(0)
        x, target, labels = case.make_data()
        inputs = torch.from_numpy(x).to(NAME)
        answer = inputs if target is None else torch.from_numpy(target).to(NAME)
        model = moved(case.make_model())
        plain = operations(model, inputs, answer, name, None)
        more = []
        for statistics in STATISTICS.values():
            with autospec.watch(model, list(labels), statistics=statistics, quiet=True) as watcher:
                more.append(operations(model, inputs, answer, name, watcher) - plain)
        print(f"| {case.title} | {plain} | + {more[0]} | + {more[1]} |", flush=True)


if __name__ == "__main__":
    main()
