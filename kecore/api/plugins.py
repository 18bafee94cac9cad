"""Finds plugins of whatever kind: built-in and third-party ones stand behind the same entry-point groups.

Discovery reads package metadata only. A plugin is imported when it is first asked for, and one that cannot be imported,
or breaks its contract, never stands in the way of another.

Environment:
    KECORE_PLUGINS: distributions, separated by commas, that may offer plugins beside kecore itself.
        Unset: all that are installed. Empty: kecore's own only.
    KECORE_STRICT_PLUGINS: ``1`` imports every plugin of a kind at once and raises the first failure.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from itertools import chain
from typing import Any, Generic, TypeVar

from kecore.api.errors import IncompatiblePluginError, KecoreError, KecoreWarning, PluginError

__all__ = [
    "PluginInfo",
    "Plugins",
    "Rule",
    "check_class",
    "plugin_limits",
    "subclass_rule",
]

HOME = "kecore"
"""The distribution whose names nobody else can take."""

Plugin = TypeVar("Plugin")


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """What is known of one offered plugin.

    Args:
        name: what users type.
        distribution: the installed package that offers it; empty if unknown.
        version: that package's version.
        target: the entry point's value, ``"module:object"``.
        error: why the plugin cannot be used; empty where it can.
    """

    name: str
    distribution: str
    version: str
    target: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Offer:
    """A plugin that a distribution advertises, before anything of it is imported."""

    name: str
    distribution: str
    version: str
    point: EntryPoint

    @classmethod
    def of(cls, point: EntryPoint) -> _Offer:
        if point.dist is None:
            return cls(point.name, "", "", point)
        return cls(point.name, point.dist.name, point.dist.version, point)

    @property
    def built_in(self) -> bool:
        return _canonical(self.distribution) == HOME


class Plugins(Generic[Plugin]):
    """The plugins that a set of entry points offers.

    Args:
        points: entry points of one group.
        noun: what one plugin of the group is called in messages.
        check: turns what an entry point leads to into what is handed out, called with the object, the entry
            point's name, and words that name the plugin; raises PluginError where the contract is broken.
        missing: the error for a name that nothing offers.
        only: distributions that may offer plugins beside kecore; None for all.
        strict: import every plugin now and raise the first failure.
        reserved: names that are kecore's own without a plugin behind them, so that no plugin can take them.

    Raises:
        PluginError: ``strict``, and some plugin cannot be used.
    """

    def __init__(
        self,
        points: Iterable[EntryPoint],
        *,
        noun: str,
        check: Callable[[object, str, str], Plugin],
        missing: type[KecoreError],
        only: Iterable[str] | None = None,
        strict: bool = False,
        reserved: Iterable[str] = (),
    ) -> None:
        self._reserved = {_key(name) for name in reserved}
        self._noun, self._check, self._missing = noun, check, missing
        allowed = None if only is None else {_canonical(name) for name in only}
        self._offers: dict[str, list[_Offer]] = {}
        self._excluded: dict[str, list[_Offer]] = {}
        for offer in sorted(map(_Offer.of, points), key=lambda o: (o.name, not o.built_in, o.distribution)):
            admitted = allowed is None or offer.built_in or _canonical(offer.distribution) in allowed
            offers = self._offers if admitted else self._excluded
            offers.setdefault(_key(offer.name), []).append(offer)
        self._outcomes: dict[_Offer, Plugin | PluginError] = {}
        self._warned: set[_Offer] = set()
        if strict:
            for offer in self._all():
                self._load(offer)

    def names(self) -> list[str]:
        """Return the names that can be asked for, sorted; nothing is imported, so some may turn out broken."""
        return [offers[0].name for _, offers in sorted(self._offers.items())]

    def __contains__(self, name: str) -> bool:
        """Return whether a plugin of that name is installed, be it broken or excluded; nothing is imported."""
        return _key(name) in self._offers or _key(name) in self._excluded

    def get(self, name: str) -> Plugin:
        """Return the plugin of a name; letter case and the choice of ``-`` or ``_`` do not matter.

        Raises:
            KecoreError: of the class ``missing``: nothing of that name is installed; suggests near names.
            PluginError: it cannot be imported, breaks the contract, or two distributions claim the name.
            IncompatiblePluginError: it was written for another version of the contract.
        """
        offers = self._offers.get(_key(name))
        if offers is None:
            raise self._missing(self._unknown(name))
        for refused in offers[1:]:
            if offers[0].built_in:
                self._warn_once(refused, self._refusal(refused))
        return self._load(offers[0])

    def all(self) -> dict[str, Plugin]:
        """Return every plugin that can be used, by name, kecore's own first; this imports all of them.

        A failure is warned of once.
        """
        plugins: dict[str, Plugin] = {}
        for offer in sorted(self._all(), key=lambda o: not o.built_in):
            try:
                plugins[offer.name] = self._load(offer)
            except PluginError as error:
                self._warn_once(offer, str(error))
        return plugins

    def describe(self) -> Sequence[PluginInfo]:
        """Return what is known of every offer, usable or not, sorted by name; this imports all of them.

        A failure is warned of once and stands in :attr:`PluginInfo.error`.
        """
        return [info for info, _ in self._described()]

    def _described(self) -> Iterator[tuple[PluginInfo, Plugin | None]]:
        """Yield what is known of each offer, and the plugin itself where it can be used."""
        for offer in self._all():
            info = PluginInfo(offer.name, offer.distribution, offer.version, offer.point.value)
            try:
                yield info, self._load(offer)
            except PluginError as error:
                self._warn_once(offer, str(error))
                yield replace(info, error=str(error)), None

    def _all(self) -> list[_Offer]:
        return list(chain.from_iterable(offers for _, offers in sorted(self._offers.items())))

    def _load(self, offer: _Offer) -> Plugin:
        outcome = self._outcomes.get(offer)
        if outcome is None:
            try:
                if refusal := self._refusal(offer):
                    raise PluginError(refusal)
                outcome = self._import(offer)
            except PluginError as error:
                outcome = error
            self._outcomes[offer] = outcome
        if isinstance(outcome, PluginError):
            # Raised anew each time: without this the stored exception would collect tracebacks.
            raise outcome.with_traceback(None)
        return outcome

    def _import(self, offer: _Offer) -> Plugin:
        source = f"{self._noun} '{offer.name}' of {offer.distribution or 'an unknown distribution'}"
        try:
            target: Any = offer.point.load()
        except Exception as error:  # a stranger's module may raise anything at import
            raise PluginError(
                f"{source} cannot be imported from {offer.point.value}: {type(error).__name__}: {error}; "
                f"repair or uninstall {offer.distribution or 'it'}"
            ) from error
        return self._check(target, offer.name, source)

    def _refusal(self, offer: _Offer) -> str:
        """Return why this offer cannot have its name; empty where it can."""
        if _key(offer.name) in self._reserved:
            return self._taken(offer)
        for rival in self._offers[_key(offer.name)]:
            if rival is offer or (offer.built_in and not rival.built_in):
                continue
            if rival.built_in and not offer.built_in:
                return self._taken(offer)
            return (
                f"{self._noun} '{offer.name}' is offered by both {offer.distribution} ({offer.point.value}) and "
                f"{rival.distribution} ({rival.point.value}); uninstall one, or name the one you want in "
                "KECORE_PLUGINS"
            )
        return ""

    def _taken(self, offer: _Offer) -> str:
        return (
            f"{offer.distribution} offers a {self._noun} '{offer.name}', but that name belongs to kecore; "
            f"kecore's is used, and {offer.distribution} must choose another name"
        )

    def _warn_once(self, offer: _Offer, message: str) -> None:
        if offer not in self._warned:
            self._warned.add(offer)
            warnings.warn(message, KecoreWarning, stacklevel=3)

    def _unknown(self, name: str) -> str:
        """Return the message for a name that nothing offers."""
        if excluded := self._excluded.get(_key(name)):
            distribution = excluded[0].distribution
            return (
                f"{self._noun} '{name}' is installed by {distribution}, which KECORE_PLUGINS excludes; add "
                f"{distribution} to KECORE_PLUGINS, or unset it"
            )
        if not self._offers:
            return (
                f"no {self._noun} '{name}': none are installed at all; install kecore with pip, "
                "so that its entry points are registered (from a checkout: pip install -e .)"
            )
        near = get_close_matches(_key(name), list(self._offers), n=3)
        hint = f"did you mean {' or '.join(repr(self._offers[k][0].name) for k in near)}? " if near else ""
        return f"no {self._noun} '{name}'; {hint}installed: {', '.join(self.names())}"


def plugin_limits() -> dict[str, Any]:
    """Return the arguments ``only`` and ``strict`` of :class:`Plugins`, as the environment sets them."""
    limit = os.environ.get("KECORE_PLUGINS")
    return {
        "only": None if limit is None else [name for name in re.split(r"[,\s]+", limit) if name],
        "strict": os.environ.get("KECORE_STRICT_PLUGINS", "") not in ("", "0"),
    }


@dataclass(frozen=True, slots=True)
class Rule:
    """What a contract asks of one attribute of a class.

    Args:
        expected: what the attribute must be, in words.
        holds: whether a value is that; called with None where the attribute is missing.
    """

    expected: str
    holds: Callable[[Any], bool]


def subclass_rule(base: type) -> Rule:
    """Return the rule of an attribute that is a class derived from ``base``."""
    return Rule(f"a {base.__name__} subclass", lambda value: isinstance(value, type) and issubclass(value, base))


def check_class(
    target: object, name: str, source: str, *, contract: str, version: int, rules: Mapping[str, Rule]
) -> type[Any]:
    """Check the class of a plugin against a contract.

    Args:
        target: what the entry point leads to.
        name: the entry point's name, which the class must repeat.
        source: words that name the plugin, for messages.
        contract: the contract's name, such as ``METHOD_API``; ``api`` says for which versions the class is.
        version: the contract's version.
        rules: what the contract asks of each attribute beside ``api``, ``name`` and ``reference``, which all have.

    Raises:
        IncompatiblePluginError: the class was written for other versions of the contract.
        PluginError: it is no class; or names the first attribute that is not as the contract asks.
    """
    if not isinstance(target, type):
        raise PluginError(f"{source}: the entry point must lead to a class, got {target!r}")
    match getattr(target, "api", None):
        case (int(low), int(high)) if low <= high:
            pass
        case api:
            raise PluginError(
                f"{source}: api must be the lowest and highest {contract} that it is written for, such as "
                f"({version}, {version}); got {api!r}"
            )
    if not low <= version <= high:
        remedy = "update the plugin" if high < version else "update kecore"
        raise IncompatiblePluginError(
            f"{source} is written for {contract} {low} to {high}, this kecore has {version}; {remedy}"
        )
    common_rules = {
        "name": Rule(f"the entry point's name {name!r}", lambda value: value == name),
        "reference": Rule("the paper as text, not empty", lambda value: isinstance(value, str) and bool(value.strip())),
    }
    for attribute, rule in {**common_rules, **rules}.items():
        value = getattr(target, attribute, None)
        if not rule.holds(value):
            got = f"got {value!r}" if hasattr(target, attribute) else "it is missing"
            raise PluginError(f"{source}: {target.__qualname__}.{attribute} must be {rule.expected}; {got}")
    return target


def _key(name: str) -> str:
    """Return a name as names are compared: without letter case and with ``-`` for ``_``."""
    return name.strip().casefold().replace("_", "-")


def _canonical(distribution: str) -> str:
    """Return a distribution's name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", distribution).casefold()
