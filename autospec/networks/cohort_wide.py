"""What GIFT does over a whole cohort, as stages of their own: its mask, and the scaling of its maps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypedDict

from autospec.cohort.files import listed
from autospec.cohort.record import read_scans
from autospec.cohort.selection import candidates
from autospec.cohort.subjects import CohortSettings
from autospec.errors import UserError
from autospec.ica.derivative import folder_written_whole, subject_files
from autospec.ica.preprocessing import gift_mask_of
from autospec.ica.subject import build_gift_maps, build_gift_mask, build_gift_modes


class GiftMaskSettings(TypedDict):
    """What the stage of the mask reads from the configuration."""

    cohort: CohortSettings


class GiftScalingSettings(TypedDict):
    """What the stage of the scaling reads from the configuration: nothing."""


def build_mask(settings: GiftMaskSettings, output: str) -> str:
    """Write GIFT's mask of a cohort.

    Parameters
    ----------
    settings : GiftMaskSettings
        Whose images; where bad subjects are excluded, images that cannot be read are left out here, too.
    output : str
        ``.nii.gz`` file.

    Returns
    -------
    str
        One line that says what was done.

    Raises
    ------
    UserError
        If the images have different grids, no voxel is left, or an image cannot be read.
    """
    chosen = settings["cohort"]
    images = [scan.bold for each in candidates(chosen).functional for scan in each.scans]
    if chosen["on_bad_subject"] == "exclude":
        images = [image for image in images if _readable(image)]
    return build_gift_mask(images, output)


def _readable(image: str) -> bool:
    try:
        gift_mask_of([image])
    except UserError:
        return False
    return True


def build_scaling(settings: GiftScalingSettings, participants: str, folders: dict[str, str], output: str) -> str:
    """Write every participant's maps in GIFT's scaling, which needs the mean maps of all.

    Parameters
    ----------
    settings : GiftScalingSettings
    participants : str
        The cohort's ``participants.tsv``, its table of images beside it.
    folders : dict of str to str
        Folder of each image's results, by its name.
    output : str
        Folder of the maps; it appears whole or not at all.

    Returns
    -------
    str
        One line that says what was done.

    Raises
    ------
    UserError
        If somebody's folder is missing, or grids differ.
    """
    ids = [row["id"] for row in read_scans(participants)]
    if missing := [name for name in ids if name not in folders]:
        raise UserError(f"there are no maps of {listed(missing)}: their own jobs have not run.")
    files = {name: (Path(folders[name]), subject_files(name)) for name in ids}
    pairs = {name: (str(place / names["maps"]), str(place / names["mask"])) for name, (place, names) in files.items()}
    with folder_written_whole(output) as folder:
        modes = folder / "modes.json"
        message = build_gift_modes(list(pairs.values()), modes)
        for maps, mask in pairs.values():
            target = folder / Path(maps).name
            build_gift_maps(maps, mask, str(modes), target)
            shutil.copyfile(maps.replace(".nii.gz", ".json"), str(target).replace(".nii.gz", ".json"))
    return message.replace(str(modes), output)
