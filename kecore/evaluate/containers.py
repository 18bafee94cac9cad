"""Takes records out of a value that holds several of them: lists by name, pandas' JSON, lists side by side, chats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeAlias, cast

from kecore.api.errors import ConfigError, DataFormatError
from kecore.evaluate.chats import is_chat
from kecore.evaluate.formats import Layout, layout_of
from kecore.evaluate.mapping import FieldMap
from kecore.evaluate.sources import Document
from kecore.evaluate.written import as_text

__all__ = ["QUESTIONS", "Container", "objects_of"]

Placed: TypeAlias = tuple[str, Any]
"""A value with its place in the file."""

QUESTIONS = ("question", "prompt", "query", "instruction", "ask")
"""Words in the names of fields that hold what is asked."""
_DATA_FRAME = ({"columns", "data"}, {"columns", "index", "data"})  # pandas' orientation "split"
_DATA_TABLE = {"schema", "data"}  # and "table"

_OTHER_FILES = (  # JSON that kecore or a library writes, by fields that it has
    ({"scores_before", "edit_path"}, "the result of an edit; give the facts that were edited"),
    ({"models", "methods", "facts"}, "a plan of a benchmark; give it to `kecore bench`"),
    ({"model_type"}, "a model's configuration; give the model first, then the facts"),
    ({"architectures"}, "a model's configuration; give the model first, then the facts"),
    ({"added_tokens", "model"}, "a tokenizer; give the model's folder first, then the facts"),
    ({"tokenizer_class"}, "a tokenizer's configuration; give the model's folder first, then the facts"),
    ({"peft_type"}, "an adapter's configuration; facts stand in a file of their own"),
    ({"cells", "nbformat"}, "a notebook; facts stand in a file of their own"),
)


def objects_of(document: Document, named: Layout | None, field_map: FieldMap | None) -> Iterator[Placed]:
    """Return the objects of a document, each with its place; those inside of a single value where that is no record.

    Args:
        document: the file.
        named: the layout that was asked for, if one was.
        field_map: how the fields of the file become those of kecore's own layout, if that was said.

    Raises:
        DataFormatError: the document is broken, holds something else than facts, or several lists of them.
        ConfigError: it holds no split of the name that was asked for.
    """

    def is_record(value: object) -> bool:
        if field_map is not None:
            return field_map.fits(value)
        return (named is not None and named.fits(value)) or layout_of(value) is not None

    objects = document.objects()
    head = list(islice(objects, 2))
    # A value that is all of the file; the only item of an array is a record, and keeps the lists that it has.
    if len(head) == 1 and head[0][0] in (document.name, f"{document.name} line 1"):
        ((where, value),) = head
        head = list(Container(where, value, is_record, document.split).records())
    elif document.split is not None:
        raise ConfigError(
            f"split '{document.split}' was asked of the single file {document.name}, which has none; leave it out"
        )
    for where, value in _with_names(chain(head, objects)):
        yield where, value if field_map is None else field_map.apply(value, where)


def _with_names(placed: Iterator[Placed]) -> Iterator[Placed]:
    """Give names to what has none: turns of chats, and the cells of rows below a row of names."""
    header: list[str] = []
    for where, value in placed:
        if is_chat(value):
            yield where, {"messages": value}
        elif not isinstance(value, list):
            yield where, value
        elif header:
            yield where, dict(zip(header, cast("list[Any]", value), strict=False))
        else:
            header = [as_text(cell) or "" for cell in cast("list[Any]", value)]


@dataclass(frozen=True)
class Container:
    """A value of a file that may hold several records.

    Args:
        where: its place, for messages.
        value: the value.
        is_record: tells records from what holds them.
        split: name of the one of several lists that was asked for; ``a+b`` is both.
    """

    where: str
    value: object
    is_record: Callable[[object], bool]
    split: str | None = None

    @property
    def _file(self) -> str:
        """The place as messages name it."""
        return self.where.removesuffix(" line 1")

    def records(self) -> Iterator[Placed]:
        """Yield the records in the value, or the value itself where it holds none.

        Raises:
            DataFormatError: it holds several lists of records, and no split was named, or something else than facts.
            ConfigError: it holds no split of that name.
        """
        if self.split is not None:
            yield from self._split(self.split)
        elif is_chat(self.value):
            yield self.where, {"messages": self.value}
        elif isinstance(self.value, Mapping) and not self.is_record(self.value):
            yield from self._of_mapping(cast("Mapping[str, Any]", self.value))
        else:
            yield self.where, self.value

    def _split(self, split: str) -> Iterator[Placed]:
        values = cast("Mapping[str, Any]", self.value) if isinstance(self.value, Mapping) else {}
        known = self._lists(values)
        for name in split.split("+"):
            if name not in known:
                has = f"; its splits: {', '.join(known)}" if known else ", which has none; leave it out"
                raise ConfigError(f"split '{name}' was asked of the single file {self._file}{has}")
            yield from self._inside(f", '{name}'", known[name]).records()

    def _of_mapping(self, values: Mapping[str, Any]) -> Iterator[Placed]:
        if any(_asks(name) and as_text(value) is not None for name, value in values.items()):
            yield self.where, values  # a record in a layout that is not known, with lists of its own
            return
        rows = self._rows(values)
        if rows is not None:
            for number, row in enumerate(rows, 1):
                yield f"{self.where} record {number}", row
            return
        for fields, kind in _OTHER_FILES:
            if fields <= values.keys():
                raise DataFormatError(f"{self._file}: expected facts, got {kind}")
        lists = self._lists(values)
        if set(values) == _DATA_TABLE:
            lists = {"data": values["data"]}
        if len(lists) > 1:
            counts = ", ".join(f"{name} ({sum(1 for _ in self._inside('', lists[name]).records())})" for name in lists)
            raise DataFormatError(
                f"{self._file} holds the lists {counts}; choose one by --split NAME (in Python split=)"
            )
        if lists:
            ((_, items),) = lists.items()
            yield from self._inside("", items).records()
        elif values and all(map(self.is_record, values.values())):
            for name, record in values.items():
                yield f"{self.where}, '{name}'", _with_id(record, name)
        else:
            yield self.where, values

    def _lists(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what holds several records, by name: lists of objects, and objects that hold a list or columns."""
        lists: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, list):
                items = cast("list[Any]", value)
                if items and not is_chat(items) and all(isinstance(item, Mapping) or is_chat(item) for item in items):
                    lists[name] = items
            elif isinstance(value, Mapping) and not self.is_record(cast("Mapping[str, Any]", value)):
                inner = cast("Mapping[str, Any]", value)
                if self._rows(inner) is not None or self._lists(inner):
                    lists[name] = inner
        return lists

    def _inside(self, suffix: str, value: object) -> _Items | Container:
        where = f"{self.where}{suffix}"
        if isinstance(value, list) and not is_chat(value):
            return _Items(where, cast("list[Any]", value))
        return Container(where, value, self.is_record)

    def _rows(self, values: Mapping[str, Any]) -> list[Any] | None:
        """Return the rows of columns that stand side by side; None where these are no such columns."""
        if set(values) in _DATA_FRAME and all(isinstance(values[name], list) for name in ("columns", "data")):
            columns = cast("list[str]", values["columns"])
            return [dict(zip(columns, row, strict=False)) for row in cast("list[list[Any]]", values["data"])]
        if _has_equal_names(values):
            names = list(cast("Mapping[str, Any]", next(iter(values.values()))))
            rows = [{column: cells[name] for column, cells in values.items()} for name in names]
            return rows if rows and self.is_record(rows[0]) else None
        lengths = {name: len(cast("list[Any]", value)) for name, value in values.items() if isinstance(value, list)}
        if not lengths or not self.is_record(_row(values, 0)):
            return None
        of_prompts = [length for name, length in lengths.items() if _asks(name)]
        return [_row(values, index) for index in range(max(of_prompts or lengths.values()))]


@dataclass(frozen=True)
class _Items:
    """A list of records, each of which may be a chat without a name."""

    where: str
    values: Sequence[Any]

    def records(self) -> Iterator[Placed]:
        """Yield the records."""
        for number, value in enumerate(self.values, 1):
            yield f"{self.where} record {number}", {"messages": value} if is_chat(value) else value


def _asks(name: object) -> bool:
    return any(word in str(name).casefold() for word in QUESTIONS)


def _has_equal_names(values: Mapping[str, Any]) -> bool:
    """Return whether all values are objects with the same fields, as pandas writes columns."""
    if len(values) < 2 or not all(isinstance(value, Mapping) and value for value in values.values()):
        return False
    names = [list(cast("Mapping[str, Any]", value)) for value in values.values()]
    return all(other == names[0] for other in names)


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


def _with_id(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a record with the name that it stands under as its id, unless it has one."""
    has_id = any(str(field).casefold().endswith("id") for field in record)
    return dict(record) if has_id else {"id": name, **record}
