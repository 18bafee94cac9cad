"""Writes what was measured of all methods alike into docs/results.md, docs/choose-a-method.md and docs/methods/*.md.

docs/measured_batch.md and docs/measured_costs.md are ``table.md`` of ``kecore report`` on the stores that
docs/results.md names the commands of; docs/measured_single.md puts together rows of several runs. Then run
``python docs/_measured.py``. A test compares the pages with what the script would write.
"""

from __future__ import annotations

import json
from pathlib import Path

from kecore_bench.report.costs import COSTS

DOCS = Path(__file__).parent
_HEADING = (
    "## Beside the other methods\n\n"
    "The model is the demo model, SmolLM2-135M-Instruct from a Q4_1 file that is dequantised to float32; its digest\n"
    "is in [install](../install.md#the-demo-model).\n\n"
)
_INTRO = {
    "single": "The first 50 records of CounterFact, each edited alone; command, conditions and the other methods\n"
    "are in [results](../results.md#fifty-records-each-edited-alone):\n\n",
    "batch": "The first 50 records of CounterFact in one batch; command, conditions and the other methods are in\n"
    "[results](../results.md#fifty-records-in-one-batch):\n\n",
    "costs": "What a lone edit costs; command, conditions and the other methods are in\n"
    "[results](../results.md#what-a-lone-edit-costs):\n\n",
}


def rows(name: str) -> dict[str, str]:
    """Return the lines of the table ``name``, a key of the introductions, by method; its two head lines come first."""
    table = (DOCS / f"measured_{name}.md").read_text(encoding="utf-8").split("\n\n")[1]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    if name == "costs":
        lines = [[line[0], *line[-len(COSTS) :]] for line in lines if line[0] != "unedited"]
    return {line[0]: f"| {' | '.join(line)} |\n" for line in lines}


def pages() -> dict[Path, str]:
    """Return every page that has, or should have, some of the tables, as it should be."""
    tables = {name: rows(name) for name in _INTRO}
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    for name, lines in tables.items():
        results = _put(results, name, "".join(lines.values()))
    choice = (DOCS / "choose-a-method.md").read_text(encoding="utf-8")
    contents = {
        DOCS / "results.md": results,
        DOCS / "choose-a-method.md": _put(choice, "choice", choice_table()),
    }
    for path in sorted((DOCS / "methods").glob("*.md")):
        sections: list[str] = []
        for name, lines in tables.items():
            if path.stem in lines:
                selected = [lines[key] for key in ("method", "---", "unedited", path.stem) if key in lines]
                sections.append(_INTRO[name] + "".join(selected))
        if sections:
            page = path.read_text(encoding="utf-8")
            contents[path] = _put(page, "measured", _HEADING + "\n".join(sections))
    contents[DOCS.parent / "kecore" / "data" / "measured.json"] = _measured_json()
    return contents


def choice_table() -> str:
    """Return one line for each method: what it changes and needs, by README.md, and the figures that decide."""
    measured = {name: _cells_by_column(name) for name in _INTRO}
    columns = [("single", name) for name in ("ES", "PS", "NS", "NS stable")]
    columns += [("batch", name) for name in ("ES", "PS", "NS", "NS stable")]
    columns += [("costs", "s/fact"), ("costs", "KiB/fact")]
    title = {"single": "alone: ", "batch": "batch: ", "costs": ""}
    head = ["method", "changes", "many at once", "needs", *(title[table] + name for table, name in columns)]
    lines = [head, ["---"] * 4 + ["---:"] * len(columns)]
    for name, abilities in {"unedited": ["-", "-", "-"], **_abilities()}.items():
        figures = [measured[table].get(name, {}).get(column, "-") for table, column in columns]
        link = name if name == "unedited" else f"[`{name}`](methods/{name}.md)"
        if any(figure != "-" for figure in figures):
            lines.append([link, *abilities, *(figure.split(" ")[0] for figure in figures)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells_by_column(name: str) -> dict[str, dict[str, str]]:
    """Return the cells of a table by method and column, as they are written there."""
    head, _, *lines = (line.strip("| \n").split(" | ") for line in rows(name).values())
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def _abilities() -> dict[str, list[str]]:
    """Return what README.md says a method changes, whether it takes many facts at once, and what it needs."""
    table = (DOCS.parent / "README.md").read_text(encoding="utf-8").split("<!-- methods:")[1].split("<!-- /methods")[0]
    abilities: dict[str, list[str]] = {}
    for line in table.splitlines():
        if line.startswith("| [`"):
            name, changes, many, _, needs, _ = line.strip("| ").split(" | ")
            abilities[name[2:].partition("`")[0]] = [changes, many, needs]
    return abilities


def _measured_json() -> str:
    """Return ``kecore/data/measured.json``: scores of facts each edited alone, and what a lone edit costs."""
    columns = {
        "single": {"ES": "success", "PS": "paraphrases", "NS": "neighbours"},
        "costs": {"s/fact": "seconds_per_fact", "KiB/fact": "kib_per_fact"},
    }
    measured: dict[str, dict[str, float]] = {}
    for name, fields in columns.items():
        for method, cells in _cells_by_column(name).items():
            for column, field in fields.items():
                if method != "unedited" and cells.get(column, "-") != "-":
                    measured.setdefault(method, {})[field] = float(cells[column].split()[0])
    return json.dumps(measured, indent=1, sort_keys=True) + "\n"


def _put(page: str, name: str, text: str) -> str:
    """Return a page with ``text`` between its marks, or at its end where it has none yet."""
    begin, end = f"<!-- {name}: generated by docs/_measured.py -->\n", f"<!-- /{name} -->\n"
    before, _, rest = page.partition(begin)
    return before.rstrip("\n") + "\n\n" + begin + text + end + rest.partition(end)[2]


if __name__ == "__main__":
    for page, content in pages().items():
        page.write_text(content, encoding="utf-8")
