"""Plans of benchmarks: methods, models, data sets and sizes, from a YAML file or from flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kecore.api.config import validate_config
from kecore.api.errors import ConfigError, DataFormatError, MissingDependencyError
from kecore.evaluate.protocol import Protocol
from kecore.hparams import read_hparams
from kecore_bench.published import PaperTable, unmeasured

__all__ = ["BASELINES", "UNEDITED", "BenchPlan", "DataEntry", "HeldOutEntry", "MethodEntry", "read_plan"]

UNEDITED = "unedited"
"""The label of the model as it is, and the name to leave its row out by."""

BASELINES = ("ice", "retrieval", "ft-m", "lora")
"""Methods that stand in every table beside the unedited model: the fact in the prompt, the fact looked up, and
fine-tuning of one layer or of an adapter. A method that does no better is not worth its cost."""

_STRICT = ConfigDict(frozen=True, extra="forbid")


class MethodEntry(BaseModel):
    """A method as a benchmark runs it."""

    model_config = _STRICT

    name: str = Field(description="name of an installed method")
    label: str = Field(default="", description="its name in tables; by default name, preset and settings")
    preset: str | None = Field(default=None, description="a published set-up to start from")
    hparams: Path | None = Field(
        default=None, description="a hyper-parameter file of another tool to start from, which also gives the name"
    )
    set: Mapping[str, Any] = Field(default_factory=dict, description="fields of the method's configuration")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and value.get("hparams") is not None and value.get("name") is None:
            return {**value, "name": read_hparams(value["hparams"]).method}
        return value

    @model_validator(mode="after")
    def _one_start(self) -> MethodEntry:
        if self.preset and self.hparams:
            raise ValueError(f"'{self.name}' has a preset and a file of hparams; both set the same fields")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the configuration beside the preset's: those of the file, and those that were set."""
        of_file = {} if self.hparams is None else read_hparams(self.hparams, self.name).fields
        return {**of_file, **self.set}

    @property
    def title(self) -> str:
        """Name of the method in tables."""
        if self.label:
            return self.label
        words = [self.name]
        if self.preset:
            words.append(self.preset)
        if self.hparams:
            words.append(self.hparams.name)
        words += [f"{key}={value}" for key, value in self.set.items()]
        return " ".join(words)


class DataEntry(BaseModel):
    """A data set as a benchmark reads it."""

    model_config = _STRICT

    path: str = Field(description="what `--facts` takes")
    format: str | None = Field(default=None, description="layout, if its content does not tell")
    split: str | None = Field(default=None, description="of a folder or a hub data set")
    variant: str | None = Field(default=None, description="how records are edited, for layouts that offer several ways")
    sha256: str | None = Field(default=None, description="what the digest must be, or how it begins")
    map: Mapping[str, str] | None = Field(
        default=None, description="field of a fact to the file's field that holds it, as --map says"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"path": str(value)} if isinstance(value, str | Path) else value


class HeldOutEntry(BaseModel):
    """Text that a model reads while a sequence of edits grows."""

    model_config = _STRICT

    text: tuple[str, ...] = Field(
        default=(), description="files or hub data sets; kecore's sample of Wikipedia where none is given"
    )
    passages: int = Field(default=32, ge=2, description="passages that are drawn from it")
    window: int = Field(default=128, ge=2, description="most tokens of a passage")

    @field_validator("text", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class BenchPlan(BaseModel):
    """Everything that a benchmark runs: methods x models x data sets x sizes, by one protocol.

    Examples:
        >>> plan = BenchPlan.make({"models": ["demo"], "methods": ["memit"], "facts": ["facts.jsonl"]})
        >>> [entry.title for entry in plan.rows]
        ['memit', 'ice', 'retrieval', 'ft-m', 'lora']
    """

    model_config = _STRICT

    models: tuple[str, ...] = Field(min_length=1, description="what MODEL is elsewhere")
    methods: tuple[MethodEntry, ...] = Field(default=(), description="methods to compare")
    facts: tuple[DataEntry, ...] = Field(min_length=1, description="data sets")
    sizes: tuple[int, ...] = Field(default=(), description="numbers of records; all of them where none is given")
    protocol: Protocol = Field(default=Protocol(), description="what is edited, and how scores are taken")
    without: tuple[str, ...] = Field(default=(), description="baselines to leave out, by name")
    text: tuple[str, ...] = Field(default=(), description="natural text for key statistics")
    tokens: int | None = Field(default=None, ge=1, description="tokens to collect key statistics from")
    stats: Path | None = Field(default=None, description="key statistics made by `kecore stats`")
    trained: tuple[Path, ...] = Field(default=(), description="editors trained by `kecore train`")
    examples: DataEntry | None = Field(default=None, description="facts that demonstrations are taken from")
    examples_apart: bool = Field(
        default=False,
        description="leave out examples that share a prompt with what is edited or asked; IKE's release has them",
    )
    references: Path | None = Field(
        default=None, description="CounterFact's attribute_snippets.json: texts about the targets, for consistency"
    )
    held_out: HeldOutEntry | None = Field(
        default=None, description="text that is read again and again along a sequence: perplexity, and next words"
    )
    published: tuple[PaperTable, ...] = Field(default=(), description="figures of papers, to stand beside the runs'")
    edit: Path | None = Field(default=None, description="an edit that was made before, to be scored as it is")
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    memory: int | None = Field(default=None, description="most bytes that one process may hold")

    @field_validator("models", "methods", "facts", "text", "trained", "without", "sizes", "published", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | Path | Mapping) else value

    @field_validator("sizes")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in value):
            raise ValueError("sizes are at least 1")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> BenchPlan:
        unknown = set(self.without) - {UNEDITED, *BASELINES}
        if unknown:
            known = ", ".join((UNEDITED, *BASELINES))
            raise ValueError(f"'without' names {', '.join(sorted(unknown))}, which is no baseline; those are {known}")
        titles = [entry.title for entry in self.rows]
        if len(set(titles)) < len(titles):
            raise ValueError(f"two methods have the same label among {', '.join(titles)}; give one a label of its own")
        if self.edit is not None and self.protocol.edits != "batch":
            raise ValueError("an edit that was made before is scored as it is; leave 'edits' at batch")
        if self.held_out is not None and self.protocol.edits != "sequential":
            raise ValueError("'held_out' is read along a sequence; leave it out, or set protocol: edits: sequential")
        if self.published:
            self._check_published()
        if self.references is not None:
            self._check_references()
        return self

    def _check_references(self) -> None:
        """Refuse texts that nothing is compared with: they would tell two runs apart that are alike."""
        from kecore.evaluate.metrics import metrics_of

        if all(metric.kind != "generation" for metric in metrics_of(self.protocol)):
            raise ValueError(
                "'references' are compared with passages; take the metric too, protocol: extra: [consistency]"
            )

    def _check_published(self) -> None:
        """Refuse figures that this protocol takes no counterpart of: a misspelt name would be an empty column."""
        from kecore.evaluate.metrics import metrics_of

        measured = [metric.key for metric in metrics_of(self.protocol)] + ["score"]
        unknown = unmeasured(self.published, measured)
        if unknown:
            raise ValueError(
                f"'published' names {', '.join(unknown)}, which this protocol does not measure; it measures "
                f"{', '.join(measured)}, and further metric families where protocol: extra names them"
            )

    @property
    def rows(self) -> tuple[MethodEntry, ...]:
        """The methods, then the baselines that are not among them."""
        if self.edit is not None and not self.methods:
            return ()
        left_out = {*self.without, *(entry.name for entry in self.methods)}
        baselines = [MethodEntry(name=name) for name in BASELINES if name not in left_out]
        return (*self.methods, *baselines)

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> BenchPlan:
        """Make a plan of values such as a file holds.

        Raises:
            ConfigError: names each bad key, what was expected and what came.
        """
        return validate_config(cls, values)


def read_plan(path: Path) -> dict[str, Any]:
    """Return the fields of a plan's YAML file, unchecked, for :meth:`BenchPlan.make`.

    Raises:
        DataFormatError: the file cannot be read, or is no YAML.
        ConfigError: it does not hold fields.
        MissingDependencyError: there is no reader of YAML.
    """
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError("plans are read by PyYAML, which is not installed: pip install pyyaml") from None
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataFormatError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected fields such as 'models' and 'methods', got {type(fields).__name__}")
    return {str(name): value for name, value in fields.items()}
