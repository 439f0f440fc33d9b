"""Images of different kinds in one cohort: different tasks are refused, what else differs is warned of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from autospec.cohort.bids import entities_of
from autospec.cohort.files import listed, natural_key
from autospec.cohort.subjects import Scan
from autospec.errors import UserError

# Further parts of BIDS names that may differ with what was measured.
ENTITIES = ("acq", "ce", "dir", "rec", "res")
NONE = "none"

Images = Mapping[str, Sequence[Scan]]


def require_one_task(images: Images) -> None:
    """Refuse images of different tasks: what differs between tasks would look like a difference of groups.

    Parameters
    ----------
    images : mapping of str to sequence of Scan
        The images that are used, by participant.

    Raises
    ------
    UserError
        If there is more than one task; an image whose task is not known counts as none.
    """
    tasks = _by_value(images, lambda scan: scan.task)
    if len(tasks) > 1:
        raise UserError(
            f"participants' images are of different tasks: {_counted(tasks)}; choose one with task, as in  "
            f"task: {next(iter(tasks))}."
        )


def differences(images: Images, sessions: bool = True) -> list[str]:
    """Say what differs between participants' images, as far as their names tell.

    Parameters
    ----------
    images : mapping of str to sequence of Scan
        The images that are used, by participant.
    sessions : bool
        Whether sessions should be the same, which they are not where all of a participant's are taken.

    Returns
    -------
    list of str
        A sentence for each difference, without a full stop.
    """
    found = []
    spaces = _by_value(images, lambda scan: scan.space)
    if len(spaces) > 1:
        found.append(
            f"participants' images are in different spaces: {_counted(spaces)}; choose one with space, which leaves the "
            "others out, or give everybody an image in the same"
        )
    of_sessions = _by_value(images, lambda scan: scan.session.lstrip("0") or scan.session)
    if sessions and len(of_sessions) > 1:
        found.append(
            f"participants' images are of different sessions: {_counted(of_sessions)}; choose one with session, which "
            "leaves the others out"
        )
    for entity in ENTITIES:
        values = _by_value(images, partial(_entity, entity))
        if len(values) > 1:
            found.append(
                f"participants' images differ in {entity}: {_counted(values)}; choose one with entities, as in  "
                f"entities: {{{entity}: {next(value for value in values if value != NONE)}}},  which leaves the others out"
            )
    return found


def differences_of_images(grids: Mapping[str, int], times: Mapping[str, int], volumes: Sequence[int] = ()) -> list[str]:
    """Say what differs between images themselves.

    Parameters
    ----------
    grids, times : mapping of str to int
        Images on each grid, and with each repetition time, in words.
    volumes : sequence of int
        Volumes that are used of each.

    Returns
    -------
    list of str
        A sentence for each difference, without a full stop.
    """
    found = []
    if len(grids) > 1:
        found.append(
            f"images lie on several grids ({_numbers(grids)}), so they differ in resolution or in how they are resampled"
        )
    if len(times) > 1:
        found.append(f"repetition times differ ({_numbers(times)}), so time points of participants do not match")
    if len(set(volumes)) > 1:
        found.append(f"{min(volumes)} to {max(volumes)} volumes of images are used; data sets are cut to the fewest")
    return found


def _numbers(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{what}: {count}" for what, count in counts.items())


def _entity(name: str, scan: Scan) -> str:
    return entities_of(Path(scan.bold).name).get(name, NONE)


def _by_value(images: Images, value: Callable[[Scan], str]) -> dict[str, list[str]]:
    """Participants with each value that is known, that of most first."""
    found: dict[str, list[str]] = {}
    for name in sorted(images, key=natural_key):
        for each in dict.fromkeys(map(value, images[name])):
            if each:
                found.setdefault(each, []).append(f"sub-{name}")
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _counted(values: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{value} ({len(names)}: {listed(names, 3)})" for value, names in values.items())
