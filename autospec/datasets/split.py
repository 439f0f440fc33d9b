"""Which subjects are kept from training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from autospec.errors import UserError


def held_out_rows(subjects: Sequence[str], target: Sequence[str], share: float, seed: int) -> np.ndarray:
    """Choose the samples that are kept from training: whole subjects, as many of each target as its size asks for.

    Parameters
    ----------
    subjects : sequence of str
        The subject of each sample.
    target : sequence of str
        The target of each sample.
    share : float
        Share of the subjects to hold out.
    seed : int
        Seed of the choice, which does not depend on the samples' order.

    Returns
    -------
    ndarray of bool, shape (samples,)
        True for samples that are held out.

    Raises
    ------
    UserError
        If a share is asked for, but every target has only one subject, whom training needs.
    """
    if not share:
        return np.zeros(len(subjects), dtype=bool)
    targets: dict[str, set[str]] = defaultdict(set)
    for subject, label in zip(subjects, target, strict=True):
        targets[subject].add(label)
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for subject in sorted(targets):
        strata[tuple(sorted(targets[subject]))].append(subject)
    names = sorted(strata)
    sizes = np.array([len(strata[name]) for name in names])
    if (sizes < 2).all():
        raise UserError(
            f"training.held_out is {share}, but no target has a second subject, so none can be kept from training: "
            "set training.held_out to 0, or give more subjects."
        )
    counts = _apportioned(sizes, max(1, round(share * len(targets))))
    generator = np.random.default_rng(seed)
    chosen = {
        str(subject)
        for name, count in zip(names, counts, strict=True)
        for subject in generator.permutation(strata[name])[:count]
    }
    return np.array([subject in chosen for subject in subjects], dtype=bool)


def _apportioned(sizes: np.ndarray, total: int) -> np.ndarray:
    """Split a total by size, largest remainders first, leaving at least one of each."""
    quotas = total * sizes / sizes.sum()
    counts = np.minimum(np.floor(quotas).astype(int), sizes - 1)
    while counts.sum() < total and (counts < sizes - 1).any():
        missing = np.where(counts < sizes - 1, quotas - counts, -np.inf)
        counts[int(np.argmax(missing))] += 1
    return counts
