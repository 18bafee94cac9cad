"""Describes models, edits, plans, traces and health as JSON values for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from kecore.api.line import MethodLine
from kecore.api.progress import Progress
from kecore.edit import Edit, WeightEdit, without_edits
from kecore.models import reference_of

if TYPE_CHECKING:
    from kecore.api.types import EditRecord
    from kecore.editor import Editor
    from kecore.model import ModelView
    from kecore_studio.stack import Stack

__all__ = ["edited_layers", "health_to_json", "model_to_json", "plan_to_json", "stack_to_json", "trace_to_json"]

_SHOWN_FACTS = 50
"""Facts of an edit that the list shows."""


def model_to_json(ref: str, editor: Editor) -> dict[str, Any]:
    """Return what a page says of the model."""
    view = editor.view
    return {
        "ref": ref,
        "source": reference_of(view.model) or ref,
        "type": type(view.model).__name__,
        "layers": len(view.layers),
        "width": view.width,
        "parameters": sum(parameter.numel() for parameter in view.model.parameters()),
        "dtype": str(view.dtype).removeprefix("torch."),
        "device": str(view.device),
        "chat": editor.encoder.chat,
        "base": editor.base.digests.get(editor.base.dtype, "")[:12],
    }


def stack_to_json(stack: Stack, view: ModelView) -> list[dict[str, Any]]:
    """Return the list of edits."""
    superseded = stack.superseded()
    items: list[dict[str, Any]] = []
    for item in stack.items:
        edit = item.edit
        facts = [
            {"prompt": request.text, "subject": request.subject, "target": request.target,
             "ground_truth": request.ground_truth}
            for request in edit.requests[:_SHOWN_FACTS]
        ]  # fmt: skip
        items.append(
            {
                "id": item.id,
                "method": edit.method,
                "kind": edit.kind,
                "on": item.on,
                "superseded": item.id in superseded,
                "count": len(edit.requests),
                "facts": facts,
                "layers": edited_layers(edit, view),
                "seconds": sum(item.entry.stages.values()),
                "stages": dict(item.entry.stages),
                "source": item.source,
            }
        )
    return items


def edited_layers(edit: Edit, view: ModelView) -> list[int]:
    """Return the layers whose weights an edit changes; empty of one that changes no weights."""
    if not isinstance(edit, WeightEdit):
        return []
    layers: list[int] = []
    for layer in view.layers:
        if any(name.startswith(f"{layer.name}.") for name in edit.updates):
            layers.append(layer.index)
    return layers


def plan_to_json(editor: Editor, records: Sequence[EditRecord], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an edit will take, before anything is computed.

    Raises:
        KecoreError: whatever would refuse the edit.
    """
    from kecore.api.requirements import check_request
    from kecore.facts import as_requests

    fields = {name: value for name, value in arguments.items() if name not in ("method", "preset")}
    line = MethodLine.of(arguments["method"])
    config = line.make_config(fields, preset=arguments["preset"])
    requests = as_requests(records)
    check_request(line, config, requests, trained=False, examples=False)
    layers = editor.statistics_layers(**arguments)
    statistics_needs = editor.statistics_needs(layers) if layers else []
    plan = editor.preflight(records, **arguments)
    known = editor.check(records)
    return {
        "method": line.name,
        "facts": len(requests),
        "known": [request.id for request in known.known],
        "layers": list(layers),
        "statistics": _statistics_text(layers, collect=bool(statistics_needs)),
        "seconds": editor.forecast(records, **arguments),
        "memory": {
            "budget": plan.budget,
            "held": sum(plan.held.values()),
            "peak": max((plan.peak(need) for need in plan.needs), default=sum(plan.held.values())),
        },
        "config": config.to_json(),
    }


def _statistics_text(layers: Sequence[int], *, collect: bool) -> str:
    if not layers:
        return "not needed"
    if collect:
        return "collected first, once, from the text that kecore ships, unless an earlier run left them in the cache"
    return "at hand"


def trace_to_json(
    editor: Editor, prompt: str, subject: str, *, edited: bool, samples: int, progress: Progress
) -> dict[str, Any]:
    """Return the trace of a prompt.

    Args:
        editor: the session.
        prompt: the text.
        subject: what it is about.
        edited: trace the model with its edits, not the unedited one.
        samples: noise samples; the paper's 10 take three times as long as 3.
        progress: called after each layer.

    Raises:
        RequestError: the subject is not in the prompt.
    """
    from kecore_analysis.trace import Known, average, suggested_layers
    from kecore_analysis.tracer import Tracer

    known = Known.of(prompt, subject.strip())
    with nullcontext() if edited else without_edits(editor.model):
        spread = Tracer.spread_of(editor.view, editor.encoder, [known])
        tracer = Tracer(editor.view, editor.encoder, spread=spread, samples=samples, seed=editor.seed)
        trace = tracer.trace(known, progress)
    best, layers = suggested_layers(average([trace]))
    return {
        "prompt": prompt,
        "subject": subject,
        "edited": edited,
        "tokens": list(trace.tokens),
        "subject_tokens": list(trace.subject),
        "answer": trace.answer,
        "clean": trace.clean,
        "corrupted": trace.corrupted,
        "window": tracer.window,
        "samples": tracer.samples,
        "effects": {kind: trace.effect(kind).tolist() for kind in trace.restored},
        "best_layer": best,
        "suggested_layers": list(layers),
    }


def health_to_json(editor: Editor, passages: int, progress: Progress) -> dict[str, Any]:
    """Return what the edits did beside their facts: drift, perplexity, and the edited matrices.

    Args:
        editor: the session, with the edits on the model.
        passages: passages of held-out text.
        progress: called after each micro-batch.
    """
    from kecore_analysis.examination import Examination
    from kecore_analysis.health import changes, weight_health

    examination = Examination.read(without=("latency",), limit=passages, window=128, seed=editor.seed)
    options: dict[str, Any] = {"batch_tokens": editor.batch_tokens, "progress": progress}
    with without_edits(editor.model):
        before = examination.take(editor.view, editor.encoder, **options)
    after = examination.take(editor.view, editor.encoder, **options)
    return {
        "changes": {name: change.to_json() for name, change in changes(before, after).items()},
        "matrices": [matrix.to_json() for matrix in weight_health(editor.model, progress)],
        "norms": _update_norms(editor),
        "passages": len(examination.passages),
        "sources": dict(examination.sources),
    }


def _update_norms(editor: Editor) -> list[dict[str, Any]]:
    """Return the Frobenius norm of each edit's update of each matrix."""
    rows: list[dict[str, Any]] = []
    for entry in editor.history:
        if not isinstance(entry.edit, WeightEdit):
            continue
        norms: dict[str, float] = {}
        for name, update in entry.edit.updates.items():
            value = float(update.matrix().double().norm())
            norms[name] = value if math.isfinite(value) else 0.0
        rows.append({"method": entry.method, "norms": norms})
    return rows
