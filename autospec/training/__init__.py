"""The workflow's training: watched, deterministic, and gone on with where it was stopped.

============  ============================================================================================
settings      what the stage reads from the configuration
prepare       samples, labels, the split and the network of a run, for everyone who needs the same
batches       in which order samples come, and in which parts
optimizers    Adam and SGD
loop          one update: the gradient, in parts where memory asks for them; evaluation
performance   what the network does on samples that were held out
snapshots     weights at some updates: which, written, and opened again
checkpoints   what a training that was stopped goes on from
stage         all of it together
============  ============================================================================================
"""

from __future__ import annotations

from .checkpoints import Frequency
from .device import chosen_device
from .prepare import Prepared, prepare
from .settings import RunSettings
from .snapshots import open_snapshots, snapshot_updates
from .stage import Trained, train_run

__all__ = [
    "Frequency",
    "Prepared",
    "RunSettings",
    "Trained",
    "chosen_device",
    "open_snapshots",
    "prepare",
    "snapshot_updates",
    "train_run",
]
