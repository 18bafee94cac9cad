"""Writes docs/fidelity.md from the files of published set-ups and the golden tests.

Run ``python docs/_fidelity.py``. A test compares the page with what the script would write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from kecore.api import registry
from kecore.api.config import Preset
from kecore.api.plugins import HOME

_ROOT = Path(__file__).resolve().parent.parent
PAGE = _ROOT / "docs" / "fidelity.md"
_GOLDEN = _ROOT / "tests" / "unit" / "methods" / "test_golden.py"
_ELSEWHERE = {"ultraedit": "test_lifelong.py", "stableedit": "test_lifelong.py"}
"""Further methods whose released form is written out by hand, and the file of the test."""

_OPENING = """# As published

A preset is a published set-up: not the numbers alone, but the switches in which the released code differs from kecore's
defaults. `kecore edit MODEL --method METHOD --preset NAME` takes it, `kecore methods METHOD` shows it, and in Python it
is `Config.presets()[NAME]`, with its `source`, and with `differs`: what is still not as in the source. The files are in
`plugins/kecore_methods/presets`.

**Golden test** means that the procedure is written out by hand from the paper's equations and the released code's
choices, without kecore's engine, and that the method gives the same weights (`tests/unit/methods/test_golden.py`, and
`test_lifelong.py` beside it). A name with a remark behind it, as in *serac (pointer head)*, is a design of kecore's
after the paper's idea and not the published form; the remark stands wherever a row of the method does.

The set-ups of other tools are read as they are: `kecore edit MODEL --hparams FILE` takes EasyEdit's YAML and the JSON
files of ROME, MEMIT, AlphaEdit and their relatives, and says of each key what it sets here, what differs and what has
no counterpart; in Python it is `kecore.read_hparams`. What became of each finding of the audit that these rows go back
to is in [decision 0009](design/0009-presets-are-procedures.md).

This page is written by `docs/_fidelity.py` from those files.

"""


def page() -> str:
    """Return the page as it should be."""
    tested = set(re.findall(r'planned\(\s*editor,\s*"([a-z-]+)"', _GOLDEN.read_text(encoding="utf-8")))
    lines = ["| method | golden test | presets |", "| --- | --- | --- |"]
    sections: list[str] = []
    for info in registry.default_registry().describe():
        if info.distribution != HOME or info.capabilities is None:
            continue
        presets = registry.default_registry().get(info.name).Config.presets()
        golden = "yes" if info.name in tested or info.name in _ELSEWHERE else "no"
        link = f"[{', '.join(presets)}](#{info.name})" if presets else "none"
        title = f"[`{info.name}`](methods/{info.name}.md)"
        lines.append(f"| {info.capabilities.titled(title)} | {golden} | {link} |")
        if presets:
            sections.append(_section(info.name, presets))
    return _OPENING + "\n".join(lines) + "\n\n" + "\n".join(sections)


def _section(method: str, presets: Mapping[str, Preset]) -> str:
    """Write what the presets of one method are from, and what differs in each."""
    lines = [f"## {method}", ""]
    for name, preset in presets.items():
        lines.append(f"**{name}**: {preset.source}.")
        lines += [f"- {difference}" for difference in preset.differs] or ["- Nothing that is known."]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
