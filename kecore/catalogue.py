"""The catalogue of editing methods: what each does, can, needs and costs, and what can be set of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, overload

from kecore import data
from kecore.api import registry
from kecore.api.config import Preset
from kecore.api.describe import ConfigField, config_fields
from kecore.api.errors import KecoreWarning
from kecore.api.line import MethodLine
from kecore.api.method import EditMethod
from kecore.api.plugins import HOME
from kecore.api.show import html_table, shorten
from kecore.api.types import Capabilities

__all__ = ["Measured", "MethodCard", "MethodCatalogue", "abilities", "methods"]

_MEASURED = "measured.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a method scored and cost on one small model; ``docs/results.md`` gives protocol, hardware and intervals.

    Args:
        success: share of edited prompts that prefer the target, of 50 facts each edited alone; None where it was not
            measured.
        paraphrases: likewise, of their rewordings.
        neighbours: share of prompts about other subjects that keep their answer.
        seconds_per_fact: of a lone edit on two CPU threads.
        kib_per_fact: of its file.
    """

    success: float | None = None
    paraphrases: float | None = None
    neighbours: float | None = None
    seconds_per_fact: float | None = None
    kib_per_fact: float | None = None

    def __str__(self) -> str:
        scores = (("edits", self.success), ("paraphrases", self.paraphrases), ("neighbours kept", self.neighbours))
        words = [f"{name} {value:.2f}" for name, value in scores if value is not None]
        if self.seconds_per_fact is not None:
            words.append(f"{self.seconds_per_fact:.1f} s a fact")
        if self.kib_per_fact is not None:
            words.append(f"{self.kib_per_fact:,.0f} KiB a fact")
        return ", ".join(words)


@dataclass(frozen=True, slots=True, repr=False)
class MethodCard:
    """What there is to know of one method, or of a line of a method and stages.

    Args:
        name: what users type.
        family: the kind of method, such as ``locate``; of a plugin, its distribution.
        summary: what it does, in a line.
        changes: ``weights``, ``modules`` or ``prompt``.
        abilities: what it can and needs.
        use_when: when to take it.
        reference: the paper.
        variant: what is of its own, where the method follows a paper's idea and not its published form.
        fields: what can be set.
        presets: published set-ups: the fields that each sets, whose it is, and what still differs.
        measured: what it cost and scored; None of methods that are not kecore's own.
        docs: its page.
    """

    name: str
    family: str
    summary: str
    changes: str
    abilities: tuple[str, ...]
    use_when: str
    reference: str
    variant: str
    fields: tuple[ConfigField, ...]
    presets: Mapping[str, Preset]
    measured: Measured | None
    docs: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @property
    def title(self) -> str:
        """The name, with what is of its own behind it where the method is a variant of the published one."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def about(self) -> dict[str, str]:
        """Return everything but fields and presets, as texts by their names."""
        texts = {
            "method": self.title,
            "does": self.summary,
            "use it when": self.use_when,
            "changes": self.changes,
            "can, and needs": ", ".join(self.abilities),
            "measured": "" if self.measured is None else f"{self.measured} (SmolLM2-135M, docs/results.md)",
            "paper": self.reference,
            "docs": self.docs,
        }
        return {name: text for name, text in texts.items() if text}

    def __repr__(self) -> str:
        lines = [f"{name}: {text}" for name, text in self.about().items()]
        lines += [f"  {field.name}: {field.type} = {field.default!r}  {field.bounds}".rstrip() for field in self.fields]
        if self.presets:
            lines.append(f"presets: {', '.join(self.presets)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [(field.name, field.type, field.default, field.bounds, field.meaning) for field in self.fields]
        presets: list[tuple[str, str, str, str]] = []
        for name, preset in self.presets.items():
            fields = ", ".join(f"{key}={value}" for key, value in preset.fields.items())
            presets.append((name, preset.source, fields, " ".join(preset.differs)))
        page = html_table("", ("", ""), list(self.about().items()))
        page += html_table("Fields", ("field", "type", "default", "bounds", "meaning"), rows, most=len(rows))
        return page + (html_table("Presets", ("preset", "source", "sets", "differs"), presets) if presets else "")


class MethodCatalogue(Sequence[MethodCard]):
    """The methods that are installed; by position or by name, ``methods()["memit"]``.

    Args:
        cards: one a method.
    """

    def __init__(self, cards: Iterable[MethodCard]) -> None:
        self._cards = tuple(cards)

    @overload
    def __getitem__(self, index: int | str) -> MethodCard: ...
    @overload
    def __getitem__(self, index: slice) -> MethodCatalogue: ...
    def __getitem__(self, index: int | str | slice) -> MethodCard | MethodCatalogue:
        """Return a method by position or by name, or some of them.

        Raises:
            MethodNotFoundError: no such method.
        """
        if isinstance(index, slice):
            return MethodCatalogue(self._cards[index])
        return methods(index) if isinstance(index, str) else self._cards[index]

    def __len__(self) -> int:
        return len(self._cards)

    def __iter__(self) -> Iterator[MethodCard]:
        return iter(self._cards)

    def families(self) -> dict[str, list[MethodCard]]:
        """Return the methods by family, the family with the most methods first."""
        families: dict[str, list[MethodCard]] = {}
        for card in self._cards:
            families.setdefault(card.family, []).append(card)
        return dict(sorted(families.items(), key=lambda item: (-len(item[1]), item[0])))

    def __repr__(self) -> str:
        width = max((len(card.title) for card in self._cards), default=0)
        lines = [f"{card.title:{width}}  {card.family}: {shorten(card.summary, 80)}" for card in self._cards]
        return "\n".join(lines) or "no methods are installed"

    def _repr_html_(self) -> str:
        rows = [(card.title, card.family, card.summary, card.use_when, card.measured or "") for card in self._cards]
        headers = ("method", "family", "does", "use it when", "measured")
        return html_table(f"{len(rows)} editing methods", headers, rows, most=len(rows))


@overload
def methods(name: None = None) -> MethodCatalogue: ...
@overload
def methods(name: str | type[Any] | MethodLine) -> MethodCard: ...
def methods(name: str | type[Any] | MethodLine | None = None) -> MethodCatalogue | MethodCard:
    """Return what there is to know of the installed methods, or of one.

    Args:
        name: a method, with stages or without (``"memit + blue"``); None for all that can be used.

    Raises:
        MethodNotFoundError: no such method.
        PluginError: it cannot be used.
        ConfigError: the method takes no such stage.

    Examples:
        >>> methods("memit").changes
        'weights'
        >>> methods()["grace"].family
        'memory'
    """
    if name is not None:
        return _make_card(MethodLine.of(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)  # `kecore doctor` says what is wrong with a plugin
        usable = registry.default_registry().all()
    return MethodCatalogue(_make_card(MethodLine.of(usable[name])) for name in sorted(usable))


def abilities(capabilities: Capabilities) -> tuple[str, ...]:
    """Return a method's capabilities in words."""
    words = {
        "many facts at once": capabilities.batch,
        "one fact at a time": not capabilities.batch,
        "edit after edit": capabilities.sequential,
        "reversible": capabilities.reversible,
        "needs key statistics": capabilities.needs_statistics,
        "needs training": capabilities.needs_training,
        "needs examples": capabilities.needs_examples,
        "needs a subject": capabilities.needs_subject,
    }
    return tuple(word for word, holds in words.items() if holds)


def _use_when(capabilities: Capabilities) -> str:
    """Return when to take a method, as far as its capabilities tell."""
    if capabilities.needs_training:
        return "you edit one model again and again, and can train an editor for it once"
    if capabilities.kind == "prompt":
        return "the weights must stay as they are, and what is asked may grow by the facts"
    if capabilities.kind == "modules":
        return "prompts beside the facts must stay untouched, and kecore runs where the model is served"
    if not capabilities.batch:
        return "there are few facts, each with a subject, and a moment for each"
    if capabilities.needs_statistics:
        return "many facts with subjects should hold in any wording, in a checkpoint or an adapter"
    if capabilities.needs_subject:
        return "many facts should be written quickly, without statistics of the model"
    return "facts have no subject, or a baseline is wanted; look at the neighbours' score before you trust it"


def _make_card(line: MethodLine) -> MethodCard:
    method, capabilities = line.method, line.capabilities
    is_ours = method.__module__.partition(".")[0] == f"{HOME}_methods"
    return MethodCard(
        name=line.name,
        family=_family(method, is_ours=is_ours),
        summary=(method.__doc__ or "").strip().partition("\n")[0],
        changes=capabilities.kind,
        abilities=abilities(capabilities),
        use_when=_use_when(capabilities),
        reference=method.reference,
        variant=capabilities.variant,
        fields=tuple(config_fields(method.Config)),
        presets=dict(method.Config.presets()),
        measured=_measured().get(line.name) if is_ours else None,
        docs=f"docs/methods/{method.name}.md" if is_ours else "",
    )


def _family(method: type[EditMethod], *, is_ours: bool) -> str:
    packages = method.__module__.split(".")
    return packages[1] if is_ours else packages[0]


@cache
def _measured() -> dict[str, Measured]:
    values: dict[str, dict[str, float]] = json.loads(data.path(_MEASURED).read_text(encoding="utf-8"))
    return {name: Measured(**numbers) for name, numbers in values.items()}
