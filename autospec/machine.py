"""What the workflow asks of the machine it runs on; imports nothing heavy."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def gpu_here() -> int:
    """Return 1 if this machine has an NVIDIA GPU, else 0, without importing torch."""
    return int(any(Path("/dev").glob("nvidia[0-9]*")))


def use_this_python(root: Path) -> None:
    """Let jobs run with Snakemake's own Python, activated or not, and import the package below a folder.

    Parameters
    ----------
    root : Path
        The folder of the Snakefile.  A conda environment's Python still goes before this one.
    """
    for name, first in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", root)):
        others = [entry for entry in os.environ.get(name, "").split(os.pathsep) if entry and entry != str(first)]
        os.environ[name] = os.pathsep.join([str(first), *others])
