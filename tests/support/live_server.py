"""A served tiny model with a ledger, in a thread of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from kecore.editor import Editor
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_serve.ledger import Ledger
from kecore_serve.server.app import make_app
from kecore_serve.server.live import LiveModel
from kecore_serve.server.opening import Capacity, make_service, open_ledger
from kecore_serve.server.running import running
from kecore_serve.server.service import Service
from kecore_serve.server.settings import Settings

TOKEN = "a-token-of-the-tests"  # noqa: S105 - opens nothing
NAME = "tiny"


@dataclass(frozen=True)
class Served:
    """A running server and its clients."""

    service: Service
    url: str
    openai: openai.OpenAI
    http: httpx.Client

    @property
    def ledger(self) -> Ledger:
        return self.service.model.ledger

    def edit(self, **body: Any) -> Any:
        """Make an edit, and return what came back."""
        answer = self.http.post("/v1/edits", json=body)
        answer.raise_for_status()
        return answer.json()


def make_editor(architecture: str = "llama") -> Editor:
    kind = "byte-bpe" if architecture == "gpt2" else "llama-like"
    return Editor(tiny_model(architecture), tiny_tokenizer(kind), progress=None)


@contextmanager
def serving(
    editor: Editor | None = None, folder: Path | None = None, capacity: Capacity | None = None, **settings: Any
) -> Iterator[Served]:
    editor = editor or make_editor()
    with open_ledger(folder, editor, NAME) as ledger:
        service = make_service(LiveModel(editor, ledger), Settings(name=NAME, token=TOKEN, **settings), capacity)
        with running(make_app(service)) as url:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            with (
                openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
                httpx.Client(base_url=url, headers=headers, timeout=60) as http,
            ):
                yield Served(service, url, client, http)
