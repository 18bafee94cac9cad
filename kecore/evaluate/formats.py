"""Layouts: how a data set's objects are recognised and become records. Built-in and third-party ones alike.

A layout is one :class:`Layout` behind the entry-point group :data:`GROUP`; kecore's own for published data
sets live in ``kecore_datasets`` and come through the same door. ``docs/datasets.md`` shows how to add one.

Axis names of portability and locality are kept where the data set names them (``Reasoning``,
``Relation_Specificity``, ...), else they are chosen from: ``one_hop``, ``inverse_relation``,
``subject_replace``, ``sub_question``; ``distracting``, ``other_attribution``, ``unrelated``, ``neighbourhood``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, cast

from kecore.api.errors import ConfigError, KecoreError, PluginError
from kecore.api.plugins import Plugins, plugin_limits
from kecore.api.types import EditRecord
from kecore.evaluate.fields import Fields
from kecore.evaluate.spelling import spelt_in

__all__ = [
    "GROUP",
    "Layout",
    "Part",
    "Published",
    "check_layout",
    "default",
    "layout_of",
    "sniff",
]

GROUP = "kecore.datasets"
"""The entry-point group: ``name = "package.module:LAYOUT"``."""


class Published(NamedTuple):
    """A data set that is published in a layout, for the page about data sets.

    Args:
        name: what the field calls it.
        about: what it is, in a few words.
        size: records of the published files, as their publishers give it.
        licence: as published; ``none given`` where there is no licence file.
        source: where it is published: a repository, or ``hf:NAME``.
        paper: arXiv id.
    """

    name: str
    about: str
    size: str
    licence: str
    source: str
    paper: str = ""


class Part(NamedTuple):
    """One file of a folder, for layouts whose records are spread over several files.

    Args:
        name: path of the file inside the folder, with ``/``.
        objects: what it holds, each with its place.
    """

    name: str
    objects: Sequence[tuple[str, Any]]


Parse = Callable[[Fields], EditRecord]


@dataclass(frozen=True, slots=True)
class Layout:
    """One published layout.

    Args:
        name: what users pass as ``format``; the entry point's name.
        needs: fields that every object of the layout has. Of several layouts that fit an object, the one with
            the most needs is taken.
        describes: the fields that mark it, for messages.
        parse: makes a record of one object; raises DataFormatError or RequestError. Of a layout whose records
            can be edited or asked in several ways: the ways by name, the first being the default. A name that ends
            in ``-N`` stands for every number there; its function gets the number as its second argument.
        fills: what records of the layout carry beside the request, by the fields of kecore's own layout, and axes as
            ``portability: one_hop``.
        published: the data sets in this layout.
        detect: a further condition on an object that has all of ``needs``; must not raise.
        strict: one bad record refuses the whole file, and ids must be unique.
        expand: for a layout whose file is one object: the objects of its records.
        merge: for a layout whose records are spread over the files of a folder: the objects of its records.
        origins: for a layout whose fields go by many names: fields of kecore's own layout to the object's fields that
            they are read from.
        finish: for ways whose records depend on each other: from all records as they come to those that are kept.
    """

    name: str
    needs: tuple[str, ...]
    describes: str
    parse: Parse | Mapping[str, Callable[..., EditRecord]]
    fills: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()
    detect: Callable[[Mapping[str, Any]], bool] | None = None
    strict: bool = False
    expand: Callable[[Fields], list[dict[str, Any]]] | None = None
    merge: Callable[[Sequence[Part]], list[tuple[str, Any]]] | None = None
    origins: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None
    finish: Mapping[str, Callable[[Sequence[EditRecord]], Sequence[EditRecord]]] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the ways to edit; empty where there is one."""
        return tuple(self.parse) if isinstance(self.parse, Mapping) else ()

    def parser(self, variant: str | None) -> Parse:
        """Return the function that makes records.

        Raises:
            ConfigError: there is no such variant.
        """
        if not isinstance(self.parse, Mapping):
            if variant is not None:
                raise ConfigError(f"the layout '{self.name}' has no variants, got '{variant}'; leave it out")
            return self.parse
        if variant is None:
            return self.parse[self.variants[0]]
        name, number = self.way(variant)
        if name not in self.parse or (number is None and name.endswith("-N")):
            known = ", ".join(self.parse)
            raise ConfigError(f"the layout '{self.name}' has no variant '{variant}'; it has: {known}")
        way = self.parse[name]
        return way if number is None else lambda fields: way(fields, number)

    def way(self, variant: str) -> tuple[str, int | None]:
        """Return the name that a variant has in ``parse`` and ``finish``, and the number in the place of its ``N``."""
        name, _, number = variant.rpartition("-")
        if number.isdecimal() and f"{name}-N" in self.variants:
            return f"{name}-N", int(number)
        return variant, None

    def fits(self, value: object) -> bool:
        """Return whether an object is of this layout."""
        if not isinstance(value, Mapping) or not all(name in value for name in self.needs):
            return False
        return self.detect is None or self.detect(value)  # pyright: ignore[reportUnknownArgumentType] - of JSON


def check_layout(layout: object, name: str, source: str = "") -> Layout:
    """Check what an entry point of :data:`GROUP` leads to.

    Args:
        layout: the object.
        name: the entry point's name.
        source: how messages name it.

    Raises:
        PluginError: it is no Layout, or of another name.
    """
    source = source or f"data set '{name}'"
    if not isinstance(layout, Layout):
        raise PluginError(f"{source}: the entry point must lead to a kecore.evaluate.Layout, got {layout!r:.80}")
    if layout.name != name:
        raise PluginError(f"{source}: the layout's name must be the entry point's, {name!r}; got {layout.name!r}")
    return layout


@cache
def default() -> Plugins[Layout]:
    """Return the layouts that are installed, read once per process with the limits of :mod:`kecore.api.plugins`."""
    points = entry_points(group=GROUP)
    return Plugins(points, noun="data set layout", check=check_layout, missing=ConfigError, **plugin_limits())


def layout_of(value: object) -> Layout | None:
    """Return the layout of an object: of those that fit, the most specific one that reads the subject it names."""
    for layout in _by_specificity(default()):
        if layout.fits(value) and not _drops_subject(layout, value):
            return layout
    return None


@cache
def _by_specificity(layouts: Plugins[Layout]) -> tuple[Layout, ...]:
    """Return layouts with the one first that needs the most fields; every record of a file asks for them."""
    return tuple(sorted(layouts.all().values(), key=lambda layout: (-len(layout.needs), layout.name)))


def _drops_subject(layout: Layout, value: object) -> bool:
    """Return whether a layout would make a record of an object without the subject that the object names."""
    subject = cast("Mapping[str, Any]", value).get("subject")
    if "subject" in layout.needs or not isinstance(subject, str) or not subject.strip():
        return False
    if layout.expand or layout.merge:
        return False
    try:
        record = layout.parser(None)(Fields(value, ""))
    except KecoreError:  # said where the record is read
        return False
    return record.request.subject is None or spelt_in(record.request.subject, subject.strip()) != record.request.subject


def sniff(values: Sequence[object]) -> Layout | None:
    """Return the layout that most of the objects are of; None where none is of a known one.

    A tie goes to the most specific layout, the one with the most ``needs``.
    """
    votes: Counter[str] = Counter()
    layouts: dict[str, Layout] = {}
    for value in values:
        layout = layout_of(value)
        if layout is not None:
            votes[layout.name] += 1
            layouts[layout.name] = layout
    candidates = sorted(layouts.values(), key=lambda layout: (-len(layout.needs), layout.name))
    return max(candidates, key=lambda layout: votes[layout.name], default=None)
