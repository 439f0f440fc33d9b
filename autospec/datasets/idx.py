"""IDX files, the format in which MNIST is distributed, gzipped or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from autospec.errors import UserError

UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    Parameters
    ----------
    path : path-like
        The file; gzip is recognised by its content.
    dimensions : int
        How many dimensions it must have: 3 for images, 1 for labels.

    Returns
    -------
    ndarray of uint8

    Raises
    ------
    UserError
        If the file is missing, is no IDX file, has other dimensions, or is shorter or longer than its header says.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError:
        raise UserError(f"the IDX file {path} cannot be read: check the path in the config.") from None
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise UserError(f"the gzipped IDX file {path} is damaged or cut short: download it again.") from None
    if len(data) < 4 or data[0] != 0 or data[1] != 0 or data[2] != UNSIGNED_BYTE:
        raise UserError(f"{path} is no IDX file of unsigned bytes: give the images or labels of MNIST as distributed.")
    if data[3] != dimensions:
        raise UserError(
            f"{path} has {data[3]} dimensions where {dimensions} are expected: are images and labels swapped?"
        )
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise UserError(f"the IDX file {path} is cut short within its header: download it again.")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise UserError(
            f"the IDX file {path} holds {len(data) - header} bytes of data, but its header says "
            f"{' x '.join(map(str, shape))} = {math.prod(shape)}: it is truncated or damaged; download it again."
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
