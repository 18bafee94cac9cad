"""A studio over a tiny model, without a network and without a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from studio_page import Page

from kecore import Editor
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_studio.app import make_app
from kecore_studio.events import Events
from kecore_studio.security import Guard
from kecore_studio.session import Session
from kecore_studio.settings import Settings


@pytest.fixture(scope="module")
def module_page() -> Iterator[Page]:
    session = Session(Settings(), Events())
    session.adopt(Editor(tiny_model("llama"), tiny_tokenizer(), progress=None), "tiny")
    guard = Guard("secret", frozenset({"testserver"}), "kecore-studio-0")
    with TestClient(make_app(session, guard)) as client:
        client.cookies.set("kecore-studio-0", "secret")
        yield Page(client, session)


@pytest.fixture
def page(module_page: Page) -> Page:
    """The studio of the module, without edits and facts."""
    while module_page.state["undo"]:
        module_page.finish("POST", "/api/undo")
    module_page.send("DELETE", "/api/facts")
    return module_page
