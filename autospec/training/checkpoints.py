"""What a training that was stopped goes on from: its checkpoint, and the weights put aside until then.

A checkpoint is replaced as the last thing of saving, so what it counts on is there: the trajectories' store holds at
least as many steps, and the files ``weights-<updates>.pt`` the snapshots until then.  What came after it is made again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from autospec.errors import UserError

from .snapshots import load, save

FORMAT = 2


@dataclass(frozen=True)
class Frequency:
    """How often checkpoints are written.

    Parameters
    ----------
    minutes : float
        Minutes between them.
    updates : int, optional
        Updates between them, instead of minutes.
    """

    minutes: float = 2.0
    updates: int | None = None


class Checkpoints:
    """The checkpoint of a run and the weights put aside, in the run's folder below ``work``.

    Parameters
    ----------
    folder : Path
        The run's folder.
    frequency : Frequency
        How often `due` says yes.
    """

    def __init__(self, folder: Path, frequency: Frequency) -> None:
        self.folder, self.frequency = folder, frequency
        self.path = folder / "checkpoint.pt"
        self._waiting: dict[int, dict[str, Any]] = {}
        self._last = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """Return the last state that was written, or None if there is none that can be read."""
        if not self.path.exists():
            return None
        try:
            state = load(self.path)
        except UserError as error:
            print(f"autospec: {error} The training begins anew.", file=sys.stderr)
            return None
        return state if isinstance(state, dict) and state.get("format") == FORMAT else None

    def due(self, updates: int) -> bool:
        """Whether it is time for a checkpoint, after so many updates."""
        if self.frequency.updates is not None:
            return updates % self.frequency.updates == 0
        return time.monotonic() - self._last >= 60 * self.frequency.minutes

    def write(self, state: dict[str, Any]) -> None:
        """Write what was put aside, then the state, whose ``updates`` says how many were made."""
        if self._waiting:
            save(self._waiting, self.folder / f"weights-{state['updates']}.pt", durable=True)
            self._waiting = {}
        save({"format": FORMAT, **state}, self.path, durable=True)
        self._last = time.monotonic()

    def forget_later(self, updates: int) -> None:
        """Remove weights that were put aside after so many updates, for a checkpoint that was not written any more."""
        for number, file in self._files().items():
            if number > updates:
                file.unlink()

    def put_aside(self, update: int, weights: dict[str, Tensor], random: dict[str, Any] | None) -> None:
        """Keep the weights before an update; they are written with the next checkpoint."""
        self._waiting[update] = {"weights": weights, "random": random}

    def all_put_aside(self) -> dict[int, dict[str, Any]]:
        """Weights and states of random numbers that were kept, by update."""
        kept: dict[int, dict[str, Any]] = {}
        for file in self._files().values():
            kept |= load(file)
        return kept | self._waiting

    def _files(self) -> dict[int, Path]:
        return {int(file.stem.removeprefix("weights-")): file for file in sorted(self.folder.glob("weights-*.pt"))}
