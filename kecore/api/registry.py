"""Finding plugins: built-in and third-party ones stand behind the same entry-point groups.

Discovery reads package metadata only. A plugin is imported when it is first asked for, and one that cannot
be imported, or breaks its contract (that of :mod:`kecore.api.method` for editing methods), never stands in the
way of another.

Environment:
    KECORE_PLUGINS: distributions, separated by commas, that may offer plugins beside kecore itself.
        Unset: all that are installed. Empty: kecore's own only.
    KECORE_STRICT_PLUGINS: ``1`` imports every plugin of a kind at once and raises the first failure.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from kecore.api.errors import (
    IncompatiblePluginError,
    KecoreError,
    KecoreWarning,
    MethodNotFoundError,
    PluginError,
)
from kecore.api.method import METHOD_API, EditMethod
from kecore.api.types import Capabilities, EditKind

__all__ = [
    "GROUP",
    "MethodInfo",
    "PluginInfo",
    "Plugins",
    "Registry",
    "check_contract",
    "default_registry",
    "plugin_limits",
]

GROUP = "kecore.methods"
"""The entry-point group: ``name = "package.module:Class"``."""

HOME = "kecore"
"""The distribution whose names nobody else can take."""

Found = TypeVar("Found")


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
class MethodInfo(PluginInfo):
    """What is known of one offered method, beside the fields of :class:`PluginInfo`.

    Args:
        capabilities: None where the method cannot be used.
        reference: the paper; empty where the method cannot be used.
        origin: ``"file:line"`` of the class; empty where it is not known.
    """

    capabilities: Capabilities | None = None
    reference: str = ""
    origin: str = ""

    @property
    def kind(self) -> EditKind | None:
        """What the method's edits change."""
        return self.capabilities.kind if self.capabilities else None

    def to_json(self) -> dict[str, Any]:
        """The fields and ``kind`` as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.capabilities is not None:
            flags = {field.name: getattr(self.capabilities, field.name) for field in fields(Capabilities)}
            values["capabilities"] = {**flags, "dtypes": list(self.capabilities.dtypes)}
        return {**values, "kind": self.kind}


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


class Plugins(Generic[Found]):
    """What a set of entry points offers.

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
        check: Callable[[object, str, str], Found],
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
            table = self._offers if admitted else self._excluded
            table.setdefault(_key(offer.name), []).append(offer)
        self._outcomes: dict[_Offer, Found | PluginError] = {}
        self._warned: set[_Offer] = set()
        if strict:
            for offer in self._all():
                self._load(offer)

    def names(self) -> list[str]:
        """Names that can be asked for, sorted; nothing is imported, so some may turn out broken."""
        return [offers[0].name for _, offers in sorted(self._offers.items())]

    def __contains__(self, name: str) -> bool:
        """Whether a plugin of that name is installed, be it broken or excluded; nothing is imported."""
        return _key(name) in self._offers or _key(name) in self._excluded

    def get(self, name: str) -> Found:
        """The plugin of that name; letter case and the choice of ``-`` or ``_`` do not matter.

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

    def all(self) -> dict[str, Found]:
        """Every plugin that can be used, by name, kecore's own first; this imports all of them.

        A failure is warned of once.
        """
        found: dict[str, Found] = {}
        for offer in sorted(self._all(), key=lambda o: not o.built_in):
            try:
                found[offer.name] = self._load(offer)
            except PluginError as error:
                self._warn_once(offer, str(error))
        return found

    def describe(self) -> Sequence[PluginInfo]:
        """Every offer, usable or not, sorted by name; this imports all of them.

        A failure is warned of once and stands in :attr:`PluginInfo.error`.
        """
        return [self._describe(offer)[0] for offer in self._all()]

    def _describe(self, offer: _Offer) -> tuple[PluginInfo, Found | None]:
        """What is known of an offer, and the plugin itself where it can be used."""
        facts = (offer.name, offer.distribution, offer.version, offer.point.value)
        try:
            return PluginInfo(*facts), self._load(offer)
        except PluginError as error:
            self._warn_once(offer, str(error))
            return PluginInfo(*facts, error=str(error)), None

    def _all(self) -> list[_Offer]:
        return [offer for _, offers in sorted(self._offers.items()) for offer in offers]

    def _load(self, offer: _Offer) -> Found:
        outcome = self._outcomes.get(offer)
        if outcome is None:
            try:
                if refusal := self._refusal(offer):
                    raise PluginError(refusal)
                outcome = self._imported(offer)
            except PluginError as error:
                outcome = error
            self._outcomes[offer] = outcome
        if isinstance(outcome, PluginError):
            # Raised anew each time: without this the stored exception would collect tracebacks.
            raise outcome.with_traceback(None)
        return outcome

    def _imported(self, offer: _Offer) -> Found:
        source = f"{self._noun} '{offer.name}' of {offer.distribution or 'an unknown distribution'}"
        try:
            found: Any = offer.point.load()
        except Exception as error:  # a stranger's module may raise anything at import
            raise PluginError(
                f"{source} cannot be imported from {offer.point.value}: {type(error).__name__}: {error}; "
                f"repair or uninstall {offer.distribution or 'it'}"
            ) from error
        return self._check(found, offer.name, source)

    def _refusal(self, offer: _Offer) -> str:
        """Why this offer cannot have its name; empty where it can."""
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
        """The message for a name that nothing offers."""
        if shut_out := self._excluded.get(_key(name)):
            return (
                f"{self._noun} '{name}' is installed by {shut_out[0].distribution}, which KECORE_PLUGINS excludes; "
                f"add {shut_out[0].distribution} to KECORE_PLUGINS, or unset it"
            )
        if not self._offers:
            return (
                f"no {self._noun} '{name}': none are installed at all; install kecore with pip, "
                "so that its entry points are registered (from a checkout: pip install -e .)"
            )
        near = get_close_matches(_key(name), list(self._offers), n=3)
        hint = f"did you mean {' or '.join(repr(self._offers[k][0].name) for k in near)}? " if near else ""
        return f"no {self._noun} '{name}'; {hint}installed: {', '.join(self.names())}"


class Registry(Plugins[type[EditMethod]]):
    """The editing methods that a set of entry points of the group :data:`GROUP` offers.

    A name that nothing offers raises MethodNotFoundError. What a line such as ``"alphaedit + blue + nas"`` means
    is read by :class:`kecore.api.line.MethodLine`.

    Args:
        points: the entry points.
        only: as in :class:`Plugins`.
        strict: as in :class:`Plugins`.
    """

    def __init__(
        self, points: Iterable[EntryPoint], *, only: Iterable[str] | None = None, strict: bool = False
    ) -> None:
        super().__init__(
            points, noun="method", check=check_contract, missing=MethodNotFoundError, only=only, strict=strict
        )

    def describe(self) -> list[MethodInfo]:
        """Every offer, usable or not, sorted by name; this imports all of them.

        A failure is warned of once and stands in :attr:`MethodInfo.error`.
        """
        described: list[MethodInfo] = []
        for info, method in (self._describe(offer) for offer in self._all()):
            values = asdict(info)
            if method is not None:
                values |= {"capabilities": method.capabilities, "reference": method.reference}
                values["origin"] = _origin(method)
            described.append(MethodInfo(**values))
        return described


@cache
def default_registry() -> Registry:
    """The registry of what is installed, read once per process with the environment's limits."""
    return Registry(entry_points(group=GROUP), **plugin_limits())


def plugin_limits() -> dict[str, Any]:
    """The arguments ``only`` and ``strict`` of :class:`Plugins`, as the environment sets them."""
    limit = os.environ.get("KECORE_PLUGINS")
    return {
        "only": None if limit is None else [name for name in re.split(r"[,\s]+", limit) if name],
        "strict": os.environ.get("KECORE_STRICT_PLUGINS", "") not in ("", "0"),
    }


def check_contract(found: object, name: str, source: str = "") -> type[EditMethod]:
    """Check a class against the contract of :class:`~kecore.api.method.EditMethod`.

    Args:
        found: what the entry point leads to.
        name: the entry point's name.
        source: how messages name the method; by default by ``name``.

    Raises:
        IncompatiblePluginError: the class was written for another :data:`~kecore.api.method.METHOD_API`.
        PluginError: names the first attribute that is not as the contract asks.
    """
    from kecore.api.config import MethodConfig  # with pydantic, a third of the time to import kecore

    source = source or f"method '{name}'"
    if not isinstance(found, type):
        raise PluginError(f"{source}: the entry point must lead to a class, got {found!r}")
    _check_api(getattr(found, "api", None), source)
    attributes: dict[str, Any] = {
        key: getattr(found, key, None) for key in ("name", "Config", "capabilities", "reference", "plan")
    }
    config, reference = attributes["Config"], attributes["reference"]
    rules = {
        "name": (attributes["name"] == name, f"the entry point's name {name!r}"),
        "Config": (isinstance(config, type) and issubclass(config, MethodConfig), "a MethodConfig subclass"),
        "capabilities": (isinstance(attributes["capabilities"], Capabilities), "a Capabilities object"),
        "reference": (isinstance(reference, str) and reference.strip() != "", "the paper as text, not empty"),
        "plan": (callable(attributes["plan"]), "a function plan(self, view, batch, context)"),
    }
    for key, (fulfilled, expected) in rules.items():
        if not fulfilled:
            got = f"got {attributes[key]!r}" if hasattr(found, key) else "it is missing"
            raise PluginError(f"{source}: {found.__qualname__}.{key} must be {expected}; {got}")
    return cast(type[EditMethod], found)


def _check_api(api: object, source: str) -> None:
    match api:
        case (int(low), int(high)) if low <= high:
            pass
        case _:
            raise PluginError(
                f"{source}: api must be the lowest and highest METHOD_API that it is written for, such as "
                f"({METHOD_API}, {METHOD_API}); got {api!r}"
            )
    if not low <= METHOD_API <= high:
        remedy = "update the plugin" if high < METHOD_API else "update kecore"
        raise IncompatiblePluginError(
            f"{source} is written for METHOD_API {low} to {high}, this kecore has {METHOD_API}; {remedy}"
        )


def _key(name: str) -> str:
    """Names are compared without letter case and with ``-`` for ``_``."""
    return name.strip().casefold().replace("_", "-")


def _canonical(distribution: str) -> str:
    """A distribution's name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", distribution).casefold()


def _origin(method: type) -> str:
    try:
        return f"{inspect.getsourcefile(method)}:{inspect.getsourcelines(method)[1]}"
    except (OSError, TypeError):  # no source: compiled, or typed into an interpreter
        return ""
