"""Trainings that are killed at random moments: ``python -m tests.training.killed``, with what to do as JSON.

It imports everything once and forks a process for each attempt, so that no attempt waits for the imports.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from autospec.training import Frequency, train_run


def attempt(job: dict, name: str, updates: int) -> int:
    """Start a training in a process of its own; return its id."""
    pid = os.fork()
    if pid:
        return pid
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    output, weights = f"{name}.zarr.zip", f"{name}.weights.pt"
    train_run(
        job["settings"], "code", job["dataset"], output, f"work-{name}", "cpu", weights, Frequency(updates=updates)
    )
    os._exit(0)


def finished(pid: int, seconds: float) -> bool:
    """Whether a process has ended well after so many seconds; it is killed if it has not ended."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"a training ended with status {status}"
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> None:
    """Train undisturbed, then with kills; print how many there were."""
    job = json.loads(sys.argv[1])
    generator = random.Random(job["seed"])
    os.chdir(job["folder"])
    began = time.monotonic()
    assert finished(attempt(job, "undisturbed", 10**6), 300)
    whole = time.monotonic() - began
    kills = 0
    # At first soon, so that what happens once at the start is hit too; later attempts live longer, so that it ends.
    while not finished(attempt(job, "killed", job["every"]), generator.uniform(0.1, 0.4 + 0.1 * kills) * whole):
        kills += 1
        partial = Path("killed.zarr.zip")
        assert not partial.exists() or partial.read_bytes() == Path("undisturbed.zarr.zip").read_bytes()
    print(kills)


if __name__ == "__main__":
    main()
