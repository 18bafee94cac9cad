"""Writes the model card of an edit, key statistics or a trained editor: facts, settings, scores, and how to load it."""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kecore.api.identity import Fingerprint
from kecore.edit import Edit
from kecore.hub import HUB
from kecore.statistics import KeyStatistics
from kecore.trained import TrainedEditor

__all__ = ["CARD", "Content", "Shared", "make_card"]

CARD = "README.md"
"""Name of the card in a repository."""

Content: TypeAlias = Edit | KeyStatistics | TrainedEditor

_FACTS = 50  # of an edit, before "and so on"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Shared:
    """A file of kecore's with its content.

    Args:
        file: the file.
        content: what is in it.
        result: what ``kecore edit`` wrote about it; None where that is not there.
    """

    file: Path
    content: Content
    result: Mapping[str, Any] | None = None

    @property
    def noun(self) -> str:
        """What it is, in a word or two."""
        if isinstance(self.content, KeyStatistics):
            return "key statistics"
        return "trained editor" if isinstance(self.content, TrainedEditor) else "edit"

    @property
    def base_model(self) -> str | None:
        """Id on the hub of the model that it belongs to, as far as the result names one."""
        model = str((self.result or {}).get("model", ""))
        is_hub_id = _HUB_ID.fullmatch(model) is not None and not Path(model).exists()
        return model if is_hub_id else None


def make_card(shared: Shared, reference: str, base_model: str | None = None) -> str:
    """Return the card as Markdown with a head in YAML.

    The head names no licence: that is for whoever publishes.

    Args:
        shared: what the card is about.
        reference: where it will be, ``hf:OWNER/NAME``.
        base_model: id on the hub of the model that it belongs to; by default the one of the result.
    """
    from huggingface_hub import ModelCardData

    base_model = base_model or shared.base_model
    content = shared.content
    tags = ["kecore", "knowledge-editing", "model-editing", f"kecore-{shared.noun.replace(' ', '-')}"]
    if not isinstance(content, KeyStatistics):
        tags.append(content.method)
    relation: dict[str, Any] = {}
    if base_model is not None and isinstance(content, Edit):
        relation["base_model_relation"] = "adapter"
    head = ModelCardData(library_name="kecore", base_model=base_model, tags=tags, **relation)
    if isinstance(content, KeyStatistics):
        sections = _statistics_sections(content, reference, base_model)
    elif isinstance(content, TrainedEditor):
        sections = _trained_sections(content, reference, base_model)
    else:
        sections = _edit_sections(content, shared.result, reference, base_model)
    sections.append(
        "## Licence\n\nNone is stated here. Whoever publishes these files chooses one: add `license:` to the head of "
        "this page."
    )
    title = reference.removeprefix(HUB).partition("@")[0].rpartition("/")[2]
    return f"---\n{head.to_yaml().strip()}\n---\n\n# {title}\n\n" + "\n\n".join(sections) + "\n"


def _edit_sections(edit: Edit, result: Mapping[str, Any] | None, reference: str, base_model: str | None) -> list[str]:
    model = base_model or "MODEL"
    count = len(edit.requests)
    facts = [(request.text, request.target, request.ground_truth or "") for request in edit.requests[:_FACTS]]
    more = f"\n\nand {count - _FACTS} more, which the file lists." if count > _FACTS else ""
    return [
        f"An edit of {count} {'fact' if count == 1 else 'facts'} in {_model_words(base_model)}, made by "
        f"`{edit.method}` of kecore without retraining. The model's weights are not in it, and it can be taken off "
        "again.",
        "## Facts\n\n" + _table(("prompt", "now", "instead of"), facts) + more,
        "## How it was made\n\n" + _edit_settings(edit, result),
        "## Scores\n\n" + _scores(result),
        "## How to use it\n\n"
        + _code(
            "sh", f"kecore chat {model} --edit {reference}", f"kecore attach {model} {reference} --out edited-model"
        )
        + "\n\n"
        + _code(
            "python",
            "from kecore import load_edit, load_model",
            "",
            f'loaded = load_model("{model}")',
            f'edit = load_edit("{reference}")',
            "edit.attach(loaded.model)  # and edit.revert(loaded.model) takes it off, bit for bit",
        ),
        _refusal(edit.base),
    ]


def _edit_settings(edit: Edit, result: Mapping[str, Any] | None) -> str:
    rows = [
        ("method", edit.method),
        ("made", time.strftime("%Y-%m-%d", time.gmtime(edit.created)) + f" by kecore {edit.version}"),
        ("seed", str(edit.seed)),
        *_setting_rows(edit.config),
    ]
    if result is not None:
        versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
        rows.append(("versions", versions))
        if result.get("preset"):
            rows.insert(1, ("preset", str(result["preset"])))
    return _table(("setting", "value"), rows)


def _scores(result: Mapping[str, Any] | None) -> str:
    if result is None or not result.get("scores"):
        return "It was not scored, or its `result.json` was not beside it."
    before: Mapping[str, Any] = result.get("scores_before") or {}
    rows: list[tuple[str, str, str]] = []
    for name, after in result["scores"].items():
        if after is not None:
            rows.append((name.replace("_", " "), _number(before.get(name)), _number(after)))
    protocol: Mapping[str, Any] = result.get("protocol") or {}
    settings = "\n".join(f"- {key}: `{json.dumps(value, ensure_ascii=False)}`" for key, value in protocol.items())
    return (
        _table(("score", "before", "after"), rows)
        + f"\n\nOf {result.get('n')} records in {result.get('dtype')} on {result.get('device')}, by this protocol "
        f"(scores of another one are not comparable):\n\n{settings}"
    )


def _statistics_sections(statistics: KeyStatistics, reference: str, base_model: str | None) -> list[str]:
    model = base_model or "MODEL"
    rows: list[tuple[str, ...]] = []
    for site in statistics.sites:
        origin = statistics.origins.get(site)
        change = _number(statistics.convergence.get(site))
        rows.append((str(site), str(statistics.width(site)), change, origin.file if origin else ""))
    settings = [
        ("tokens", f"{statistics.tokens:,}"),
        ("text", ", ".join(Path(source).name for source in statistics.sources)),
        ("digest of the text", statistics.corpus),
        ("tokens in a row", str(statistics.sequence or "not known")),
        ("seed", str(statistics.seed)),
        ("made by", f"kecore {statistics.version}"),
    ]
    return [
        f"Key statistics of {_model_words(base_model)}: the uncentred second moment E[k kᵀ] of the inputs of the MLPs' "
        "output matrices over natural text, which methods such as ROME, MEMIT and AlphaEdit read.",
        "## Layers\n\n" + _table(("layer", "width", "change from half the tokens to all", "imported from"), rows),
        "## How they were made\n\n" + _table(("setting", "value"), settings),
        "## How to use them\n\n"
        + _code(
            "sh",
            f"kecore edit {model} --stats {reference} --facts facts.jsonl --out my-edit",
            f"kecore stats {model} --export {reference} --out npz  # for ROME, MEMIT, AlphaEdit and EasyEdit",
        )
        + "\n\n"
        + _code(
            "python",
            "from kecore import Editor",
            "",
            f'editor = Editor.from_pretrained("{model}", statistics="{reference}")',
        ),
        _refusal(next(iter(statistics.base.values()))),
    ]


def _trained_sections(trained: TrainedEditor, reference: str, base_model: str | None) -> list[str]:
    model = base_model or "MODEL"
    record, schedule = trained.record, trained.record.get("schedule", {})
    rows = [
        ("method", trained.method),
        ("model", ", ".join(f"{name} {value}" for name, value in trained.model.items())),
        ("records", str(record.get("records"))),
        ("digest of the records", str(record.get("data"))),
        ("seed", str(trained.seed)),
        ("made by", f"kecore {trained.version}"),
        *_setting_rows(schedule),
        *_setting_rows(trained.config),
    ]
    curve: Sequence[Mapping[str, Any]] = record.get("curve", [])
    names = list(curve[0]) if curve else []
    points = [tuple(_number(point.get(name)) for name in names) for point in curve]
    return [
        f"An editor for {_model_words(base_model)}, trained for the method `{trained.method}` of kecore.",
        "## How it was trained\n\n" + _table(("setting", "value"), rows),
        "## Scores\n\nOn held-out records during the training; "
        f"the parameters of step {_number(record.get('best_step'))} are kept.\n\n" + _table(names, points),
        "## How to use it\n\n"
        + _code(
            "sh",
            f"kecore edit {model} --method {trained.method} --trained {reference} --facts facts.jsonl --out my-edit",
        )
        + "\n\n"
        + _code(
            "python",
            "from kecore import Editor, TrainedEditor",
            "",
            f'trained = TrainedEditor.load("{reference}")',
            f'editor = Editor.from_pretrained("{model}", trained=trained)',
        ),
        _refusal(trained.base),
    ]


def _model_words(base_model: str | None) -> str:
    return (
        f"[{base_model}](https://huggingface.co/{base_model})"
        if base_model
        else "one model (see the fingerprint below)"
    )


def _refusal(base: Fingerprint) -> str:
    digest = base.digests.get(base.dtype, "")[:12]
    return f"It belongs to the weights with the fingerprint `{digest}` ({base.dtype}); kecore refuses it on others."


def _setting_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, json.dumps(value, ensure_ascii=False)) for name, value in values.items()]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Write any text into a cell of a table: no break, bar, tag or mark of it is read as Markdown."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\|*_`\[\]])", r"\\\1", plain)
