"""The studio's page in a real Chromium, over a tiny model: what a person does, sees and is told."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from kecore import Editor
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_studio.app import make_app
from kecore_studio.events import Events
from kecore_studio.security import HEADER, Guard
from kecore_studio.session import Session
from kecore_studio.settings import Settings

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'kecore[browser]' drives the page")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PROMPT = "The tower is in the city of"
FACT = {"prompt": PROMPT, "subject": "The tower", "target": "Rome"}
OTHER = {"prompt": "The mother tongue of Anna is", "subject": "Anna", "target": "French"}
PATIENCE = 30_000  # milliseconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install one, or name it by CHROMIUM"),
    # Playwright's own loop, and threads of the server that end with the process.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning"),
]


@pytest.fixture(scope="module")
def link() -> Iterator[str]:
    """A studio over a tiny model, and its link."""
    session = Session(Settings(), Events())
    session.adopt(Editor(tiny_model("llama"), tiny_tokenizer(), progress=None), "tiny")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = int(listening.getsockname()[1])
        guard = Guard.make("127.0.0.1", port)
        config = uvicorn.Config(make_app(session, guard), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{port}/?token={guard.token}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, link: str) -> Iterator[Callable[..., Any]]:
    """``opened(**options)``: the page in a window of its own; what its console complains of fails the test."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(link)
        page.wait_for_selector("#model-chip:not([hidden])", state="attached")
        page.wait_for_selector("#ready", state="attached")
        return page

    page = open_page()
    while page.locator("#undo").is_enabled():  # what an earlier test left
        page.click("#undo")
        page.wait_for_timeout(200)
    page.request.delete(link.partition("?")[0] + "api/facts", headers={HEADER: "1"})
    page.close()
    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def edit(page: Any, fact: dict[str, str], **config: str) -> None:
    """Fill in a fact and edit it by a quick method."""
    page.click("#clear-form")
    for name, text in fact.items():
        page.fill(f"#fact [name={name}]", text)
    page.select_option("#method", "ft-m")
    if not page.locator("#settings").get_attribute("open"):
        page.locator("#settings").evaluate("details => { details.open = true; }")
    for name, text in {"steps": "4", "learning_rate": "0.1", **config}.items():
        page.fill(f"[data-field={name}]", text)
    page.click("#edit-button")


def edits(page: Any) -> Any:
    return page.locator("#stack li")


def expect(locator: Any) -> Any:
    sync_api.expect.set_options(timeout=PATIENCE)
    return sync_api.expect(locator)


def test_a_fact_is_edited_seen_switched_off_and_undone(opened: Callable[..., Any]) -> None:
    page = opened()
    edit(page, FACT)
    expect(edits(page)).to_have_count(1)
    expect(page.locator("#tokens .delta").first).to_be_visible()
    expect(page.locator("#answers li").first).to_contain_text(PROMPT)
    expect(page.locator("#text-after")).not_to_be_empty()
    assert "prompt=The+tower" in page.url

    page.locator("#stack .switch").focus()
    page.keyboard.press("Space")
    expect(page.locator("#stack .switch")).to_have_attribute("aria-checked", "false")
    expect(page.locator("#tokens .delta")).to_have_count(0)
    page.click("#undo")
    expect(page.locator("#stack .switch")).to_have_attribute("aria-checked", "true")
    page.locator("h1").click()
    page.keyboard.press("Control+z")
    expect(edits(page)).to_have_count(0)
    page.keyboard.press("Control+Shift+Z")
    expect(edits(page)).to_have_count(1)


def test_a_page_that_is_loaded_anew_finds_the_running_edit_and_ends_it(opened: Callable[..., Any]) -> None:
    page = opened()
    edit(page, FACT, steps="100000", stop_loss="0")
    expect(page.locator("#job-stage")).to_contain_text("of 100000")
    page.reload()
    expect(page.locator("#job-stage")).to_contain_text("of 100000")
    expect(page.locator("#fact [name=prompt]")).to_have_value(PROMPT)
    page.click("#job-cancel")
    expect(page.locator("#job")).to_be_hidden()
    expect(page.locator("#live")).to_contain_text("nothing was changed")
    expect(edits(page)).to_have_count(0)


def test_two_pages_see_the_same_session(opened: Callable[..., Any]) -> None:
    first, second = opened(), opened()
    edit(first, FACT)
    expect(edits(second)).to_have_count(1)
    edit(second, OTHER)
    expect(edits(first)).to_have_count(2)
    first.locator("#stack .switch").first.click()
    expect(second.locator("#stack .switch").first).to_have_attribute("aria-checked", "false")


def test_a_link_shows_the_same_and_asks_before_it_switches(opened: Callable[..., Any]) -> None:
    page = opened()
    edit(page, FACT)
    expect(edits(page)).to_have_count(1)
    expect(page.locator("#answers li").first).to_be_visible()
    address = page.url
    page.click("#stack .switch")
    expect(page.locator("#stack .switch")).to_have_attribute("aria-checked", "false")
    page.goto("about:blank")
    page.goto(address)
    expect(page.locator("#ask [name=prompt]")).to_have_value(PROMPT)
    page.click("text=Switch as in the link")
    expect(page.locator("#stack .switch")).to_have_attribute("aria-checked", "true")


def test_a_wrong_file_and_a_refusal_say_what_to_do(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened()
    picture = tmp_path / "photo.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    page.click("text=Many")
    page.set_input_files("#facts-file", picture)
    expect(page.locator(".alert .what")).to_contain_text("an image")
    page.click(".alert >> text=DataFormatError")
    expect(page.locator("#explain-text")).to_contain_text("facts")
    page.keyboard.press("Escape")
    facts = tmp_path / "facts.csv"
    facts.write_text("question,answer,about\nThe tower is in the city of,Rome,The tower\nAnna speaks,French,Anna\n")
    page.set_input_files("#facts-file", facts)
    expect(page.locator("#sheet")).to_contain_text("2 facts understood")
    expect(page.locator("#sheet")).to_contain_text("question")
    expect(page.locator(".alert")).to_have_count(0)
    page.click("text=One >> visible=true")
    edit(page, {**FACT, "subject": "The bridge"})
    expect(page.locator(".alert .what")).to_contain_text("The bridge")
    expect(edits(page)).to_have_count(0)


def test_a_narrow_screen_shows_everything_without_scrolling_sideways(opened: Callable[..., Any]) -> None:
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True)
    page.tap("nav >> text=Edit")
    edit(page, FACT)
    expect(page.locator("#answers li").first).to_be_visible()
    for view in ("Edit", "Compare", "Trace", "Health", "Bench"):
        page.tap(f"nav >> text={view}")
        width = page.locator("html").evaluate("element => element.scrollWidth")
        assert width <= 360, view


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened: Callable[..., Any], scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install 'kecore[browser]' brings axe"
    )
    page = opened(color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")  # axe is put into the page
    edit(page, FACT)
    expect(page.locator("#answers li").first).to_be_visible()
    for view in ("Compare", "Trace", "Health", "Bench"):
        page.click(f"nav >> text={view}")
        if view == "Trace":
            page.fill("#trace-form [name=subject]", "The tower")
            page.click("#trace-form button")
            expect(page.locator("svg.map").first).to_be_visible()
        if view == "Health":
            page.fill("#health-form [name=passages]", "2")
            page.click("#health-form button")
            expect(page.locator("#health-result table")).to_be_visible()
        expect(page.locator("#job")).to_be_hidden()
        found = axe.Axe().run(page).response["violations"]
        serious = [item for item in found if item["impact"] in ("serious", "critical")]
        assert serious == [], [(item["id"], [node["html"] for node in item["nodes"]]) for item in serious]


def test_the_first_paint_takes_less_than_a_second(opened: Callable[..., Any]) -> None:
    page = opened()
    paints: list[float] = []
    for _ in range(3):
        page.reload()
        page.wait_for_selector("#ready", state="attached")
        paints.append(page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        time.sleep(0.1)
    assert min(paints) < 1000
