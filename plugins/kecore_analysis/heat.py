"""Heat maps of causal traces as PNG files, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kecore.api.errors import MissingDependencyError
from kecore.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["need_matplotlib", "write_heat_map"]

_TITLES = {"hidden": "a hidden state", "mlp": "{} feed-forward blocks", "attention": "{} attentions"}
_COLOURS = {"hidden": "Purples", "mlp": "Greens", "attention": "Reds"}


def need_matplotlib() -> Any:
    """Return matplotlib's class ``Figure``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "PNG is drawn by matplotlib, which is not installed: pip install 'kecore[plot]'"
        ) from None
    return Figure


def write_heat_map(
    path: Path, tables: Mapping[str, Tensor], rows: Sequence[str], title: str, scale: str, window: int
) -> Path:
    """Draw one panel for each kind of state: rows of tokens, columns of layers.

    Args:
        path: the PNG file.
        tables: by kind ``[rows, layers]``; NaN stays white.
        rows: labels of the rows.
        title: stands above the panels.
        scale: what the colours say.
        window: layers whose blocks were restored together.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    figure = need_matplotlib()(figsize=(1.6 + 4.4 * len(tables), 1.6 + 0.28 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels: Any = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axis, (kind, table) in zip(panels, tables.items(), strict=True):
        image = axis.imshow(table.numpy(), aspect="auto", cmap=_COLOURS[kind], interpolation="nearest")
        axis.set_title(f"restoring {_TITLES[kind].format(window)}", fontsize=9)
        axis.set_xlabel("layer" if kind == "hidden" else "layer at the centre")
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        figure.colorbar(image, ax=axis).set_label(scale, fontsize=8)
    return write_atomic(path, lambda file: figure.savefig(file, dpi=150, format="png"))
