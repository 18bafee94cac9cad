"""Checks of a ledger: is every file what was written, and does every fact in effect still hold?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kecore.api.errors import KecoreError
from kecore.api.types import EditRequest
from kecore.files import file_digest

if TYPE_CHECKING:
    from kecore.editor import Editor
    from kecore_serve.ledger import Ledger

__all__ = ["Holding", "Problem", "check_facts", "check_files"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a ledger that is not as it was written.

    Args:
        what: the file or the edit.
        message: what is wrong, and what to do.
    """

    what: str
    message: str


@dataclass(frozen=True, slots=True)
class Holding:
    """Which facts in effect the model answers.

    Args:
        checked: number of facts; of several about one prompt, the last one.
        failed: those that the model does not answer, each with the id of its edit.
    """

    checked: int
    failed: tuple[tuple[str, EditRequest], ...]


def check_files(ledger: Ledger) -> list[Problem]:
    """Check the database, the chain of its events, and every file of every edit, those taken back included.

    Raises:
        ArtifactError: the database cannot be read.
    """
    problems: list[Problem] = []
    ledger.check_database()
    for entry in ledger.entries():
        try:
            edit = ledger.load(entry)
            if edit.id != entry.id:
                problems.append(Problem(entry.file, f"it holds edit {edit.id} and not {entry.id}; restore it"))
        except (KecoreError, KeyError, TypeError, ValueError) as error:
            problems.append(Problem(entry.file, str(error)))
        if entry.state.file is None:
            continue
        path = ledger.folder / entry.state.file
        if not path.is_file():
            problems.append(Problem(entry.state.file, "it is missing; restore it from a copy"))
        elif file_digest(path) != entry.state.digest:
            problems.append(Problem(entry.state.file, "it was changed since it was written; restore it from a copy"))
    return problems


def check_facts(ledger: Ledger, editor: Editor) -> Holding:
    """Ask the model whether it answers every fact in effect.

    Args:
        ledger: the ledger.
        editor: a session that follows it.
    """
    editor.synchronise()
    latest: dict[str, tuple[str, EditRequest]] = {}  # by prompt: a later fact takes the place of an earlier one
    for entry in ledger.active():
        for request in ledger.load(entry).requests:
            latest[request.text] = (entry.id, request)
    requests: Sequence[EditRequest] = [request for _, request in latest.values()]
    if not requests:
        return Holding(0, ())
    known = {request.text for request in editor.check(requests).known}
    failed = [item for item in latest.values() if item[1].text not in known]
    return Holding(len(requests), tuple(failed))
