"""How many samples the groups of a run have."""

from __future__ import annotations

import xarray as xr


def training_samples(tree: xr.DataTree) -> dict[str, int]:
    """Samples of each group that a run was trained on, of which a step's batch may hold a few.

    Parameters
    ----------
    tree : xarray.DataTree
        Trajectories of the run.

    Returns
    -------
    dict of str to int
        Empty where that is not known: an older store has no record of it, and the sizes of its batches differ.
    """
    recorded: dict[str, int] | None = tree.attrs.get("training_samples")
    if recorded is not None:
        return recorded
    of_batches = tree["group_size"].transpose("step", "group").values
    if (of_batches != of_batches[0]).any():
        return {}
    return dict(zip(map(str, tree["group"].values), of_batches[0].tolist(), strict=True))
