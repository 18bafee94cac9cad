"""What a user names where a method is asked for: a method, with or without stages of the user's choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kecore.api import registry
from kecore.api.errors import ConfigError
from kecore.api.external import is_method_file, load_method, method_file
from kecore.api.method import EditMethod, MethodContext
from kecore.api.types import Capabilities

if TYPE_CHECKING:
    from kecore.api.config import MethodConfig
    from kecore.batch import RequestBatch
    from kecore.edit import Edit
    from kecore.model import ModelView
    from kecore.trained import TrainedEditor

__all__ = ["MethodLine", "method_of"]


@dataclass(frozen=True, slots=True)
class MethodLine:
    """A method and the stages that a line such as ``"memit + blue + nas"`` adds to it.

    Args:
        method: the method.
        stages: names of the stages, as they are known, in the order in which they act.
    """

    method: type[EditMethod]
    stages: tuple[str, ...] = ()

    @classmethod
    def of(cls, method: str | type[Any] | MethodLine) -> MethodLine:
        """Return what is meant by a line of text, by a class that need not be installed, or by a line itself.

        A line may begin with a file and a class of it, such as ``"./mine.py:Mine + blue"``.

        Raises:
            MethodNotFoundError: no such method.
            PluginError: the class breaks the contract of a method, or a file has none.
            ConfigError: the method takes no such stage.
        """
        if isinstance(method, MethodLine):
            return method
        if not isinstance(method, str):
            return cls(registry.check_contract(method, getattr(method, "name", method.__name__)))
        name, *stages = (word.strip() for word in method.split("+"))
        method_class = load_method(name) if is_method_file(name) else registry.default_registry().get(name)
        try:
            return cls(method_class, method_class.Config.check_stages(stages))
        except ConfigError as error:
            line = " + ".join([method_class.name, *(stage.casefold() for stage in stages)])
            raise ConfigError(f"method '{line}': {error}") from None

    @property
    def name(self) -> str:
        """What edits, results and a session's memory of the method are filed under."""
        return " + ".join((self.method.name, *self.stages))

    @property
    def capabilities(self) -> Capabilities:
        """What the method can do and needs."""
        return self.method.capabilities

    def make_config(
        self, values: Mapping[str, Any], *, preset: str | None = None, trained: TrainedEditor | None = None
    ) -> MethodConfig:
        """Make the configuration of an edit, with the line's stages in it.

        Args:
            values: the fields that were asked for.
            preset: a published set-up to start from.
            trained: the trained editor that is used; its configuration is the start, and most of it cannot change.

        Raises:
            ConfigError: an unknown preset; or names each bad key, what was expected and what came.
            ArtifactMismatchError: the trained editor was trained with another value of a field.
        """
        config_class = self.method.Config
        if preset:
            values = {**config_class.preset(preset), **values}
        if trained is not None:
            return trained.configure(self.method, values)
        return config_class.make(values).with_stages(self.stages)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> Edit:
        """Let the method work out the edit, which carries the line's name; see :class:`EditMethod`."""
        return self.sign(self.method().plan(view, batch, context))

    def sign(self, edit: Edit) -> Edit:
        """Return an edit that the method planned, under the line's name, with the method's file if it has one."""
        file = method_file(self.method)
        if file is not None:
            edit = replace(edit, notes={**edit.notes, "method_file": file.to_json()})
        return replace(edit, method=self.name) if self.stages else edit


def method_of(line: str) -> type[EditMethod]:
    """Return the method that a line begins with; its stages are not looked up, and need not be installed.

    Raises:
        MethodNotFoundError: no such method.
        PluginError: it cannot be used.
    """
    return registry.default_registry().get(line.partition("+")[0].strip())
