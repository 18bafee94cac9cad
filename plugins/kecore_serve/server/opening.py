"""Putting a server together: model, ledger, worker and application."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kecore.edit import Edit
from kecore.editor import Editor
from kecore.memory import cached_share, scoring_need
from kecore_serve.ledger import Ledger
from kecore_serve.server.live import LiveModel, ServedLedger
from kecore_serve.server.metrics import Metrics
from kecore_serve.server.service import Service
from kecore_serve.server.settings import Settings
from kecore_serve.server.worker import Worker

__all__ = ["Capacity", "make_service", "open_ledger"]

_MOST_CACHED = 1 << 20
"""Tokens of caches that are counted with at the most, however much memory is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How much a server does at a time.

    Args:
        rows: most texts that are written at once.
        queue: most requests that wait.
    """

    rows: int = 64
    queue: int = 256


@contextmanager
def open_ledger(folder: Path | None, editor: Editor, model: str) -> Iterator[ServedLedger]:
    """Open the ledger in a folder, or begin one; without a folder, one that is gone after the block.

    Args:
        folder: of a ledger, or an empty or new one.
        editor: a session on the unedited model.
        model: the model's reference.

    Raises:
        ArtifactError: something else is in the folder, or the ledger is damaged.
        StorageError: it cannot be written.
    """
    with ExitStack() as stack:
        if folder is None:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="kecore-serve-"))
            folder = Path(temporary) / "ledger"
        if not Ledger.is_ledger(folder):
            Ledger.create(folder, model, editor.base).close()
        ledger = ServedLedger(folder)
        stack.enter_context(ledger)
        yield ledger


def make_service(
    live: LiveModel, settings: Settings, capacity: Capacity | None = None, edits: Sequence[Edit] = ()
) -> Service:
    """Make the service of a live model.

    Args:
        live: the model with its edits.
        settings: of the server.
        capacity: how much it does at a time.
        edits: put on the model before it is served, unless they are in effect already.
    """
    for edit in edits:
        if edit.id not in live.now.active:
            live.add(edit)
    capacity = capacity or Capacity()
    metrics = Metrics()
    prompt_tokens = live.editor.batch_tokens
    worker = Worker(
        live,
        rows=capacity.rows,
        queue=capacity.queue,
        prompt_tokens=prompt_tokens,
        cache_tokens=_cache_tokens(live.editor),
        observer=metrics,
    )
    return Service(live, worker, settings, metrics)


def _cache_tokens(editor: Editor) -> int:
    """Return how many tokens caches may hold within the session's budget of memory."""
    need = scoring_need(editor.view, _MOST_CACHED)
    tokens = need.micro_batch(editor.memory_plan([need]).activations)
    return min(_MOST_CACHED, math.floor(tokens / cached_share(editor.view)))
