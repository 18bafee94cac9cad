"""What is done with files in no known layout: records inside of an object are taken out, and others are explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from kecore.evaluate.fields import as_text
from kecore.evaluate.formats import Layout, default

__all__ = ["explain_unknown", "unwrap"]

_TRIPLES = (("subject", "head", "s"), ("relation", "predicate", "r", "p"), ("object", "tail", "o"))
_QUESTIONS = ("question", "prompt", "query", "instruction", "ask")
_ANSWERS = ("answer", "target", "output", "value", "fact")


def unwrap(where: str, value: object) -> Iterator[tuple[str, Any]]:
    """Yield the records inside of a single object: of the one list of objects in it, or of lists side by side.

    An object that holds neither is yielded as it is, and so is one that has a prompt itself.
    """
    if not isinstance(value, Mapping):
        yield where, value
        return
    values = cast("Mapping[str, Any]", value)
    is_record = any(_asks(name) and as_text(field) is not None for name, field in values.items())
    lists = {name: cast("list[Any]", field) for name, field in values.items() if isinstance(field, list)}
    of_objects = [items for items in lists.values() if items and all(isinstance(item, Mapping) for item in items)]
    if len(of_objects) == 1 and not is_record:
        for number, item in enumerate(of_objects[0], 1):
            yield f"{where} record {number}", item
        return
    prompts = next((items for name, items in lists.items() if _asks(name) and items not in of_objects), None)
    if prompts is not None and not is_record:
        for index in range(len(prompts)):
            yield f"{where} record {index + 1}", _row(values, index)
        return
    yield where, value


def _asks(name: object) -> bool:
    return any(word in str(name).casefold() for word in _QUESTIONS)


def _row(values: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return one record of lists side by side, which may lie deeper, as those of EasyEdit's ``locality_inputs``."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            items = cast("list[Any]", value)
            row[name] = items[index] if index < len(items) else None
        elif isinstance(value, Mapping):
            row[name] = _row(cast("Mapping[str, Any]", value), index)
        else:
            row[name] = value
    return row


def explain_unknown(sample: Sequence[object], name: str) -> str:
    """Say what the first records of a file have, which layouts come nearest, and how to say what its fields mean.

    Args:
        sample: the first values.
        name: what messages call the file.
    """
    first = next((value for value in sample if isinstance(value, Mapping)), None)
    if first is None:
        return (
            f"{name}: expected objects with a prompt and a target, got {type(sample[0]).__name__}: "
            f"{sample[0]!r:.80}; write each fact as an object"
        )
    values = cast("Mapping[str, Any]", first)
    message = f"{name}: unknown layout, its first record has: {', '.join(map(str, values))}."
    if _is_triple(values):
        return f"{message} These are triples: kecore import-triples {name} --out facts.jsonl writes them as facts"
    nearest: list[str] = []
    for layout, lacks in _nearest(values):
        nearest.append(f"{layout.name} (lacks {', '.join(lacks)})")
    if nearest:
        message += f" The nearest layouts: {', '.join(nearest)}."
    return f'{message} Say which field is which: --map "{_guess(values)}" (in Python: mapping={{...}})'


def _is_triple(values: Mapping[str, Any]) -> bool:
    folded = {str(name).casefold() for name in values}
    return all(folded.intersection(names) for names in _TRIPLES)


def _nearest(values: Mapping[str, Any]) -> list[tuple[Layout, list[str]]]:
    """Return the two layouts that lack the fewest fields, of those that need some field that is there."""
    candidates: list[tuple[Layout, list[str]]] = []
    for layout in default().all().values():
        lacks = [field for field in layout.needs if field not in values]
        if lacks and len(lacks) < len(layout.needs):
            candidates.append((layout, lacks))
    return sorted(candidates, key=lambda item: (len(item[1]) / len(item[0].needs), item[0].name))[:2]


def _guess(values: Mapping[str, Any]) -> str:
    """Write a map that fits the fields as far as their names and contents tell, with capitals where they do not."""
    texts = {str(name): text for name, value in values.items() if (text := as_text(value)) is not None}
    prompt = next((name for name in texts if any(word in name.casefold() for word in _QUESTIONS)), None)
    others = [name for name in texts if name != prompt]
    target = next((name for name in others if any(word in name.casefold() for word in _ANSWERS)), None)
    pairs = [f"prompt={prompt or 'FIELD'}", f"target={target or 'FIELD'}"]
    for name in others:
        if prompt is not None and name != target and texts[name] and texts[name] in texts[prompt]:
            pairs.append(f"subject={name}")
            break
    return ",".join(pairs)
