"""Layouts: how a data set's objects are recognised and become records. Built-in and third-party ones alike.

A layout is one :class:`Layout` behind the entry-point group :data:`GROUP`; kecore's own for published data
sets live in ``kecore_datasets`` and come through the same door. ``docs/datasets.md`` shows how to add one.

Axis names of portability and locality are kept where the data set names them (``Reasoning``,
``Relation_Specificity``, ...), else they are chosen from: ``one_hop``, ``inverse_relation``,
``subject_replace``, ``sub_question``; ``distracting``, ``other_attribution``, ``unrelated``, ``neighbourhood``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from kecore.api.errors import ConfigError, DataFormatError, PluginError, RequestError
from kecore.api.registry import Plugins, plugin_limits
from kecore.api.types import EditRecord, EditRequest, MultiHop, Probe
from kecore.evaluate.fields import Fields

__all__ = [
    "GROUP",
    "OWN",
    "Layout",
    "Part",
    "Published",
    "check_layout",
    "default",
    "filled",
    "make_request",
    "record_to_json",
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
        fills: what records of the layout carry beside the request: fields of EditRecord, and axes as
            ``portability: one_hop``.
        published: the data sets in this layout.
        detect: a further condition on an object that has all of ``needs``; must not raise.
        strict: one bad record refuses the whole file, and ids must be unique.
        expand: for a layout whose file is one object: the objects of its records.
        merge: for a layout whose records are spread over the files of a folder: the objects of its records.
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
    finish: Mapping[str, Callable[[Sequence[EditRecord]], Sequence[EditRecord]]] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the ways to edit; empty where there is one."""
        return tuple(self.parse) if isinstance(self.parse, Mapping) else ()

    def parser(self, variant: str | None) -> Parse:
        """The function that makes records.

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
        """The name that a variant has in ``parse`` and ``finish``, and the number in the place of its ``N``."""
        name, _, number = variant.rpartition("-")
        if number.isdecimal() and f"{name}-N" in self.variants:
            return f"{name}-N", int(number)
        return variant, None

    def fits(self, value: object) -> bool:
        """Whether an object is of this layout."""
        if not isinstance(value, Mapping) or not all(name in value for name in self.needs):
            return False
        return self.detect is None or self.detect(value)  # pyright: ignore[reportUnknownArgumentType] - of JSON


def check_layout(found: object, name: str, source: str = "") -> Layout:
    """Check what an entry point of :data:`GROUP` leads to.

    Args:
        found: the object.
        name: the entry point's name.
        source: how messages name it.

    Raises:
        PluginError: it is no Layout, or of another name.
    """
    source = source or f"data set '{name}'"
    if not isinstance(found, Layout):
        raise PluginError(f"{source}: the entry point must lead to a kecore.evaluate.Layout, got {found!r:.80}")
    if found.name != name:
        raise PluginError(f"{source}: the layout's name must be the entry point's, {name!r}; got {found.name!r}")
    return found


@cache
def default() -> Plugins[Layout]:
    """The layouts that are installed, read once per process with the limits of :mod:`kecore.api.registry`."""
    points = entry_points(group=GROUP)
    return Plugins(points, noun="data set layout", check=check_layout, missing=ConfigError, **plugin_limits())


def sniff(values: Sequence[object]) -> Layout | None:
    """The layout that most of the objects are of; None where none is of a known one.

    An object of several layouts counts for the most specific of them, the one with the most ``needs``; so does a tie.
    """
    layouts = sorted(default().all().values(), key=lambda layout: (-len(layout.needs), layout.name))
    each = (next((layout for layout in layouts if layout.fits(value)), None) for value in values)
    votes = Counter(layout.name for layout in each if layout is not None)
    return max((layout for layout in layouts if layout.name in votes), key=lambda x: votes[x.name], default=None)


def make_request(
    fields: Fields, prompt: str, subject: str | None, target: str, truth: str | None = None, id: str = ""
) -> EditRequest:
    """A request whose subject is spelt as in the prompt, should only the case differ.

    Args:
        fields: the object it is made from, for error messages.
        prompt: with ``{}`` or the subject in it.
        subject: None where the data set names none: the whole prompt then, so that a method which edits at
            the subject's last token edits at the prompt's.
        target: the new answer.
        truth: the old one.
        id: by default a digest.

    Raises:
        DataFormatError: they make no request; names the place.
    """
    named = prompt if subject is None else subject.strip()
    if "{}" not in prompt and named and named not in prompt:
        same = re.findall(re.escape(named), prompt, flags=re.IGNORECASE)
        named = same[-1] if same else named
    try:
        return EditRequest(prompt, named, target, truth, id)
    except RequestError as error:
        raise DataFormatError(f"{fields.where}: {error}") from None


def filled(axes: Mapping[str, Iterable[Probe]]) -> dict[str, tuple[Probe, ...]]:
    """The axes that have probes."""
    return {axis: found for axis, probes in axes.items() if (found := tuple(probes))}


_LISTS = ("rephrases", "neighbourhood", "generation_prompts", "target_aliases", "truth_aliases", "references")
_TEXTS = ("source", "relation", "target_id", "category")
_FLAGS = ("long_form", "safety")
_REQUEST = ("id", "prompt", "subject", "target", "target_new", "ground_truth")
_OWN = (*_REQUEST, *_LISTS, *_TEXTS, "locality", "portability", "joint", "multi_hop", *_FLAGS)


def _own(fields: Fields) -> EditRecord:
    """The layout of kecore; an unknown field is an error, since a misspelt one would silently drop probes."""
    plain: dict[str, Any] = {name: fields.texts(name) for name in _LISTS}
    plain |= {name: fields.text_or_none(name) or "" for name in _TEXTS}
    plain |= {name: fields.flag(name) for name in _FLAGS}
    return EditRecord(
        _own_request(fields, _OWN),
        locality=_own_axes(fields, "locality"),
        portability=_own_axes(fields, "portability"),
        joint=tuple(_own_request(item, _REQUEST) for item in fields.objects_or_none("joint")),
        multi_hop=tuple(map(_own_chain, fields.objects_or_none("multi_hop"))),
        **plain,
    )


def _own_request(fields: Fields, known: Sequence[str]) -> EditRequest:
    _only(fields, known)
    target = fields.text("target_new" if "target_new" in fields else "target")
    truth = fields.text_or_none("ground_truth")
    return make_request(fields, fields.text("prompt"), fields.text("subject"), target, truth, fields.id("id"))


def _own_axes(fields: Fields, name: str) -> dict[str, tuple[Probe, ...]]:
    if name not in fields:
        return {}
    group = fields.object(name)
    return filled({axis: map(_own_probe, group.objects(axis)) for axis in group.values})


def _own_probe(fields: Fields) -> Probe:
    _only(fields, ("prompt", "answers", "conditions", "others", "need", "also"))
    probe = fields.probe("prompt", "answers")
    need = fields.text_or_none("need") or "any"
    if need != "any" and need != "all":
        raise fields.fail("need", "'any' or 'all'")
    also: Any = fields.values.get("also", [])
    if not isinstance(also, list):
        raise fields.fail("also", "a list of lists of texts")
    return Probe(
        probe.prompt,
        probe.answers,
        tuple(map(_own_probe, fields.objects_or_none("conditions"))),
        tuple(map(_own_probe, fields.objects_or_none("others"))),
        need,
        tuple(Fields({"also": names}, fields.where).texts("also") for names in also),  # pyright: ignore[reportUnknownVariableType]
    )


def _own_chain(fields: Fields) -> MultiHop:
    _only(fields, ("questions", "answers", "old_answers", "hops", "old_hops"))
    if not fields.texts("questions"):
        raise fields.fail("questions", "a list of texts that is not empty")
    return MultiHop(
        fields.texts("questions"),
        fields.answers("answers"),
        fields.answers_or_none("old_answers"),
        tuple(map(_own_probe, fields.objects_or_none("hops"))),
        tuple(map(_own_probe, fields.objects_or_none("old_hops"))),
    )


def _only(fields: Fields, known: Sequence[str]) -> None:
    unknown = sorted(set(fields.values) - set(known))
    if unknown:
        raise DataFormatError(f"{fields.where}: unknown field '{unknown[0]}'; known fields: {', '.join(known)}")


def record_to_json(record: EditRecord) -> dict[str, Any]:
    """A record in kecore's own layout, one line of a JSONL file; empty fields are left out.

    Examples:
        >>> record_to_json(EditRecord(EditRequest("{} is in", "Rome", "Gaul", id="1")))
        {'prompt': '{} is in', 'subject': 'Rome', 'target': 'Gaul', 'id': '1'}
    """
    return _without_blanks(
        {
            **record.request.to_json(),
            **{name: list(getattr(record, name)) for name in _LISTS},
            "locality": {axis: list(map(_probe_to_json, probes)) for axis, probes in record.locality.items()},
            "portability": {axis: list(map(_probe_to_json, probes)) for axis, probes in record.portability.items()},
            "joint": [_without_blanks(request.to_json()) for request in record.joint],
            "multi_hop": list(map(_chain_to_json, record.multi_hop)),
            **{name: getattr(record, name) for name in (*_FLAGS, *_TEXTS)},
        }
    )


def _probe_to_json(probe: Probe) -> dict[str, Any]:
    values = {
        "answers": list(probe.answers),
        "conditions": list(map(_probe_to_json, probe.conditions)),
        "others": list(map(_probe_to_json, probe.others)),
        "need": probe.need if probe.others else "",
        "also": [list(names) for names in probe.also],
    }
    return {"prompt": probe.prompt, **_without_blanks(values)}


def _chain_to_json(chain: MultiHop) -> dict[str, Any]:
    values = {
        "old_answers": list(chain.old_answers),
        "hops": list(map(_probe_to_json, chain.hops)),
        "old_hops": list(map(_probe_to_json, chain.old_hops)),
    }
    return {"questions": list(chain.questions), "answers": list(chain.answers), **_without_blanks(values)}


def _without_blanks(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value}


OWN = Layout(
    "kecore",
    ("prompt", "subject"),
    "prompt, subject, target (or target_new), ...",
    _own,
    ("all of them",),
    (Published("your own", "kecore's layout, as JSONL, JSON or CSV", "any", "yours", "`record_to_json` writes it"),),
    detect=lambda values: "target" in values or "target_new" in values,
    strict=True,
)
"""kecore's own layout: one object a record, with the fields of EditRequest and EditRecord."""
