"""Edits again what an edit failed to write, on top of it and for longer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kecore.api.errors import EditStateError, UnsupportedCapabilityError
from kecore.api.line import MethodLine
from kecore.evaluate.protocol import Protocol
from kecore.evaluate.result import Evaluation
from kecore.evaluate.verdicts import Verdict, row_verdicts, verdicts_of
from kecore.facts import as_records

if TYPE_CHECKING:
    from kecore.api.types import EditRecord
    from kecore.editor import Editor
    from kecore.facts import Facts

__all__ = ["Retry", "check_retry", "retry_failed"]

_LONGER = 2  # times the steps of the edit before


@dataclass(frozen=True, slots=True)
class Retry:
    """What came of editing the facts again that an edit had failed to write.

    Args:
        first: scores after the edit.
        second: scores after the retry; ``first`` where nothing had failed.
        tried: ids of the records that were edited again.
        settings: fields of the configuration that the retry set otherwise.
        kept: more facts hold after the retry, so that it stayed on the model; otherwise it was taken off again.
    """

    first: Evaluation
    second: Evaluation
    tried: tuple[str, ...]
    settings: Mapping[str, Any]
    kept: bool

    @property
    def evaluation(self) -> Evaluation:
        """Scores of what is on the model now."""
        return self.second if self.kept else self.first

    def to_json(self) -> dict[str, Any]:
        """Return what became of the facts that had failed, as JSON values."""
        return {
            "tried": list(self.tried),
            "settings": dict(self.settings),
            "kept": self.kept,
            "failed_before": _failed_ids(self.first),
            "failed_after": _failed_ids(self.second),
        }


def check_retry(method: str | type[Any] | MethodLine) -> None:
    """Refuse a method that cannot edit on top of an edit.

    Raises:
        UnsupportedCapabilityError: the method edits no edited model.
    """
    line = MethodLine.of(method)
    if not line.capabilities.sequential:
        raise UnsupportedCapabilityError(
            f"method '{line.name}' does not edit a model that is edited, so what it failed to write cannot be edited "
            "again on top; leave out the retry, or edit all facts anew with other settings"
        )


def retry_failed(
    editor: Editor,
    records: Facts,
    method: str | type[Any] | MethodLine = "memit",
    *,
    first: Evaluation | None = None,
    protocol: Protocol | None = None,
    preset: str | None = None,
    **config: Any,
) -> Retry:
    """Edit the facts again that do not hold after the last edit of a session, on top of it.

    Only the failed facts are planned, with twice the steps where the method has steps. If fewer facts of all fail
    afterwards, the retry stays on the model; otherwise it is taken off. A fact fails where some token of its target is
    not the most probable one. What a method cannot write at all, such as a target beyond its reach, fails again; and
    the facts that hold may suffer from a second edit, which is why all of them are scored again.

    Args:
        editor: a session whose last edit is of these facts.
        records: all facts of that edit.
        method: the method of that edit.
        first: scores after that edit, if they are at hand.
        protocol: how the facts are scored.
        preset: as that edit had it.
        config: likewise.

    Raises:
        EditStateError: nothing was edited yet.
        UnsupportedCapabilityError: the method edits no edited model.

    Examples:
        >>> editor.edit(facts, "memit")                                                   # doctest: +SKIP
        >>> retry_failed(editor, facts, "memit").to_json()["failed_after"]                # doctest: +SKIP
        []
        >>> editor.save("both-in-one")                                                    # doctest: +SKIP
    """
    check_retry(method)
    if not editor.history:
        raise EditStateError("nothing was edited yet, so there is nothing to try again; call Editor.edit first")
    line, all_records = MethodLine.of(method), as_records(records)
    first = first or editor.evaluate(all_records, protocol)
    failed: list[EditRecord] = []
    for record, row in zip(all_records, first.rows, strict=True):
        if not all(verdict.holds for verdict in row_verdicts(row)):
            failed.append(record)
    if not failed:
        return Retry(first, first, (), {}, kept=False)
    settings = _longer(line, preset, config)
    editor.edit(failed, line, preset=preset, **{**config, **settings})
    second = editor.evaluate(all_records, protocol)
    is_better = len(_failed(second)) < len(_failed(first))
    if not is_better:
        editor.revert()
    return Retry(first, second, tuple(record.request.id for record in failed), settings, kept=is_better)


def _longer(line: MethodLine, preset: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that let a method work longer on what it failed to write."""
    values = line.make_config(config, preset=preset).model_dump()
    steps = values.get("steps")
    return {"steps": _LONGER * steps} if isinstance(steps, int) else {}


def _failed(evaluation: Evaluation) -> list[Verdict]:
    return [verdict for verdict in verdicts_of(evaluation) if not verdict.holds]


def _failed_ids(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(verdict.id for verdict in _failed(evaluation)))
