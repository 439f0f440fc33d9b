"""The stage that brings a cohort together: its tables, from what each participant's own job found."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from autospec.cohort.subjects import CohortSettings
from autospec.cohort.tables import build_cohort


class TablesSettings(TypedDict):
    """What the stage reads from the configuration."""

    cohort: CohortSettings
    networks: bool
    """Whether functional participants had jobs of their own."""
    drop_volumes: int
    """How many volumes at the start of each image these left out."""


def build_tables(settings: TablesSettings, folders: list[str], output: str) -> str:
    """Write the cohort's tables.

    Parameters
    ----------
    settings : TablesSettings
    folders : list of str
        ``sub-<id>``, each with a ``status.json``.
    output : str
        Folder of the tables.

    Returns
    -------
    str
        One line that says who takes part.
    """
    statuses = {Path(folder).name.removeprefix("sub-"): str(Path(folder) / "status.json") for folder in folders}
    found = statuses if settings["networks"] else None
    return build_cohort(settings["cohort"], found, output, settings["drop_volumes"])
