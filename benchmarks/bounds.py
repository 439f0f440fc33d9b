"""What recording gradient spectra costs at least: ``python benchmarks/bounds.py``.

Whatever the program, samples must be brought together by group, the groups' shares formed, their Gram matrices in float64,
and these matrices' eigenvalues.  Here just these four are timed for the models of cost.py, each as torch and numpy do it
fastest, beside the plain step in turn.  Data that stay the same are brought together once, which is not counted.  (Where a
layer sees many tokens of each sample, one product a sample spares bringing them together.)  Hooks, checks and Python come on top.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from contestants import Contestant, WithFactors, as_matrix, as_rows, layers_of, weight_gradient
from cost import processor
from models import CASES, Batch, Case
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from autospec.introspection.spectra import eigenvalues, smaller_gram


def factors_of(plain: Contestant) -> dict[str, tuple[Tensor, Tensor]]:
    """What enters each layer and the adjoint at its output, by the name of the weight, from one step."""
    seen = WithFactors(plain.case, plain.model, plain.batch, ("gradient", "activation", "adjoint"))
    seen.open()
    plain.step()
    seen.close()
    return {name: (seen.activations[name].clone(), seen.adjoints[name].clone()) for name in seen.layers}


def parts_of(plain: Contestant, batch: Batch) -> dict[str, Callable[[], object]]:
    """The four kinds of work, each for all layers."""
    layers = layers_of(plain.model)
    products: list[Callable[[], Tensor]] = []
    matrices: list[Tensor] = []
    grams: list[Callable[[], Tensor]] = []
    order = torch.cat(batch.rows_of_groups())
    changing: list[tuple[Tensor, Tensor]] = []
    for name, (activation, adjoint) in factors_of(plain).items():
        sides = (
            (adjoint,)
            if activation.shape == batch.x.shape and torch.equal(activation, batch.x)
            else (activation, adjoint)
        )
        changing += [(side, torch.empty_like(side)) for side in sides]
        shares = []
        for rows in batch.rows_of_groups():
            a, d = activation[rows].contiguous(), adjoint[rows].contiguous()

            def product(layer: nn.Module = layers[name], a: Tensor = a, d: Tensor = d) -> Tensor:
                return weight_gradient(layer, a, d)

            share = as_matrix(product())
            side = min(share.shape)
            few_a, few_d = as_rows(layers[name], a), as_rows(layers[name], d)
            if len(few_a) < side:  # a share has no larger rank than rows: the smaller matrices, and no product
                grams += [lambda few=few: smaller_gram(few) for few in (few_a, few_d)]
                matrices.append(few_a.double() @ few_a.double().T)
            else:
                products.append(product)
                shares.append(share)
        whole = as_matrix(weight_gradient(layers[name], activation, adjoint))
        for share in (*shares, whole):  # the batch's gradient is there without a product
            wide = share if len(share) <= share.shape[1] else share.T.contiguous()
            grams.append(lambda wide=wide: smaller_gram(wide))
            matrices.append(wide.double() @ wide.double().T)
    by_size: dict[int, list[Tensor]] = {}
    for matrix in matrices:
        by_size.setdefault(len(matrix), []).append(matrix)
    stacks = [torch.stack(same) for same in by_size.values()]
    return {
        "sorting": lambda: [torch.index_select(side, 0, order, out=room) for side, room in changing],
        "products": lambda: [product() for product in products],
        "Gram matrices": lambda: [gram() for gram in grams],
        "eigenvalues": lambda: [eigenvalues(stack) for stack in stacks],
    }


def measure(case: Case, repetitions: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a plain step, and of each kind of work; medians, in turn."""
    x, target, labels = case.make_data()
    inputs = torch.from_numpy(x)
    batch = Batch(inputs, inputs if target is None else torch.from_numpy(target), [str(label) for label in labels])
    torch.manual_seed(0)
    plain = Contestant(case, case.make_model(), batch, ("gradient",))
    plain.open()
    work = {"plain": plain.step, **parts_of(plain, batch)}
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
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's
    print(
        f"`python benchmarks/bounds.py` on {processor()}; torch {torch.__version__}, numpy {np.__version__}; one thread.\n"
    )
    print(
        "| model | plain step, ms | sorting | products | Gram matrices | eigenvalues | at least, times a plain step |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        step, taken = measure(CASES[name], options.repetitions)
        shares = {part: milliseconds / step for part, milliseconds in taken.items()}
        cells = " | ".join(f"{share:.2f}" for share in shares.values())
        print(f"| {CASES[name].title} | {step:.1f} | {cells} | {1 + sum(shares.values()):.2f} |", flush=True)


if __name__ == "__main__":
    main()
