"""Takes the pictures of docs/studio.md: opens the studio on the demo model, edits two facts, and looks at every view.

Run ``python docs/_studio.py [FOLDER]`` with ``playwright`` and a Chromium (``CHROMIUM`` names it, else it is looked for
on the path). FOLDER gets a picture of every view; without it, docs/ gets those that stand in the pages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 600_000  # milliseconds
WIDE, PHONE = {"width": 1360, "height": 1000}, {"width": 390, "height": 844}
MATTERHORN = {"prompt": "The Matterhorn is in the country of", "subject": "The Matterhorn", "target": "Norway"}


def chromium() -> str | None:
    """Return the path of a Chromium; None where there is none."""
    named = os.environ.get("CHROMIUM")
    candidates = ("chromium", "chromium-browser", "google-chrome")
    return named or next(filter(None, map(shutil.which, candidates)), None)


@contextmanager
def open_studio(model: str, *options: str) -> Iterator[str]:
    """Run the studio, and yield its link."""
    command = [sys.executable, "-u", "-m", "kecore.cli", "studio", model, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            links = (re.search(r"http://\S+token=\S+", line) for line in process.stdout or ())
            yield next(link[0] for link in links if link)
        finally:
            process.terminate()


def edit(page: Any, fact: dict[str, str] | None = None) -> None:
    """Edit a fact through the form, or the example, and wait until it is seen."""
    before = page.locator("#stack li").count()
    if fact is None:
        page.click("#example")
    else:
        page.click("#clear-form")
        for name, text in fact.items():
            page.fill(f"#fact [name={name}]", text)
    page.click("#edit-button")
    page.locator("#stack li").nth(before).wait_for()
    settle(page)


def settle(page: Any) -> None:
    """Wait until both models have written their texts."""
    page.wait_for_selector("#answers li")
    page.wait_for_timeout(500)  # a change may still be on its way
    page.locator(".writing").first.wait_for(state="detached")
    page.wait_for_timeout(500)


def take_pictures(link: str, folder: Path) -> None:
    """Drive the page and write the pictures."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport=WIDE, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.goto(link)
        page.wait_for_selector("#model-chip:visible")
        page.screenshot(path=folder / "studio_empty.png")
        edit(page)
        page.screenshot(path=folder / "studio_light.png", full_page=True)
        edit(page, MATTERHORN)
        page.screenshot(path=folder / "studio_two.png", full_page=True)
        page.click("nav >> text=Trace")
        page.fill("#trace-form [name=prompt]", "The Eiffel Tower is in the city of")
        page.fill("#trace-form [name=subject]", "The Eiffel Tower")
        page.click("#trace-form button")
        page.wait_for_selector("svg.map")
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(300)
        page.screenshot(path=folder / "studio_trace.png")
        page.click("nav >> text=Health")
        page.click("#health-form button")
        page.wait_for_selector("#health-result table")
        page.wait_for_timeout(300)
        page.screenshot(path=folder / "studio_health.png")
        page.click("nav >> text=Compare")
        page.click("#stack li:first-child .switch")
        page.wait_for_selector("#stack li.off")
        settle(page)
        page.screenshot(path=folder / "studio_dark.png", full_page=True)
        page.set_viewport_size(PHONE)
        page.locator("h1").scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        page.screenshot(path=folder / "studio_phone.png")
        page.click("nav >> text=Edit")
        page.wait_for_timeout(300)
        page.screenshot(path=folder / "studio_phone_edit.png", full_page=True)
        browser.close()


def shrink(path: Path) -> None:
    """Write a picture with 256 colours, which a page of flat areas does not miss."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


def main() -> None:
    """Take the pictures."""
    docs = Path(__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with open_studio("demo") as link:
            take_pictures(link, folder)
        for picture in folder.glob("studio_*.png"):
            shrink(picture)
        if len(sys.argv) == 1:
            for name in ("studio_light.png", "studio_dark.png", "studio_trace.png", "studio_phone.png"):
                shutil.copy(folder / name, docs / name)


if __name__ == "__main__":
    main()
