"""Reading fields of a JSON object with errors that name the place and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from kecore.errors import DataFormatError
from kecore.types import Probe

__all__ = ["Fields"]


class Fields:
    """One JSON object of a facts file.

    Args:
        values: the object.
        where: its place in the file, for error messages.

    Raises:
        DataFormatError: ``values`` is not an object; from every reader, a field is missing or of another
            type than asked for.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise DataFormatError(f"{where}: expected an object, got {type(values).__name__}: {values!r:.80}")
        self.values = cast("Mapping[str, Any]", values)
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def fail(self, name: str, expected: str) -> DataFormatError:
        """The error for a field that does not hold what is ``expected``."""
        if name not in self.values:
            have = ", ".join(sorted(self.values)) or "none"
            return DataFormatError(f"{self.where}: field '{name}' is missing (fields here: {have})")
        value = self.values[name]
        return DataFormatError(
            f"{self.where}: field '{name}' must be {expected}, got {type(value).__name__}: {value!r:.80}"
        )

    def text(self, name: str) -> str:
        """A field that must hold text."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.fail(name, "text")
        return value

    def text_or_none(self, name: str) -> str | None:
        """A field that holds text, or is missing, null or empty (then None)."""
        return (self.text(name).strip() or None) if name in self else None

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that holds texts, stripped and without blanks: a list, one text, or nothing."""
        value: Any = self.values.get(name)
        if value is None:
            return ()
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise self.fail(name, "a list of texts")
        return tuple(text for item in items if (text := item.strip()))

    def object(self, name: str) -> Fields:
        """A field that holds an object."""
        if not isinstance(self.values.get(name), Mapping):
            raise self.fail(name, "an object")
        return Fields(self.values[name], f"{self.where}, '{name}'")

    def objects(self, name: str) -> list[Fields]:
        """A field that holds a list of objects."""
        value: Any = self.values.get(name)
        if not isinstance(value, list):
            raise self.fail(name, "a list of objects")
        items = cast("list[Any]", value)
        return [Fields(item, f"{self.where}, '{name}'[{i}]") for i, item in enumerate(items)]

    def answers(self, name: str) -> tuple[str, ...]:
        """All answers that count: a text, a list of texts, or a list of lists of aliases (flattened)."""
        found: list[str] = []
        pending: list[Any] = [self.values.get(name)]
        while pending:
            value = pending.pop(0)
            if isinstance(value, str):
                found.append(value)
            elif isinstance(value, list):
                pending = cast("list[Any]", value) + pending
            else:
                raise self.fail(name, "an answer or a list of answers")
        return tuple(dict.fromkeys(text.strip() for text in found if text.strip()))

    def axes(self, name: str, answers: str) -> dict[str, tuple[Probe, ...]]:
        """Probes by axis: an object of lists of ``{"prompt": ..., answers: ...}``; empty axes are dropped.

        Args:
            name: the field, which may be missing.
            answers: the probes' field with the answers.
        """
        if name not in self:
            return {}
        found: dict[str, tuple[Probe, ...]] = {}
        group = self.object(name)
        for axis in group.values:
            probes = tuple(
                Probe(item.text("prompt").strip(), item.answers(answers) if answers in item else ())
                for item in group.objects(axis)
            )
            if probes:
                found[axis] = probes
        return found
