"""Which rows of a layer's input belong to which sample: established by a probe, never assumed."""

from __future__ import annotations

from .lookups import dims_of_size
from .orders import alike
from .probe import OwnUses, weights_at
from .row_maps import RowMaps
from .tracing import RowMap, map_rows
from .twins import refused_uses

__all__ = [
    "OwnUses",
    "RowMap",
    "RowMaps",
    "alike",
    "dims_of_size",
    "map_rows",
    "refused_uses",
    "weights_at",
]
