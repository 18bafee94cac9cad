"""Reading fields of a JSON object with errors that name the place and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from kecore.api.errors import DataFormatError
from kecore.api.types import BackgroundKind, Probe, ProbeKind
from kecore.evaluate.written import as_text

__all__ = ["Fields"]


class Fields:
    """One JSON object of a facts file.

    A field that holds null or NaN (what pandas writes for a missing text) counts as missing.

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
        value = self.values.get(name)
        return value is not None and not (isinstance(value, float) and value != value)

    def fail(self, name: str, expected: str) -> DataFormatError:
        """Return the error for a field that does not hold what is ``expected``."""
        if name not in self.values:
            have = ", ".join(sorted(self.values)) if self.values else "none"
            return DataFormatError(f"{self.where}: field '{name}' is missing (fields here: {have})")
        value = self.values[name]
        if name not in self:
            return DataFormatError(f"{self.where}: field '{name}' is empty; it must be {expected}")
        return DataFormatError(
            f"{self.where}: field '{name}' must be {expected}, got {type(value).__name__}: {value!r:.80}"
        )

    def text(self, name: str) -> str:
        """Read a field that must hold text; numbers and booleans are text as they are written."""
        text = as_text(self.values.get(name)) if name in self else None
        if text is None:
            raise self.fail(name, "text")
        return text

    def text_or_none(self, name: str) -> str | None:
        """Read a field that holds text, or is missing, null or empty (then None)."""
        return (self.text(name).strip() or None) if name in self else None

    def id(self, name: str) -> str:
        """Read a field that names the record, by text or number; empty where there is no such field."""
        if name not in self.values:
            return ""
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise self.fail(name, "a text or a number that is not empty; leave it out to have one made")
        return str(value).strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """Read a field that holds texts, stripped and without blanks: a list, one text, or nothing."""
        if name not in self:
            return ()
        value: Any = self.values[name]
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        texts: list[str] = []
        for item in items:
            text = as_text(item)
            if text is None:
                raise self.fail(name, "a list of texts")
            if text.strip():
                texts.append(text.strip())
        return tuple(texts)

    def flag(self, name: str) -> bool:
        """Read a field that holds true or false; false where it is missing."""
        if name not in self:
            return False
        text = as_text(self.values[name]) or ""
        if text.casefold() not in ("true", "false"):
            raise self.fail(name, "true or false")
        return text.casefold() == "true"

    def object(self, name: str) -> Fields:
        """Read a field that holds an object."""
        if not isinstance(self.values.get(name), Mapping):
            raise self.fail(name, "an object")
        return Fields(self.values[name], f"{self.where}, '{name}'")

    def objects(self, name: str) -> list[Fields]:
        """Read a field that holds a list of objects."""
        value: Any = self.values.get(name)
        if not isinstance(value, list):
            raise self.fail(name, "a list of objects")
        items = cast("list[Any]", value)
        return [Fields(item, f"{self.where}, '{name}'[{i}]") for i, item in enumerate(items)]

    def objects_or_none(self, name: str) -> list[Fields]:
        """Read a list of objects, empty where the field is missing."""
        return self.objects(name) if name in self else []

    def answers(self, name: str) -> tuple[str, ...]:
        """Read all answers that count: a text, a list of texts, or a list of lists of aliases (flattened)."""
        texts: list[str] = []
        pending: list[Any] = [self.values.get(name)]
        while pending:
            value = pending.pop(0)
            text = as_text(value)
            if text is not None:
                texts.append(text)
            elif isinstance(value, list):
                pending = cast("list[Any]", value) + pending
            else:
                raise self.fail(name, "an answer or a list of answers")
        return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))

    def answers_or_none(self, name: str) -> tuple[str, ...]:
        """Read all answers that count, none where the field is missing."""
        return self.answers(name) if name in self else ()

    def probe(self, kind: ProbeKind | BackgroundKind, prompt: str, answers: str, axis: str = "") -> Probe:
        """Make a probe whose prompt must not be blank, and whose answers may be missing.

        Args:
            kind: of the probe.
            prompt: the field with the prompt.
            answers: the field with its answers.
            axis: of the probe.
        """
        text = self.text(prompt).strip()
        if not text:
            raise self.fail(prompt, "text that is not empty")
        return Probe(kind, text, self.answers_or_none(answers), axis=axis)

    def axes(self, kind: ProbeKind, name: str, answers: str) -> tuple[Probe, ...]:
        """Make probes of an object of lists by axis, ``{axis: [{"prompt": ..., answers: ...}]}``.

        Args:
            kind: of the probes.
            name: the field, which may be missing.
            answers: the probes' field with the answers.
        """
        if name not in self:
            return ()
        group = self.object(name)
        probes: list[Probe] = []
        for axis in group.values:
            probes += [item.probe(kind, "prompt", answers, axis) for item in group.objects_or_none(axis)]
        return tuple(probes)
