"""Writes the table of methods in README.md from what the registry finds.

Run ``python docs/_methods.py``. A test compares the table with what the script would write.
"""

from __future__ import annotations

import re
from pathlib import Path

from kecore.api import registry
from kecore.api.plugins import HOME
from kecore.api.types import Capabilities

PAGE = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- methods: [^\n]*-->\n).*?(<!-- /methods -->)", re.DOTALL)


def table() -> str:
    """Make a table with one row for each built-in method, from its capabilities."""
    lines = [
        "| method | changes | many at once | edits an edited model | needs | paper |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for info in registry.default_registry().describe():
        if info.distribution != HOME or info.capabilities is None:
            continue
        can = info.capabilities
        flags = {
            "key statistics": can.needs_statistics,
            "training": can.needs_training,
            "examples": can.needs_examples,
        }
        needs = [word for word, needed in flags.items() if needed]
        lines.append(
            f"| [`{info.name}`](docs/methods/{info.name}.md) | {can.kind} | {_word(can.batch, 'one by one')} "
            f"| {_word(can.sequential, 'no')} | {', '.join(needs) or 'nothing'} | {_source(info.reference, can)} |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return README.md as it should be."""
    return _BLOCK.sub(lambda block: block[1] + table() + block[2], PAGE.read_text(encoding="utf-8"))


def _source(reference: str, capabilities: Capabilities) -> str:
    """Return the paper, and what is kecore's own where the method follows its idea only."""
    return f"{reference}; here a variant, {capabilities.variant}" if capabilities.variant else reference


def _word(holds: bool, otherwise: str) -> str:
    return "yes" if holds else otherwise


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
