"""The contract between kecore and a named stage, built-in or third-party, and finding the stages that are installed.

A stage is one change of a locate-then-edit method: other values, another spread, an update that is changed before it is
used. Its name goes behind that of any such method, ``"memit + blue"``, or into ``stages`` of its configuration.
``docs/write-a-stage.md`` builds one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kecore.api.errors import ConfigError
from kecore.api.plugins import PluginInfo, Plugins, Rule, check_class, plugin_limits, subclass_rule

if TYPE_CHECKING:
    from kecore.api.config import StageSettings
    from kecore.engine.closed_form import ClosedForm

__all__ = ["STAGES_GROUP", "STAGE_API", "Stage", "StageInfo", "Stages", "check_stage", "installed_stages"]

STAGES_GROUP = "kecore.stages"
"""The entry-point group: ``name = "package.module:Class"``."""

STAGE_API = 1
"""Version of this contract. It rises when a stage written for the old one may break."""


class Stage(Protocol):
    """A change of a locate-then-edit method.

    Attributes:
        name: the name users type; equals the entry-point name.
        Settings: what may be chosen, a :class:`~kecore.api.config.StageSettings`. Users give a field ``kept`` of the
            stage ``rect`` as ``rect_kept``, beside the fields of the method.
        reference: the paper, as ``"Authors, Title, venue year, arXiv:..."``.
        api: lowest and highest :data:`STAGE_API` that the stage is written for.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[StageSettings]]
    reference: ClassVar[str]
    api: ClassVar[tuple[int, int]]

    def apply(self, form: ClosedForm, settings: Any) -> ClosedForm:
        """Return the method's form with this stage in it.

        Args:
            form: the method, with the stages before this one in it.
            settings: an instance of ``Settings``.
        """
        ...


@dataclass(frozen=True, slots=True)
class StageInfo(PluginInfo):
    """What is known of one offered stage, beside the fields of :class:`~kecore.api.plugins.PluginInfo`.

    Args:
        summary: what it does, in a line; empty where the stage cannot be used.
        settings: what users type to set its fields, with a description of each.
        reference: the paper; empty where the stage cannot be used.
    """

    summary: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Stages(Plugins[type[Stage]]):
    """The stages that a set of entry points of the group :data:`STAGES_GROUP` offers.

    A name that nothing offers raises ConfigError.

    Args:
        points: the entry points.
        limits: ``only`` and ``strict`` of :class:`~kecore.api.plugins.Plugins`.
    """

    def __init__(self, points: Iterable[EntryPoint], **limits: Any) -> None:
        super().__init__(points, noun="stage", check=check_stage, missing=ConfigError, **limits)

    def owner_of(self, key: str) -> type[Stage] | None:
        """Return the stage that a key such as ``rect_kept`` sets a field of; None where there is none."""
        # Of two stages "a" and "a-b", the longer name is the closer one.
        for name in sorted(self.names(), key=len, reverse=True):
            if key.startswith(setting_prefix(name)):
                stage = self.get(name)
                if key.removeprefix(setting_prefix(name)) in stage.Settings.model_fields:
                    return stage
        return None

    def describe(self) -> list[StageInfo]:
        """Return what is known of every offer, usable or not, sorted by name; this imports all of them.

        A failure is warned of once and stands in :attr:`StageInfo.error`.
        """
        described: list[StageInfo] = []
        for info, stage in self._described():
            values = asdict(info)
            if stage is not None:
                prefix, entries = setting_prefix(stage.name), stage.Settings.model_fields.items()
                values["settings"] = {prefix + name: entry.description or "" for name, entry in entries}
                values["summary"] = (inspect.getdoc(stage) or "").partition("\n")[0]
                values["reference"] = stage.reference
            described.append(StageInfo(**values))
        return described


@cache
def installed_stages() -> Stages:
    """Return the stages that are installed, read once per process with the environment's limits."""
    return Stages(entry_points(group=STAGES_GROUP), **plugin_limits())


def setting_prefix(name: str) -> str:
    """Return what stands before a stage's fields where users give them: ``"rect_"``."""
    return name.replace("-", "_") + "_"


def check_stage(target: object, name: str, source: str = "") -> type[Stage]:
    """Check a class against the contract of :class:`Stage`.

    Args:
        target: what the entry point leads to.
        name: the entry point's name.
        source: how messages name the stage; by default by ``name``.

    Raises:
        IncompatiblePluginError: the class was written for another :data:`STAGE_API`.
        PluginError: names the first attribute that is not as the contract asks.
    """
    from kecore.api.config import StageSettings  # with pydantic, a third of the time to import kecore

    rules = {
        "Settings": subclass_rule(StageSettings),
        "apply": Rule("a function apply(self, form, settings)", callable),
    }
    source = source or f"stage '{name}'"
    return check_class(target, name, source, contract="STAGE_API", version=STAGE_API, rules=rules)
