"""Where axes, titles and keys stand, in millimetres; placed by arithmetic, which is fast and the same everywhere."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure, SubFigure

from autospec.figures.style import MM

# Title, two lines of smaller words, names of columns and of the first layer; what each further line of words or of a name adds.
HEAD_MM = 17.0
WORDS_POINTS, WORDS_LINE_MM = 5.5, 2.7
NAME_POINTS, NAME_LINE_MM = 6.5, 3.2
FOOT_MM = 7.5
LEFT_MM = 10.5
COLUMN_GAP_MM = 9.5
ROW_GAP_MM = 5.0
KEY_LINE_MM = 2.7
# Of DejaVu Sans at 1 point, on average, with room to spare.
CHARACTER_WIDTH_POINTS = 0.53


@dataclass(frozen=True)
class Size:
    """Width and height in mm."""

    width: float
    height: float


def size_of(figure: Figure | SubFigure) -> Size:
    """Size of a figure or of a part of one."""
    inches = figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi
    return Size(inches[0] / MM, inches[1] / MM)


def head_height(words: str, columns: list[str], width_mm: float) -> float:
    """Height above the axes of a panel with these words below its title and these names of columns, in mm."""
    words_lines = _wrapped_words(words, width_mm).count("\n") + 1
    name_lines = 1 + max((name.count("\n") for name in columns), default=0)
    return HEAD_MM + max(0, words_lines - 2) * WORDS_LINE_MM + (name_lines - 1) * NAME_LINE_MM


def panel_height(rows: int, row_mm: float, head_mm: float = HEAD_MM) -> float:
    """Height of a panel with so many rows of axes, in mm."""
    return head_mm + FOOT_MM + rows * row_mm + (rows - 1) * ROW_GAP_MM


def place_axes(figure: Any, rows: int, columns: int, right_mm: float, head_mm: float = HEAD_MM) -> np.ndarray:
    """Axes of a panel in a grid, with room for titles, labels, and what stands at the right.

    Returns
    -------
    ndarray of Axes, shape (rows, columns)
    """
    size = size_of(figure)
    width = (size.width - LEFT_MM - right_mm - (columns - 1) * COLUMN_GAP_MM) / columns
    height = (size.height - head_mm - FOOT_MM - (rows - 1) * ROW_GAP_MM) / rows
    return figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=True,
        gridspec_kw={
            "left": LEFT_MM / size.width,
            "right": 1 - right_mm / size.width,
            "bottom": FOOT_MM / size.height,
            "top": 1 - head_mm / size.height,
            "wspace": COLUMN_GAP_MM / width,
            "hspace": ROW_GAP_MM / height,
        },
    )


def bar_axes(figure: Any, top: Any, bottom: Any, from_right_mm: float) -> Any:
    """Narrow axes for a colour bar, from the top of one axes to the bottom of another."""
    width = size_of(figure).width
    y0, y1 = bottom.get_position().y0, top.get_position().y1
    return figure.add_axes((1 - from_right_mm / width, y0, 2.0 / width, y1 - y0))


def write_heading(figure: Any, title: str, words: str) -> None:
    """Title of a panel, and smaller words below it."""
    size = size_of(figure)
    figure.text(2 / size.width, 1 - 1.2 / size.height, title, ha="left", va="top", fontsize=7.5, fontweight="bold")
    figure.text(
        2 / size.width,
        1 - 5.2 / size.height,
        _wrapped_words(words, size.width),
        ha="left",
        va="top",
        fontsize=WORDS_POINTS,
        color="#333333",
    )


def _wrapped_words(words: str, width_mm: float) -> str:
    return wrap(words, width_mm - 4, WORDS_POINTS)


def name_axes(axes: np.ndarray, layers: list[str], columns: list[str], label: str) -> None:
    """Name columns above the first row, and each row's layer above its first axes; label the outer axes."""
    small = {"textcoords": "offset points", "annotation_clip": False}
    for ax, name in zip(axes[0], columns, strict=True):
        ax.annotate(
            name, (0.5, 1), xycoords="axes fraction", xytext=(0, 12.5), ha="center", fontsize=NAME_POINTS, **small
        )
    for row, layer in zip(axes, layers, strict=True):
        row[0].annotate(layer, (0, 1), xycoords="axes fraction", xytext=(0, 5), ha="left", fontsize=5.5, **small)
        row[0].set_ylabel(label, labelpad=2)
    for ax in axes[-1]:
        ax.set_xlabel("step", labelpad=1)


def wrap(text: str, width_mm: float, points: float) -> str:
    """Break text into lines that fit a width."""
    character = CHARACTER_WIDTH_POINTS * points * 25.4 / 72
    return textwrap.fill(text, max(10, int(width_mm / character)), break_on_hyphens=False)
