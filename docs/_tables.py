"""Writes docs/architectures.md: what kecore's probe finds in every causal language model of transformers.

Run ``python docs/_tables.py``. A test compares the page with what the script would write.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from kecore.api.errors import KecoreWarning, UnsupportedModelError
from kecore.engine.replay import Replay
from kecore.model import LayerView, ModelView
from kecore.testing import architectures, tiny_model, tiny_tokenizer
from kecore.text import Encoder

PAGE = Path(__file__).with_name("architectures.md")
EDITED, BESIDE, REFUSED, NOT_BUILT = "yes", "beside", "refused", "not built"
# Token rows, some longer than the tiny models' attention windows, and where a value would be written.
_IDS = (tuple(range(30, 480, 30)), (8, 450, 63, 17, 280), (300, 41, 41, 509, 66, 120, 7))
_LOOKUPS = (11, 1, 6)

_TEXT = """\
# Architectures

What `ModelView.of` finds in every causal language model of transformers {version}, written by `python docs/_tables.py`
from tiny random models (4 layers, made in code, float32). There is no table of architectures in kecore: each row is
the outcome of the probe, so a model that is not listed is read in the same way.

| column | meaning |
| --- | --- |
| edited | `{edited}`, `{beside}`: by methods that change no weights, `{refused}` with UnsupportedModelError (prompt \
methods, such as ice, edit these too where the model can be asked), or `{not_built}`: no tiny model can be made of it here |
| value projection | the linear map whose weight edits change; `*` stands for the layer, `[*]` for each \
of several experts |
| stored | how the module keeps that weight: `Linear` is `[d_out, d_in]`, `Conv1D` is `[d_in, d_out]`; `stacked` and \
`stacked, transposed` are the same for the experts of a layer, in one parameter |
| residual scale | what arrives in the residual stream for 1 at the projection's output; `norm` where a norm or a gate \
stands between (of several layers to edit, only the last one is edited then) |
| replay | how target values are optimised: `cached` (upper layers, tokens from the subject on), `upper` (upper \
layers, all tokens), `full` |

{counts}

| {header} |
| {rule} |
{rows}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture, in words."""

    architecture: str
    model_class: str
    edited: str
    value_projection: str = ""
    stored: str = ""
    residual_scale: str = ""
    replay: str = ""
    remark: str = ""

    def text(self) -> str:
        """Write the row as Markdown."""
        return "| " + " | ".join(astuple(self)) + " |"


def row(architecture: str) -> Row:
    """Build a tiny model of an architecture, probe it, and say what was found."""
    name = architectures()[architecture]
    try:
        model = tiny_model(architecture)
    except Exception as error:  # noqa: BLE001 - a configuration class may raise anything
        # Which library is missed first depends on what else is installed.
        missing = "needs libraries that kecore does not ask for"
        remark = missing if isinstance(error, ImportError) else _brief(f"{type(error).__name__}: {error}")
        return Row(architecture, name, NOT_BUILT, remark=remark)
    try:
        view = ModelView.of(model)
    except UnsupportedModelError as error:
        return Row(architecture, name, REFUSED, remark=_brief(str(error)))
    return Row(
        architecture,
        name,
        EDITED if view.sites else BESIDE,
        _list_distinct(f"`{_path(layer)}`" for layer in view.layers if layer.sites),
        _list_distinct(_storage(layer) for layer in view.layers if layer.sites),
        _list_distinct(map(_scale, view.layers)),
        *_describe_driving(view),
    )


def _list_distinct(values: Iterable[str]) -> str:
    """List distinct values of the layers, the most common first."""
    return ", ".join(value for value, _ in Counter(values).most_common())


def _path(layer: LayerView) -> str:
    path = layer.sites[0].linear.name.removeprefix(layer.name)
    if layer.experts is not None:
        path = f"{layer.sites[0].linear.matrix_name.parameter.removeprefix(layer.name)}[*]"
    return f"{layer.name.rpartition('.')[0]}.*{path}"


def _storage(layer: LayerView) -> str:
    transposed = layer.sites[0].linear.transposed
    if layer.experts is not None:
        return "stacked, transposed" if transposed else "stacked"
    return "Conv1D" if transposed else "Linear"


def _scale(layer: LayerView) -> str:
    return "norm" if layer.residual_scale is None else f"{layer.residual_scale:.3g}"


def _describe_driving(view: ModelView) -> tuple[str, str]:
    """Return the replay mode, and what is unusual about driving the model."""
    remarks = []
    reason = next((layer.no_sites for layer in view.layers if layer.no_sites), None)
    if reason is not None:
        remarks.append(f"not all layers' weights: {_brief(reason)}" if view.sites else _brief(reason))
    if not view.left_padding:
        remarks.append("padding always on the right")
    if not view.positions:
        remarks.append("counts positions itself")
    if not view.skips:
        remarks.append("lower layers run along")
    with warnings.catch_warnings(record=True) as caught, view.frozen(), torch.no_grad():
        warnings.simplefilter("always", KecoreWarning)
        replay = Replay(view, Encoder(tiny_tokenizer()), _IDS, _LOOKUPS, 1)
    for warning in caught:
        slower = re.search(r"cached: (?:ValueError: )?(.*?)(?:; upper: .*)?[)]$", str(warning.message))
        if slower and view.left_padding:
            remarks.append(_brief(slower[1]))
    return replay.mode, "; ".join(remarks)


def _brief(message: str) -> str:
    """Return what an error message says was found, without figures that depend on the machine."""
    text = " ".join(message.split())
    text = re.sub(r" ?[(]relative difference [^)]*[)]| by [0-9.]+e[+-][0-9]+", "", text)
    text = text.partition("; ")[0].partition(". Name one")[0]
    return (text if len(text) <= 220 else text[:217].rstrip() + "...").replace("|", "/")


def page(rows: Iterable[Row]) -> str:
    """Return the whole page."""
    rows = list(rows)
    names = [field.name.replace("_", " ") for field in fields(Row)]
    counts = Counter(row.edited for row in rows)
    modes = Counter(row.replay for row in rows if row.replay)
    return _TEXT.format(
        version=transformers.__version__,
        edited=EDITED,
        beside=BESIDE,
        refused=REFUSED,
        not_built=NOT_BUILT,
        counts=f"{len(rows)} architectures: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in (EDITED, BESIDE, REFUSED, NOT_BUILT))
        + "; replay "
        + ", ".join(f"{mode} {count}" for mode, count in modes.most_common())
        + ".",
        header=" | ".join(names),
        rule=" | ".join("---" for _ in names),
        rows="\n".join(row.text() for row in rows),
    )


def written() -> dict[str, list[str]]:
    """Read the rows of the page as it is on disk: architecture to its cells."""
    cells = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    known: Any = architectures()
    return {row[0]: row for row in cells if row[0] in known}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page(map(row, architectures())), encoding="utf-8")
