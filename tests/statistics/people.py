"""A small cohort with known differences, and trainings on it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from autospec.datasets.labelled import labelled, write_labelled
from autospec.training.loop import Trainer
from autospec.training.prepare import Prepared, prepare
from autospec.training.snapshots import snapshot_updates, weights_of, write_snapshots


def write_people(
    path: Path,
    count: int = 40,
    *,
    effect: float = 0.0,
    motion_effect: float = 0.0,
    covariates: bool = True,
    seed: int = 0,
    scans: int | np.ndarray = 1,
) -> Path:
    """Write a labelled data set: half SZ, half HC, either sex, two sites; each subject so often."""
    generator = np.random.default_rng(seed)
    diagnosis = np.array(["SZ", "HC"] * (count // 2))
    sex = np.array(["F", "F", "M", "M"] * (count // 4) + ["F"] * (count % 4))
    site = generator.permutation(np.array(["A", "B"] * (count // 2)))
    age, motion = generator.normal(38, 10, count), generator.gamma(4, 0.05, count)
    x = generator.normal(size=(count, 8))
    x[:, :3] += effect * (diagnosis == "SZ")[:, None]
    x[:, 2:6] += motion_effect * (motion > np.median(motion))[:, None]
    names = [f"{i:03d}" for i in range(count)]
    rows = np.repeat(np.arange(count), scans)
    x = x[rows] + (0.3 * generator.normal(size=(len(rows), 8)) if len(rows) > count else 0)
    dataset = labelled(
        x,
        ("region",),
        [f"{names[row]}-{i}" for i, row in enumerate(rows)],
        diagnosis[rows].tolist(),
        {"sex": sex[rows].tolist(), "site": site[rows].tolist()},
        {},
        subjects=[names[row] for row in rows],
        covariates={"age": age[rows].tolist(), "mean_fd": motion[rows].tolist()} if covariates else None,
    )
    write_labelled(dataset, path)
    return path


def settings_of(task: str, groupings: list[str] | None = None, **training: Any) -> Any:
    """Settings of a training."""
    return {
        "name": "people/net",
        "model": "mlp",
        "model_code": None,
        "task": task,
        "hidden": [4],
        "activation": "tanh",
        "groupings": groupings or [],
        "training": {
            "epochs": 6,
            "optimizer": "adam",
            "learning_rate": 0.05,
            "seed": 0,
            "batch": "full",
            "microbatch": "none",
            "precision": "float32",
            "held_out": 0.1,
            "split_seed": 0,
            "snapshots": [0, 2, 5],
            **training,
        },
        "introspection": {"layers": None},
    }


class NobodyWatches:
    """What the loop wants of a watcher."""

    def set_groups(self, labels: Any) -> None:
        """Nothing is recorded."""

    def discard(self) -> None:
        """Nothing has arrived."""


def train(settings: Any, dataset: Path, weights: Path) -> Prepared:
    """Train without watching, and keep the weights."""
    prepared = prepare(settings, str(dataset), torch.device("cpu"))
    trainer, kept = Trainer(prepared), {}
    updates = settings["training"]["epochs"] * trainer.batches.in_an_epoch
    chosen = snapshot_updates(settings["training"]["snapshots"], updates)
    for update in range(updates):
        if update in chosen:
            kept[update] = weights_of(prepared.model)
        trainer.gradient(update, NobodyWatches())
        trainer.step()
    write_snapshots(weights, prepared, kept, {})
    return prepared


def contrast_by_autograd(
    prepared: Prepared, weights: dict[str, torch.Tensor], first: np.ndarray, second: np.ndarray
) -> Any:
    """Singular values of G_a/N_a - G_b/N_b of each matrix, from the definition in float64: a copy of the weights a group.

    Parameters
    ----------
    prepared : Prepared
        Samples and network.
    weights : dict of str to Tensor
        Its weights.
    first, second : ndarray of bool, shape (samples,)
        The two groups.
    """
    copies = []
    for _ in range(3):
        copies.append({name: value.double().requires_grad_() for name, value in weights.items()})
    rest = ~(first | second)
    order = np.concatenate([np.flatnonzero(rows) for rows in (first, second, rest)])
    x = prepared.x[torch.from_numpy(order)].double()
    answer = prepared.answer[torch.from_numpy(order)]
    parts = x.split([int(first.sum()), int(second.sum()), int(rest.sum())])
    predictions = [
        torch.func.functional_call(prepared.model, copy, (part,))
        for copy, part in zip(copies, parts, strict=True)
        if len(part)
    ]
    answer = answer.double() if answer.is_floating_point() else answer
    prepared.criterion(torch.cat(predictions), answer).backward()
    found = {}
    for name in weights:
        if weights[name].ndim > 1:
            a, b = (copies[i][name].grad for i in range(2))
            assert a is not None
            assert b is not None
            found[name] = torch.linalg.svdvals(a / first.sum() - b / second.sum()).numpy()
    return found
