"""What all figures share: palette, type, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase

from autospec.storage import written_whole

matplotlib.use("agg")

MM = 1 / 25.4
# Okabe and Ito's palette, told apart with every common kind of colour vision; yellow, too faint for lines, is left out.
GROUP_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# For runs at chance on held-out data, told apart by four kinds of dashes too: the first four groups are dark, the next pale, the
# last between them.
GREYS = (
    "#444444",
    "#777777",
    "#555555",
    "#999999",
    "#AAAAAA",
    "#BBBBBB",
    "#B0B0B0",
    "#555555",
    "#888888",
    "#333333",
    "#777777",
    "#AAAAAA",
)
BATCH_COLOUR = "#333333"
# Text stays text in PDF and SVG, and titles and names are drawn as they are written, dollar signs included; a fixed salt
# and no date keep the files' bytes reproducible.
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 6,
    "xtick.labelsize": 5.5,
    "ytick.labelsize": 5.5,
    "xtick.major.pad": 1.5,
    "ytick.major.pad": 1.5,
    "legend.fontsize": 6,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "ytick.minor.size": 1,
    "ytick.minor.width": 0.3,
    "hatch.linewidth": 0.3,
    "text.parse_math": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "autospec",
}
SUBSCRIPTS, SUPERSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"), str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def colours(groups: list[str], grey: bool = False) -> dict[str, str]:
    """Colour of each group, the whole batch in dark grey; shades of grey for all, where a run is at chance."""
    palette = GREYS if grey else GROUP_COLOURS
    named = {group: palette[i % len(palette)] for i, group in enumerate(groups[1:])}
    return {groups[0]: BATCH_COLOUR, **named}


def dashes(groups: list[str], grey: bool = False) -> dict[str, Any]:
    """Line style of each group: the whole batch dashed, and dotted where a colour comes for the second time."""
    different = ["-", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
    named = {
        group: different[i % 4] if grey else "-" if i < len(GROUP_COLOURS) else (0, (1, 1))
        for i, group in enumerate(groups[1:])
    }
    return {groups[0]: (0, (4, 2)), **named}


def sigma(number: int) -> str:
    """Symbol of a singular value."""
    return "σ" + str(number).translate(SUBSCRIPTS)


def power_of_ten(exponent: int) -> str:
    """Label of a decade."""
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def save(figure: Figure, outputs: list[str], dots_per_inch: int) -> None:
    """Save a figure in the format of each output's extension, each file whole or not at all."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is found once, not again for each format
        _settle(figure)
    metadata: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    for output in outputs:
        kind = Path(output).suffix.lstrip(".")
        with written_whole(output) as temporary:
            if kind == "png":
                _write_png([figure], temporary, dots_per_inch)
            else:
                figure.savefig(temporary, format=kind, dpi=dots_per_inch, metadata=metadata[kind])


def save_pages(pages: list[Figure], outputs: list[str], dots_per_inch: int) -> None:
    """Save pages as one PDF, or as one PNG in which they stand below each other, each file whole or not at all."""
    for output in outputs:
        with written_whole(output) as temporary:
            if output.endswith(".pdf"):
                from matplotlib.backends.backend_pdf import PdfPages

                with PdfPages(temporary, metadata={"CreationDate": None}) as pdf:
                    for page in pages:
                        pdf.savefig(page, dpi=dots_per_inch)
            elif output.endswith(".png"):
                _write_png(pages, temporary, dots_per_inch)
            else:
                raise ValueError(f"{output}: pages are written as pdf or png")


def _write_png(pages: list[Figure], path: Path, dots_per_inch: int) -> None:
    """Write pages below each other, in 256 colours of their own: a third of the bytes, and the report holds every picture."""
    from PIL import Image

    drawn = []
    for page in pages:
        page.set_dpi(dots_per_inch)
        canvas = FigureCanvasAgg(page)
        canvas.draw()
        drawn.append(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())
    picture = Image.fromarray(np.concatenate(drawn)).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(path, format="png", dpi=(dots_per_inch, dots_per_inch))


def _settle(figure: FigureBase) -> None:
    """Round the layout: its solver's last digits depend on addresses in memory, and files' bytes on its last digits."""
    if isinstance(figure, Figure):
        for axes in figure.axes:
            axes.set_position(np.round(axes.get_position(original=True).bounds, 6))
    for part in figure.subfigs:
        part.bbox_relative.p0, part.bbox_relative.p1 = np.round(part.bbox_relative.get_points(), 6)
        _settle(part)
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((round(x, 6), round(y, 6)))
