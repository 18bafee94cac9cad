"""Writes docs/architectures.md: what kecore's probe finds in every language model of transformers.

Run ``python docs/_tables.py``; with names of families, such as ``encoder-decoder``, only their tables are made anew.
Tests compare the causal models' rows with what the script would write, and of the other families, whose models are
larger, a sample.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from kecore.api.errors import KecoreWarning, UnsupportedModelError
from kecore.engine.replay import Replay
from kecore.model import LayerView, ModelView
from kecore.testing import architectures, tiny_model, tiny_tokenizer
from kecore.testing.models import Family
from kecore.text import Encoder

PAGE = Path(__file__).with_name("architectures.md")
EDITED, BESIDE, REFUSED, NOT_BUILT = "yes", "beside", "refused", "not built"
# Token rows, some longer than the tiny models' attention windows, and where a value would be written.
_IDS = (tuple(range(30, 480, 30)), (8, 450, 63, 17, 280), (300, 41, 41, 509, 66, 120, 7))
_LOOKUPS = (11, 1, 6)

_TEXT = """\
# Architectures

What `ModelView.of` finds in every language model of transformers {version}, written by `python docs/_tables.py`
from tiny random models (4 layers, made in code, float32). There is no table of architectures in kecore: each row is
the outcome of the probe, so a model that is not listed is read in the same way. `kecore probe MODEL --self-test` edits
a model of yours with a method of each family, checks that it worked, and takes every edit off again.

| column | meaning |
| --- | --- |
| edited | `{edited}`, `{beside}`: by methods that change no weights, `{refused}` with UnsupportedModelError (prompt \
methods, such as ice, edit these too where the model can be asked), or `{not_built}`: no tiny model can be made of it \
here |
| value projection | the linear map whose weight edits change; `*` stands for the layer, `[*]` for each \
of several experts |
| stored | how the module keeps that weight: `Linear` is `[d_out, d_in]`, `Conv1D` is `[d_in, d_out]`; `stacked` and \
`stacked, transposed` are the same for the experts of a layer, in one parameter |
| residual scale | what arrives in the residual stream for 1 at the projection's output; `norm` where a norm or a gate \
stands between (of several layers to edit, only the last one is edited then) |
| replay | how target values are optimised: `cached` (upper layers, tokens from the subject on), `upper` (upper \
layers, all tokens), `full` |
{sections}"""

_SECTION = """
## {title}

{about}

{counts}

| {header} |
| {rule} |
{rows}
"""

_FAMILIES: dict[Family, tuple[str, str]] = {
    "causal": ("Causal language models", "Those that continue a text."),
    "encoder-decoder": (
        "Encoder-decoders",
        "The prompt is what the encoder reads, the target what the decoder writes, and the decoder's value projections "
        "are edited: `docs/concepts.md` says how a row is laid out.",
    ),
    "image-text": (
        "Models that read images",
        "Facts are edited inside the language tower, asked about without an image; what reads images is not touched.",
    ),
}
"""Title and a sentence of each section."""


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


def row(architecture: str, family: Family = "causal") -> Row:
    """Build a tiny model of an architecture, probe it, and say what was found."""
    name = architectures(family)[architecture]
    try:
        model = tiny_model(architecture, family=family)
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
    if view.handover is None and not view.left_padding:
        remarks.append("padding always on the right")
    if view.handover is None and not view.positions:
        remarks.append("counts positions itself")
    if not view.skips:
        remarks.append("lower layers run along")
    with warnings.catch_warnings(record=True) as caught, view.frozen(), torch.no_grad():
        warnings.simplefilter("always", KecoreWarning)
        ids, lookups = _IDS, _LOOKUPS
        if view.handover is not None:
            # A value is written where the decoder begins.
            ids = tuple((*row[:-1], *view.handover_ids, row[-1]) for row in ids)
            lookups = tuple(len(row) - 2 for row in ids)
        replay = Replay(view, Encoder(tiny_tokenizer()), ids, lookups, 1)
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


def page(rows: Mapping[Family, Iterable[Row]]) -> str:
    """Return the whole page, given the rows of each family."""
    sections = [section(family, rows[family]) for family in _FAMILIES]
    return _TEXT.format(
        version=transformers.__version__,
        edited=EDITED,
        beside=BESIDE,
        refused=REFUSED,
        not_built=NOT_BUILT,
        sections="".join(sections),
    )


def section(family: Family, rows: Iterable[Row]) -> str:
    """Return the table of one family with its counts."""
    rows = list(rows)
    names = [field.name.replace("_", " ") for field in fields(Row)]
    counts = Counter(row.edited for row in rows)
    modes = Counter(row.replay for row in rows if row.replay)
    title, about = _FAMILIES[family]
    return _SECTION.format(
        title=title,
        about=about,
        counts=f"{len(rows)} architectures: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in (EDITED, BESIDE, REFUSED, NOT_BUILT))
        + "; replay "
        + ", ".join(f"{mode} {count}" for mode, count in modes.most_common())
        + ".",
        header=" | ".join(names),
        rule=" | ".join("---" for _ in names),
        rows="\n".join(row.text() for row in rows),
    )


def written(family: Family = "causal") -> dict[str, list[str]]:
    """Read the rows of a family as they are on disk: architecture to its cells."""
    _, _, text = PAGE.read_text(encoding="utf-8").partition(f"\n## {_FAMILIES[family][0]}\n")
    text = text.partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    known: Any = architectures(family)
    return {row[0]: row for row in cells if row[0] in known}


def main(families: Sequence[str]) -> None:
    """Write the page; of other families than these it keeps the rows that it has."""
    rows: dict[Family, list[Row]] = {}
    for family in _FAMILIES:
        if family in families or not families:
            rows[family] = [row(architecture, family) for architecture in architectures(family)]
        else:
            rows[family] = [Row(*cells) for cells in written(family).values()]
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    main(sys.argv[1:])
