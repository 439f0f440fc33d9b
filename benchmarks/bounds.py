"""What recording costs at least: ``python benchmarks/bounds.py``.

Whatever the program, samples must be brought together by group, the groups' shares formed, their Gram matrices in float64,
and these matrices' eigenvalues; with activations and adjoints too, Gram matrices and eigenvalues of each group's rows, or,
where eight leading values are followed from step to step, a product with a block of vectors and one back.  Here just these
are timed for the models of cost.py, each as torch and numpy do it fastest, beside the plain step in turn.  Data that stay the
same are brought together and decomposed once, which is not counted.  (Where a layer sees many tokens of each sample, one
product a sample spares bringing them together for the gradient.)  Hooks, checks and Python come on top.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from contestants import Contestant, WatchLeading, WithFactors, as_matrix, as_rows, layers_of, weight_gradient
from cost import processor
from models import CASES, Batch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from autospec.introspection.spectra import column_gram, eigenvalues, smaller_gram
from autospec.introspection.tracked import MORE, worthwhile
from autospec.introspection.workspace import Workspace

# Values of activations and adjoints that are wanted.
LEADING = WatchLeading.options["singular_values"]


def factors_of(plain: Contestant) -> dict[str, tuple[Tensor, Tensor]]:
    """What enters each layer and the adjoint at its output, by the name of the weight, from one step."""
    seen = WithFactors(plain.case, plain.model, plain.batch, ("gradient", "activation", "adjoint"))
    seen.open()
    plain.step()
    seen.close()
    return {name: (seen.activations[name].clone(), seen.adjoints[name].clone()) for name in seen.layers}


class Work:
    """What is to be done at one step, by kind.

    Parameters
    ----------
    plain : Contestant
        A training whose next step gives the factors.
    batch : Batch
        Its batch.
    rows_too : bool
        Whether activations and adjoints are recorded, and not the gradient alone.
    """

    def __init__(self, plain: Contestant, batch: Batch, rows_too: bool) -> None:
        self.products: list[Callable[[], object]] = []
        self.grams: list[Callable[[], object]] = []
        self.changing: list[tuple[Tensor, Tensor]] = []
        groups = batch.rows_of_groups()
        self.order = torch.cat(groups)
        self._matrices: dict[int, list[Tensor]] = {}
        layers = layers_of(plain.model)
        for name, (activation, adjoint) in factors_of(plain).items():
            constant = activation.shape == batch.x.shape and torch.equal(activation, batch.x)
            sides = (adjoint,) if constant else (activation, adjoint)
            self.changing += [(side, torch.empty_like(side)) for side in sides]
            self._shares(layers[name], activation, adjoint, groups)
            if rows_too:
                share = min(as_matrix(layers[name].weight).shape)
                for side in sides:
                    matrices = [as_rows(layers[name], side[rows]).contiguous() for rows in groups]
                    self._rows(matrices, as_rows(layers[name], side).contiguous(), share)

    def _shares(self, layer: nn.Module, activation: Tensor, adjoint: Tensor, groups: Sequence[Tensor]) -> None:
        shares = []
        for rows in groups:
            a, d = activation[rows].contiguous(), adjoint[rows].contiguous()
            product = functools.partial(weight_gradient, layer, a, d)
            share = as_matrix(product())
            few = as_rows(layer, a), as_rows(layer, d)
            if len(few[0]) < min(share.shape):  # a share has no larger rank than rows: the smaller matrices, no product
                self.grams += [functools.partial(smaller_gram, side) for side in few]
                self._decompose(smaller_gram(few[0]))
            else:
                self.products.append(product)
                shares.append(share)
        whole = as_matrix(weight_gradient(layer, activation, adjoint))
        for share in (*shares, whole):  # the batch's gradient is there without a product
            wide = share if len(share) <= share.shape[1] else share.T.contiguous()
            self.grams.append(functools.partial(smaller_gram, wide))
            self._decompose(smaller_gram(wide))

    def _rows(self, groups: Sequence[Tensor], whole: Tensor, share: int) -> None:
        """Spectra of the rows of each group and of the batch."""
        width = whole.shape[1]
        matrices = [whole, *groups]
        followed = worthwhile(tuple(len(matrix) for matrix in matrices), width, LEADING)
        for matrix, follow in zip(matrices, followed, strict=True):
            if follow:
                block = torch.randn(width, LEADING + MORE)
                self.products += [functools.partial(torch.mm, matrix, block)]
                self.products += [functools.partial(torch.mm, matrix.T, matrix @ block)]
                continue
            if len(matrix) < width:
                # Where the share is of few rows too, their Gram matrix has been counted.
                if matrix is whole or len(matrix) >= share:
                    self.grams.append(functools.partial(smaller_gram, matrix))
            elif matrix is not whole or any(len(group) < width for group in groups):
                self.grams.append(functools.partial(column_gram, matrix, Workspace()))  # the groups' sum is the batch's
            self._decompose(smaller_gram(matrix))

    def _decompose(self, gram: Tensor) -> None:
        self._matrices.setdefault(len(gram), []).append(gram)

    def parts(self) -> dict[str, Callable[[], object]]:
        """The four kinds of work, each for all layers."""
        stacks = [torch.stack(same) for same in self._matrices.values()]
        return {
            "sorting": lambda: [torch.index_select(side, 0, self.order, out=room) for side, room in self.changing],
            "products": lambda: [product() for product in self.products],
            "Gram matrices": lambda: [gram() for gram in self.grams],
            "eigenvalues": lambda: [eigenvalues(stack) for stack in stacks],
        }


def measure(model: str, rows_too: bool, repetitions: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a plain step, and of each kind of work; medians, in turn."""
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's
    case = CASES[model]
    x, target, labels = case.make_data()
    inputs = torch.from_numpy(x)
    batch = Batch(inputs, inputs if target is None else torch.from_numpy(target), [str(label) for label in labels])
    torch.manual_seed(0)
    plain = Contestant(case, case.make_model(), batch, ("gradient",))
    plain.open()
    work = {"plain": plain.step, **Work(plain, batch, rows_too).parts()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 2):
        for name, function in work.items():
            begin = time.process_time()
            function()
            if repetition >= 2:
                times[name].append(1000 * (time.process_time() - begin))
    taken = {name: statistics.median(values) for name, values in times.items()}
    return taken.pop("plain"), taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = [
        name for name in CASES if name not in ("lstm", "bert-stock")
    ]  # their weights are not in modules of their own
    parser.add_argument("--models", nargs="+", choices=chosen, default=chosen)
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    print(
        f"`python benchmarks/bounds.py` on {processor()}; torch {torch.__version__}, numpy {np.__version__}; one thread.\n"
    )
    print(
        "| model | spectra of | plain step, ms | sorting | products | Gram matrices | eigenvalues | at least, times a plain step |"
    )
    print("|---|---|---|---|---|---|---|---|")
    # A process for each, since what has been freed before decides how long a plain step takes.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        for name in options.models:
            for kind in ("gradient", "all three"):
                step, taken = fresh.submit(measure, name, kind == "all three", options.repetitions).result()
                shares = {part: milliseconds / step for part, milliseconds in taken.items()}
                cells = " | ".join(f"{share:.2f}" for share in shares.values())
                print(
                    f"| {CASES[name].title} | {kind} | {step:.1f} | {cells} | {1 + sum(shares.values()):.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
