"""Says what a file in no known layout holds, which layouts come nearest, and how its fields can be named."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from kecore.evaluate.containers import QUESTIONS
from kecore.evaluate.formats import Layout, default
from kecore.evaluate.written import as_text

__all__ = ["explain_unknown"]

_EXAMPLE = json.dumps({"prompt": "The capital of France is", "subject": "France", "target": "Lyon"})
_TRIPLES = (("subject", "head", "s"), ("relation", "predicate", "r", "p"), ("object", "tail", "o"))
_ANSWERS = ("answer", "target", "output", "value", "fact")
_WORDS = 4  # a field's name of so many words is a sentence


def explain_unknown(sample: Sequence[object], name: str) -> str:
    """Say what the first records of a file have, which layouts come nearest, and how to say what its fields mean.

    Args:
        sample: the first values.
        name: what messages call the file.
    """
    first = next((value for value in sample if isinstance(value, Mapping)), None)
    if first is None:
        kind = type(sample[0]).__name__
        return f"{name}: expected objects, got {kind}: {sample[0]!r:.80}; write each fact as {_EXAMPLE}"
    values = cast("Mapping[str, Any]", first)
    names = [str(field) for field in values]
    if not names:
        return f"{name} holds an empty object; write each fact as {_EXAMPLE}"
    message = f"{name}: unknown layout, its first record has: {', '.join(names)}."
    if _is_triple(names):
        return f"{message} These are triples: kecore import-triples {name} --out facts.jsonl writes them as facts"
    if any(len(field.split()) >= _WORDS for field in names):
        return f"{message} That reads like a fact: write a line of names above it, such as prompt,subject,target"
    if len(names) == 1:
        return f"{message} A fact needs two fields, a prompt and the target that follows it, such as {_EXAMPLE}"
    nearest = [f"{layout.name} (lacks {', '.join(_missing(layout, names))})" for layout in _nearest(names)]
    if nearest:
        message += f" The nearest layouts: {', '.join(nearest)}."
    return f'{message} Say which field is which: --map "{_propose_map(values)}" (in Python: mapping={{...}})'


def _is_triple(names: Sequence[str]) -> bool:
    folded = {name.casefold() for name in names}
    return all(folded.intersection(alternatives) for alternatives in _TRIPLES)


def _missing(layout: Layout, names: Sequence[str]) -> list[str]:
    return [field for field in layout.needs if field not in names]


def _nearest(names: Sequence[str]) -> list[Layout]:
    """Return the two layouts that lack the smallest share of their fields, of those that need some that is there."""

    def missing_share(layout: Layout) -> float:
        return len(_missing(layout, names)) / len(layout.needs)

    candidates = [layout for layout in default().all().values() if layout.needs and 0 < missing_share(layout) < 1]
    return sorted(candidates, key=lambda layout: (missing_share(layout), layout.name))[:2]


def _propose_map(values: Mapping[str, Any]) -> str:
    """Write a map that fits the fields as far as names and contents tell, with FIELD where they do not."""
    texts: dict[str, str] = {}
    for name, value in values.items():
        text = as_text(value)
        if text is not None and text.strip():
            texts[str(name)] = text.strip()
    prompt = _first(texts, lambda name: _has_word(name, QUESTIONS))
    if prompt is None:
        prompt = _first(texts, lambda name: texts[name].endswith("?"))
    others = [name for name in texts if name != prompt]
    subject = None
    if prompt is not None:
        question = texts[prompt]
        subject = _first(others, lambda name: texts[name] in question)
    others = [name for name in others if name != subject]
    target = _first(others, lambda name: _has_word(name, _ANSWERS))
    if target is None and len(others) == 1 and prompt is not None:
        target = others[0]
    pairs = [f"prompt={prompt or 'FIELD'}", f"target={target or 'FIELD'}"]
    if subject is not None:
        pairs.append(f"subject={subject}")
    return ",".join(pairs)


def _first(names: Iterable[str], test: Callable[[str], bool]) -> str | None:
    return next((name for name in names if test(name)), None)


def _has_word(name: str, words: Sequence[str]) -> bool:
    """Return whether a name holds a word, or is one with a slip of the pen, as ``promt``."""
    folded = name.casefold()
    return any(word in folded for word in words) or bool(difflib.get_close_matches(folded, words, n=1, cutoff=0.8))
