"""What a hyper-parameter file of another editing tool says, key by key, in the fields of a method here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Hparams", "HparamsRow", "Outcome", "Translation"]

Outcome = Literal["taken", "same", "elsewhere", "unused", "differs", "missing", "unknown"]
"""What becomes of a key.

========= ===================================================================
taken     it sets fields
same      kecore does that anyway, or finds it by the model's structure
elsewhere it is said in another place: by MODEL, --device, --stats, ...
unused    the released code reads it nowhere, or not for editing
differs   it has an effect there that kecore cannot give
missing   kecore has nothing of the kind
unknown   the key belongs to no file of this algorithm that is known
========= ===================================================================
"""


@dataclass(frozen=True, slots=True)
class HparamsRow:
    """What becomes of one key.

    Args:
        key: the key, as the file has it; of nested ones with dots.
        value: its value.
        outcome: what becomes of it.
        fields: the fields of the configuration that it sets.
        remark: why, or what is done instead.
    """

    key: str
    value: Any
    outcome: Outcome
    fields: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Translation:
    """A file's values in the fields of a configuration.

    Args:
        rows: what becomes of each key.
        implied: fields that the algorithm's released code fixes without naming them in its files.
    """

    rows: tuple[HparamsRow, ...]
    implied: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hparams:
    """A hyper-parameter file of another tool, as kecore reads it.

    Args:
        path: the file.
        algorithm: what the file calls its algorithm.
        method: the method here.
        model: the model that the file names, if it names one; it is not loaded.
        rows: what becomes of each key.
        implied: fields that the algorithm's released code fixes without naming them in its files.

    Examples:
        >>> hparams = read_hparams("hparams/MEMIT/gpt-j-6B.yaml")        # doctest: +SKIP
        >>> editor.edit(facts, hparams.method, **hparams.fields)         # doctest: +SKIP
    """

    path: str
    algorithm: str
    method: str
    model: str | None
    rows: tuple[HparamsRow, ...]
    implied: Mapping[str, Any]

    @property
    def fields(self) -> dict[str, Any]:
        """All fields that the file sets, and those that its algorithm implies."""
        values = dict(self.implied)
        for row in self.rows:
            values.update(row.fields)
        return values

    def with_outcome(self, *outcomes: Outcome) -> tuple[HparamsRow, ...]:
        """Return the rows with one of some outcomes."""
        return tuple(row for row in self.rows if row.outcome in outcomes)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, with the fields."""
        return {**asdict(self), "fields": self.fields}

    def __repr__(self) -> str:
        lines = [f"{self.path}: {self.algorithm}, here the method '{self.method}'"]
        for row in self.rows:
            becomes = ", ".join(f"{name}={value}" for name, value in row.fields.items())
            text = "; ".join(filter(None, [becomes, row.remark]))
            lines.append(f"  {row.key}: {row.value!r}  {row.outcome}{f' ({text})' if text else ''}")
        if self.implied:
            lines.append(f"  implied: {', '.join(f'{name}={value}' for name, value in self.implied.items())}")
        return "\n".join(lines)
