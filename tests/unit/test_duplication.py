"""One place per idea: hardly any code of kecore stands in two files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = 6
"""Lines in a row that count as a copy."""
LIMIT = 0.03
"""Share of code lines in copies."""


def code(text: str) -> Iterator[str]:
    """The lines of a file with white space folded; blank lines, comments and imports are left out."""
    importing = False
    for line in text.splitlines():
        words = " ".join(line.split())
        if importing or words.startswith(("import ", "from ")):
            importing = words.endswith("(") or (importing and not words.endswith(")"))
        elif words and not words.startswith("#"):
            yield words


def copies(files: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Of each file the code lines in a run of :data:`RUN` that another file has as well, and all of its code lines."""
    lines = {name: list(code(text)) for name, text in files.items()}
    places: defaultdict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, each in lines.items():
        for start in range(len(each) - RUN + 1):
            places[tuple(each[start : start + RUN])].append((name, start))
    copied: dict[str, set[int]] = {name: set() for name in lines}
    for found in places.values():
        if len({name for name, _ in found}) > 1:
            for name, start in found:
                copied[name] |= set(range(start, start + RUN))
    return {name: (len(copied[name]), len(lines[name])) for name in lines}


def test_hardly_any_code_stands_in_two_files() -> None:
    files = {
        str(path.relative_to(ROOT)): path for folder in ("kecore", "plugins") for path in (ROOT / folder).rglob("*.py")
    }
    found = copies({name: path.read_text(encoding="utf-8") for name, path in files.items()})
    copied, total = (sum(counts) for counts in zip(*found.values(), strict=True))
    worst = ", ".join(
        f"{name}: {n}" for n, name in sorted(((n, name) for name, (n, _) in found.items() if n), reverse=True)
    )
    assert total > 10_000, "the files were not found"
    assert copied / total < LIMIT, f"{copied} of {total} lines are copies: {worst}; make one function of each"


def test_copies_are_found_across_files_whatever_their_layout() -> None:
    block = [f"x{i} = f({i})" for i in range(RUN)]
    one = "\n".join(["import a", "from b import (", "    c,", ")", *block, "y = 1"])
    other = "\n".join(
        ["z = 2", "# said", "", *(f"    {line.replace(' = ', '  =  ')}" for line in block[:3]), "", *block[3:]]
    )
    short = "\n".join(block[: RUN - 1])
    twice = "\n".join(["def g():", *(f"w{i} = {i}" for i in range(RUN))] * 2)
    assert copies({"one": one, "other": other, "short": short, "twice": twice}) == {
        "one": (RUN, RUN + 1),
        "other": (RUN, RUN + 1),
        "short": (0, RUN - 1),
        "twice": (0, 2 * (RUN + 1)),
    }
