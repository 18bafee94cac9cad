"""Configuration of a method: a frozen pydantic model that knows its bounds and travels with the edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kecore.api.errors import ConfigError

if TYPE_CHECKING:
    from kecore.api.hparams import Translation
    from kecore.batch import RequestBatch
    from kecore.memory import Need
    from kecore.model import ModelView

__all__ = ["MethodConfig", "StageSettings", "validate_config"]

_NO_STAGES = (
    "stages change the layers, the values or the update that a locate-then-edit method works out from the keys it "
    "fits, and this method fits none"
)

C = TypeVar("C", bound="MethodConfig")
M = TypeVar("M", bound=BaseModel)


def validate_config(cls: type[M], values: Mapping[str, Any]) -> M:
    """Make a pydantic model of values.

    Raises:
        ConfigError: names each bad key, what was expected and what came.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        lines: list[str] = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"])) or "(config)"
            if item["type"] == "extra_forbidden":
                why = f" ({_NO_STAGES})" if key == "stages" else ""
                known = _known_keys(cls)
                near = get_close_matches(key, known, n=1) if not why else []
                hint = f"did you mean '{near[0]}'? " if near else ""
                lines.append(f"unknown key '{key}'{why}; {hint}known: {', '.join(known)}")
            elif item["type"] == "missing":  # what "came" is all the other fields
                lines.append(f"'{key}' is missing")
            else:
                lines.append(f"'{key}': {item['msg']}, got {item['input']!r}")
        raise ConfigError(f"bad configuration for {cls.__qualname__}: " + "; ".join(lines)) from None


def _known_keys(cls: type[BaseModel]) -> list[str]:
    return cls.known_keys() if issubclass(cls, MethodConfig) else sorted(cls.model_fields)


class StageSettings(BaseModel):
    """Base of every stage's ``Settings``: frozen, unknown keys refused, each field described and bounded.

    A stage without settings takes this class itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What tells a model apart from others by structure.

    Args:
        layers: decoder layers.
        width: of the residual stream.
        vocabulary: rows of the output matrix.
    """

    layers: int
    width: int
    vocabulary: int

    @classmethod
    def of(cls, view: ModelView) -> ModelShape:
        """Return the shape of a model."""
        model: Any = view.model
        return cls(len(view.layers), view.width, model.get_output_embeddings().weight.shape[0])

    @classmethod
    def of_config(cls, config: Any) -> ModelShape:
        """Return the shape that a transformers configuration tells, by the names that all of them answer to."""
        text = config.get_text_config()
        return cls(text.num_hidden_layers, text.hidden_size, text.vocab_size)


@dataclass(frozen=True, slots=True)
class Preset:
    """A published set-up of a method.

    Args:
        fields: values of the configuration's fields.
        source: the paper or released file that they are from.
        differs: what still differs from the procedure of the source, a sentence each.
        model: the model that they were published for; None where the source names none.
    """

    fields: Mapping[str, Any]
    source: str
    differs: tuple[str, ...] = ()
    model: ModelShape | None = None


class MethodConfig(BaseModel):
    """Base of every method's ``Config``: frozen, unknown keys refused, each field described and bounded.

    ``version`` counts incompatible changes of the fields; a subclass that raises it overrides
    :meth:`upgrade`, so that old edits keep loading.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    version: ClassVar[int] = 1

    free: ClassVar[frozenset[str]] = frozenset()
    """Fields that an edit may set otherwise than the training of its method had them; see docs/train.md."""

    @classmethod
    def make(cls: type[C], values: Mapping[str, Any]) -> C:
        """Validate ``values``.

        Raises:
            ConfigError: names each bad key, what was expected and what came.
        """
        return validate_config(cls, values)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return published set-ups by name; none unless a method brings some."""
        return {}

    @classmethod
    def preset(cls, name: str) -> Mapping[str, Any]:
        """Return the fields of one preset.

        Raises:
            ConfigError: there is no such preset; names those there are.
        """
        known = cls.presets()
        if name not in known:
            raise ConfigError(f"unknown preset '{name}'; known: {', '.join(sorted(known)) or 'none'}")
        return known[name].fields

    @classmethod
    def read_hparams(cls, algorithm: str | None, values: Mapping[str, Any]) -> Translation | None:
        """Read the values of a hyper-parameter file of another tool; None if it is not for this method.

        Args:
            algorithm: what the file calls its algorithm; None takes the file as one for this method.
            values: its values; keys of nested ones are joined by dots.
        """
        return None

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return all keys that :meth:`make` may be given, sorted."""
        return sorted(cls.model_fields)

    @classmethod
    def check_stages(cls, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of stages that ``"memit + blue + nas"`` adds to the method, as they are known.

        Raises:
            ConfigError: the method has no stages, no such one, or has it already; the base has none.
        """
        if names:
            raise ConfigError(f"no stage can be added, got {', '.join(map(repr, names))}: {_NO_STAGES}")
        return ()

    def with_stages(self: C, names: Sequence[str]) -> C:
        """Return this configuration with the stages of a line; they act after the method's own and are no field.

        Raises:
            ConfigError: as :meth:`check_stages`, or the configuration names a stage already.
        """
        self.check_stages(names)
        return self

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Turn the fields of an older ``version`` into today's; the default knows no older version."""
        if version != cls.version:
            raise ConfigError(
                f"{cls.__qualname__} is at version {cls.version} and cannot read version {version}; "
                "install the kecore release that wrote the edit"
            )
        return values

    def check_installed(self) -> None:
        """Refuse what an edit with this configuration would miss: packages of an extra, a sentence encoder.

        Nothing unless a method says. Asked before a model is loaded and before anything is computed, so it imports or
        loads what the edit will use anyway.

        Raises:
            MissingDependencyError: names the extra that brings what is not installed.
            ModelLoadError: a sentence encoder cannot be loaded.
        """

    def statistics_layers(self, view: ModelView) -> tuple[int, ...]:
        """Return the layers whose key statistics an edit with this configuration reads, ascending.

        Every layer unless a method says; asked only of a method whose capabilities need statistics.
        """
        return tuple(layer.index for layer in view.layers)

    def needs(self, view: ModelView, batch: RequestBatch) -> Sequence[Need]:
        """Return what the method's stages will take in memory, so that micro-batches are sized and a budget is kept.

        None unless a method says: an edit then gets all that a budget leaves.
        """
        return ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return self.model_dump(mode="json")
