"""Values as they are written in a file: numbers that keep their digits, dates, and JSON that says nothing twice."""

from __future__ import annotations

import datetime
import json
from contextlib import suppress
from decimal import Decimal
from typing import Any, cast

__all__ = ["WrittenFloat", "as_text", "parse_json", "read_cell"]


class WrittenFloat(float):
    """A number of a file that remembers how it was written there, as ``1.10``."""

    def __new__(cls, written: str) -> WrittenFloat:
        """Read a number."""
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str


def as_text(value: object) -> str | None:
    """Return a text, number, boolean or date of a file as it is written there; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, WrittenFloat):
        return value.written
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if _is_date_only(value) else value.isoformat(sep=" ")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, int | float | datetime.timedelta) else None


def _is_date_only(value: datetime.datetime) -> bool:
    """Return whether a point in time is a day, as tables without a type for days write one."""
    return value.tzinfo is None and value.time() == datetime.time()


def read_cell(text: str) -> Any:
    """Return what a cell of a table holds: its text, or the list or object that stands there as JSON.

    A list of numbers, as ``[1, 2]``, is a text.
    """
    if text[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            value = parse_json(text)
            if not isinstance(value, list) or any(isinstance(item, str | dict | list) for item in cast(Any, value)):
                return value
    return text


def parse_json(text: str) -> Any:
    """Read JSON with numbers as they are written.

    Raises:
        ValueError: it is no JSON, an object has a field twice, or a text is none that can be written.
    """
    if "\\ud" in text.casefold():
        json.dumps(json.loads(text), ensure_ascii=False).encode()  # a half of a pair of surrogates is no character
    return json.loads(text, parse_float=WrittenFloat, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field '{next(name for name in names if names.count(name) > 1)}' stands there twice")
    return values
