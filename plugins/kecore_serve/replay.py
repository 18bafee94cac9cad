"""Replays of a ledger: its edits put on the base again, or planned anew without some of them.

Putting them on again needs no planning and gives the same weights bit for bit. Planning anew is for edits that were
planned while another one was on the model that has since been taken back: they answered to it, and so did what their
methods remember.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from kecore.api.errors import ArtifactMismatchError, ConfigError
from kecore.api.types import EditRequest
from kecore.edit import Edit
from kecore.editor import Editor
from kecore.journal import Withdrawal
from kecore_serve.records import Entry

if TYPE_CHECKING:
    from kecore_serve.ledger import Ledger

__all__ = ["check_session", "replay_without"]


def replay_without(
    ledger: Ledger,
    ids: str | Iterable[str],
    editor: Editor,
    *,
    left_out: Mapping[str, Collection[str]] | None = None,
    author: str | None = None,
    note: str = "",
) -> Withdrawal:
    """Take edits back, and plan those anew that were planned with them: all is as if they had never been made.

    Edits that came before them stay. The new edits and the end of the old ones come into effect in one step, so a crash
    at any moment leaves the ledger as it was or as it is after.

    Args:
        ledger: the ledger.
        ids: beginnings of the ids of edits in effect.
        editor: a session on the ledger's unedited model, with all that the edits' methods need. Afterwards it has what
            is in effect on the model.
        left_out: ids of facts to leave out of an edit among ``ids``, which is then planned anew without them.
        author: who does it; by default the user.
        note: words for the history.

    Raises:
        ArtifactError: no such edit, or more than one that begins so.
        ArtifactMismatchError: the session is on another model, or in another form of prompts.
        EditStateError: an edit is not in effect, or the session has edits.
    """
    with ledger.writing():
        removed = ledger.resolve_active(ids)
        active = ledger.active()
        kept = min(number for number, entry in enumerate(active) if entry.id in removed)
        check_session(ledger, editor, active[kept:])
        before = [ledger.load(entry) for entry in active[:kept]]
        editor.resume(before, ledger.states_behind(kept))
        edits: list[Edit] = []
        states: list[Mapping[str, Tensor]] = []
        replaced: dict[str, str] = {}
        for entry in active[kept:]:
            planned = ledger.load(entry)
            requests = planned.requests
            if entry.id in removed:
                facts = (left_out or {}).get(entry.id)
                requests = () if facts is None else tuple(r for r in requests if r.id not in facts)
            if not requests:
                continue
            states.append(editor.remembered(entry.method))
            edit = _plan_again(editor, planned, requests)
            edits.append(replace(edit, state=editor.remembered(entry.method)))
            replaced[entry.id] = edits[-1].id
        gone = [entry.id for entry in active[kept:]]
        ledger.substitute(gone, edits, states, kept=kept, author=author, note=note)
        return Withdrawal(removed, replaced=replaced, state=ledger.state)


def check_session(ledger: Ledger, editor: Editor, entries: Iterable[Entry]) -> None:
    """Refuse a session in which edits of a ledger cannot be planned again as they were.

    Raises:
        ArtifactMismatchError: it is on other weights, or in another form of prompts.
    """
    if editor.base.digests != ledger.base.digests:
        raise ArtifactMismatchError(
            f"the session is not on the weights that {ledger.folder} is of ('{ledger.model}', {ledger.base.dtype}); "
            "load that model in the type in which it is stored"
        )
    for entry in entries:
        form = "chat" if ledger.load(entry).notes.get("form") == "chat" else "plain"
        used = "chat" if editor.encoder.chat else "plain"
        if form != used:
            raise ArtifactMismatchError(
                f"edit {entry.id} was planned with {form} prompts, and the session has {used} ones; open it with "
                f"chat={form == 'chat'}"
            )


def _plan_again(editor: Editor, edit: Edit, requests: Sequence[EditRequest]) -> Edit:
    """Plan facts of an edit with its method, configuration and seed on the model as it is."""
    with _seeded(editor, edit.seed):
        try:
            return editor.edit(requests, edit.method, **dict(edit.config))
        except ConfigError as error:
            raise ConfigError(
                f"edit {edit.id} by '{edit.method}' of kecore {edit.version} cannot be planned again: {error}"
            ) from error


@contextmanager
def _seeded(editor: Editor, seed: int) -> Iterator[None]:
    """Let a session plan with another seed inside the block."""
    before = editor.seed
    editor.seed = seed
    try:
        yield
    finally:
        editor.seed = before
