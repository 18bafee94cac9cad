"""Brings values as tools write them into the shapes of kecore's own layout: nested answers, cells, probes by axis."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from kecore.evaluate.written import as_text

__all__ = ["answers", "as_it_is", "flat_probes", "locality", "one_text", "portability", "split_cell", "texts"]

_TEXT_IN = ("str", "text", "label", "name", "value")
"""Fields of an answer or an entity that hold its text; beside them stand ids and types."""


def as_it_is(value: Any) -> Any:
    """Return a value as it is."""
    return value


def one_text(value: Any) -> Any:
    """Return the text of ``{"str": text}``, or of a list of one; anything else as it is."""
    if as_text(value) is not None or not isinstance(value, list | Mapping):
        return value
    alternatives = texts(value)
    return alternatives[0] if len(alternatives) == 1 else value


def answers(value: Any) -> list[str]:
    """Return the texts of an answer: one text, ``{"str": text}``, or lists of them.

    Raises:
        ValueError: it holds something else.
    """
    alternatives = texts(value)
    is_list = isinstance(value, list)
    if len(alternatives) < (len(cast("list[Any]", value)) if is_list else 1):
        raise ValueError("a text or a list of texts")
    return alternatives


def texts(value: object) -> list[str]:
    """Return the texts of an answer, as :func:`answers` does; empty where it holds none."""
    text = as_text(value)
    if text is not None:
        return [text]
    if isinstance(value, Mapping):
        values = cast("Mapping[str, Any]", value)
        return texts(next((values[name] for name in _TEXT_IN if name in values), None))
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [text for item in items for text in texts(item)]


def split_cell(value: Any) -> Any:
    """Return the texts of a cell of a table that holds several, with ``|`` or line breaks between them."""
    text = as_text(value)
    if text is None or not re.search(r"[|\n]", text):
        return value
    return [part.strip() for part in re.split(r"[|\n]", text) if part.strip()]


def locality(value: Any) -> Any:
    """Return probes of locality by axis; those without one are on the axis ``other``."""
    return _by_axis(value, "other")


def portability(value: Any) -> Any:
    """Return probes of portability by axis; those without one are on the axis ``implied``."""
    return _by_axis(value, "implied")


def flat_probes(prompt: Any, answer: Any, axis: str) -> dict[str, Any]:
    """Return the probes of two flat fields, such as ``locality_prompt`` and ``locality_ground_truth``."""
    return {axis: _pairs({"prompt": split_cell(prompt), "ground_truth": split_cell(answer)})}


def _by_axis(value: object, usual: str) -> Any:
    """Return probes as ``{axis: [{prompt, answers}]}``, from any of the shapes that tools write."""
    if isinstance(value, list):
        return {usual: [_probe(item) for item in cast("list[Any]", value)]}
    if not isinstance(value, Mapping):
        return value
    group = cast("Mapping[str, Any]", value)
    if {"prompt", "question"} & group.keys():  # one probe without an axis
        return {usual: _pairs(group)}
    axes: dict[str, Any] = {}
    for axis, probes in group.items():
        if isinstance(probes, Mapping):
            axes[axis] = _pairs(cast("Mapping[str, Any]", probes))
        elif isinstance(probes, list):
            axes[axis] = [_probe(item) for item in cast("list[Any]", probes)]
        else:
            axes[axis] = probes
    return axes


def _pairs(group: Mapping[str, Any]) -> list[Any]:
    """Return the probes of ``{prompt: [...], ground_truth: [...]}``, which may hold one text each."""
    prompts = group.get("prompt", group.get("question"))
    truths = group.get("ground_truth", group.get("answer"))
    if not isinstance(prompts, list):
        return [_probe(group)]
    listed = cast("list[Any]", prompts)
    answer_list = cast("list[Any]", truths) if isinstance(truths, list) else [truths] * len(listed)
    probes: list[Any] = []
    for index, prompt in enumerate(listed):
        answer = answer_list[index] if index < len(answer_list) else None
        probes.append({"prompt": prompt} if answer is None else {"prompt": prompt, "answers": answer})
    return probes


def _probe(item: object) -> Any:
    """Return a probe with its answers under the own layout's name."""
    if not isinstance(item, Mapping):
        return item
    probe = dict(cast("Mapping[str, Any]", item))
    for name, others in (("prompt", ("question",)), ("answers", ("ground_truth", "answer", "target"))):
        for other in others:
            if name not in probe and other in probe:
                probe[name] = probe.pop(other)
    return probe
