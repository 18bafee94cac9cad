"""What all plots of a report have in common: the figure with what it says, panels, and the looks of methods."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from kecore.api.errors import MissingDependencyError
from kecore.files import write_atomic
from kecore_bench.report.figures import UNEDITED_MARKER, Style

__all__ = ["INSTALL", "MARK", "Plot", "look_of", "make_panels", "name_beside", "need_matplotlib"]

INSTALL = "figures are drawn by matplotlib, which is not installed: pip install 'kecore[plot]'"

_ACROSS = 3
"""Panels beside each other; further ones stand below."""
_NAMES_INCHES = 2.2
"""Room for the names of the colours, beside the panels."""
MARK = 6.5
"""Size of a mark in points."""


@dataclass
class Plot:
    """One plot of a table: a matplotlib figure, and what it says where the pointer is held over a part of it.

    Args:
        name: ``scatter``, ``retention``, ``growth`` or ``stages``.
        title: what it shows.
        figure: the :class:`matplotlib.figure.Figure`.
        caption: stands below it.
        tips: the text for each part, by the id that the part has in the SVG.
    """

    name: str
    title: str
    figure: Any
    caption: str = ""
    tips: dict[str, str] = field(default_factory=dict)

    def tell(self, artist: Any, text: str) -> None:
        """Show ``text`` where the pointer is held over a part of the figure."""
        gid = f"tip-{len(self.tips)}"
        artist.set_gid(gid)
        self.tips[gid] = text

    def to_svg(self) -> str:
        """Return the figure as an ``<svg>`` element for an HTML page; its text stays text."""
        import matplotlib

        buffer = io.StringIO()
        # Without the salt the ids in two files of one figure would differ.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kecore"}):
            nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
            self.figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]  # an XML declaration has no place inside a page
        for gid, tip in self.tips.items():
            text = text.replace(f'<g id="{gid}">', f"<g><title>{escape(tip)}</title>")
        return text.replace("<svg", f'<svg role="img" aria-label="{escape(self.title)}"', 1)

    def write(self, path: Path, format: str) -> Path:
        """Write the figure as a file that needs no other one: letters are outlines in SVG, and TrueType fonts in PDF.

        Args:
            path: the file.
            format: ``png``, ``pdf`` or ``svg``.

        Raises:
            StorageError: it cannot be written.
        """
        import matplotlib

        # Without dates and with a fixed salt two files of one store are the same.
        dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}

        def save(file: Path) -> None:
            self.figure.savefig(file, dpi=200, format=format, metadata=dated.get(format))

        with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "kecore"}):
            return write_atomic(path, save)


def need_matplotlib() -> Any:
    """Return matplotlib's class ``Figure``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(INSTALL) from None
    return Figure


def make_panels(count: int, width: float) -> tuple[Any, list[Any]]:
    """Make a figure with so many panels, each of ``width`` inches, and room for names beside them."""
    across = min(count, _ACROSS)
    down = math.ceil(count / across)
    figure = need_matplotlib()(figsize=(width * across + _NAMES_INCHES, 4.2 * down), layout="constrained")
    return figure, [figure.add_subplot(down, across, index + 1) for index in range(count)]


def look_of(style: Style) -> dict[str, Any]:
    """Return how a method's marks are drawn."""
    size = MARK * (1.4 if style.marker == UNEDITED_MARKER else 1)  # a star has little inside
    return {"marker": style.marker, "color": style.colour, "ms": size, "mec": "white", "mew": 0.4, "ls": "none"}


def name_beside(figure: Any, axis: Any) -> None:
    """Name the colours beside the panels: inside one the names would lie where the best points are."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
