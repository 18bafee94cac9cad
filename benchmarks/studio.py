"""Times the studio against the command line: one fact, edited alone, until its change is seen.

Run ``python benchmarks/studio.py [ROUNDS]`` with what ``docs/_studio.py`` needs. Both edit the demo model on one
machine, in turn. The command's time is that of its stages after loading: what the edit takes, and the questions after
it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

from _studio import PATIENCE, WIDE, chromium, open_studio

FACTS = (
    {"prompt": "The Matterhorn is in the country of", "subject": "The Matterhorn", "target": "Norway"},
    {"prompt": "The Eiffel Tower is in the city of", "subject": "The Eiffel Tower", "target": "Rome"},
)
STAGES = ("statistics", "contexts", "values", "keys", "solve", "attach", "save", "after")


def time_command(fact: dict[str, str]) -> float:
    """Return the seconds of ``kecore edit`` from the loaded model to the answers after the edit."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--{name}={text}" for name, text in fact.items()]
        command = [sys.executable, "-m", "kecore.cli", "edit", "demo", *options, "--out", folder, "--force", "--json"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds: dict[str, float] = json.loads(output)["stages"]
    return sum(seconds.get(stage, 0.0) for stage in STAGES)


def time_page(page: Any, fact: dict[str, str]) -> float:
    """Return the seconds from the click on the button to the changed next token, and take the edit off again."""
    page.click("#clear-form")
    for name, text in fact.items():
        page.fill(f"#fact [name={name}]", text)
    page.fill("#ask [name=prompt]", "Hello")  # so that no earlier answer is taken for the new one
    page.fill("#ask [name=target]", "")
    page.click("#ask button")
    page.locator("#tokens .delta.up").first.wait_for(state="detached")
    page.wait_for_timeout(1000)
    page.locator(".writing").first.wait_for(state="detached")
    begin = time.perf_counter()
    page.click("#edit-button")
    page.locator("#tokens .delta.up").first.wait_for()
    seconds = time.perf_counter() - begin
    page.click("#undo")
    page.locator("#stack li").first.wait_for(state="detached")
    return seconds


def time_paint(page: Any) -> float:
    """Return the milliseconds to the first paint with content of a page that is loaded anew."""
    page.reload()
    page.wait_for_selector("#ready", state="attached")
    return float(page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime"))


def main() -> None:
    """Print the times."""
    from playwright.sync_api import sync_playwright

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    ratios: list[float] = []
    with open_studio("demo") as link, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport=WIDE)
        page.set_default_timeout(PATIENCE)
        page.goto(link)
        page.wait_for_selector("#model-chip:visible")
        for fact in FACTS * rounds:
            command, seen = time_command(fact), time_page(page, fact)
            ratios.append(seen / command)
            sys.stdout.write(f"command {command:5.1f} s   page {seen:5.1f} s   ratio {ratios[-1]:.2f}\n")
        paints = [time_paint(page) for _ in range(5)]
        browser.close()
    sys.stdout.write(f"median ratio {statistics.median(ratios):.2f}\n")
    sys.stdout.write(f"first paint {statistics.median(paints):.0f} ms, at most {max(paints):.0f} ms\n")


if __name__ == "__main__":
    main()
