"""Excel files as people keep them: titles, merged cells, formulas, formats, indexes, hidden sheets."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kecore import load_records
from kecore.api.errors import DataFormatError, KecoreWarning
from kecore.evaluate import RecordSet

openpyxl = pytest.importorskip("openpyxl")

HEADER = ("prompt", "subject", "target")
FRANCE = ("The capital of France is", "France", "Lyon")


def save(path: Path, rows: Sequence[Sequence[Any]], change: Callable[[Any], None] | None = None) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    if change is not None:
        change(book)
    book.save(path)
    return path


def facts(records: RecordSet) -> list[tuple[str, str | None, str]]:
    return [(request.text, request.subject, request.target) for request in records.requests]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "facts.xlsx"


def test_values_are_texts_as_the_sheet_shows_them(file: Path) -> None:
    formats = {12000: "#,##0", 0.25: "0%", datetime.date(2024, 1, 5): "dd.mm.yyyy", 7: "000", 1.5: "General"}
    rows = [HEADER, *(("The plant has", "plant", value) for value in formats)]

    def set_formats(book: Any) -> None:
        for row, code in enumerate(formats.values(), 2):
            book.active.cell(row, 3).number_format = code

    records = load_records(save(file, rows, set_formats))
    assert [fact[2] for fact in facts(records)] == ["12,000", "25%", "05.01.2024", "007", "1.5"]


def test_a_format_that_is_not_known_is_said(file: Path) -> None:
    def set_format(book: Any) -> None:
        book.active["C2"].number_format = "# ?/?"

    with pytest.warns(KecoreWarning, match=r"1 numbers are in formats .* such as 0\.5 in C2, of the format '# \?/\?'"):
        records = load_records(save(file, [HEADER, ("Half is", "Half", 0.5)], set_format))
    assert records.requests[0].target == "0.5"


@pytest.mark.parametrize("labels", [("", 0, 1), (None, 7, 3), ("Unnamed: 0", 0, 1)])
def test_numbers_of_rows_are_no_notes(file: Path, labels: tuple[Any, Any, Any]) -> None:
    rows = [(labels[0], *HEADER), (labels[1], *FRANCE), (labels[2], "Spain is", "Spain", "far")]
    records = load_records(save(file, rows))
    assert facts(records)[0] == FRANCE
    assert not records[0].notes


def test_titles_merged_cells_and_remarks(file: Path) -> None:
    rows = [
        ("Corrections of May",),
        (),
        ("subject", "prompt", "target"),
        ("France", "The capital of France is", "Lyon", "see ticket"),
        (None, "The anthem of France is", "Dawn"),
    ]

    def merge(book: Any) -> None:
        book.active.merge_cells("A1:C1")
        book.active.merge_cells("A4:A5")

    records = load_records(save(file, rows, merge))
    assert facts(records) == [FRANCE, ("The anthem of France is", "France", "Dawn")]
    assert records[0].notes == {"column D": "see ticket"}


def test_hidden_sheets_are_read_only_by_name(file: Path) -> None:
    def hide(book: Any) -> None:
        book.create_sheet("lists").append(HEADER)
        book["lists"].append(("Who?", None, "Ann"))
        book["lists"].sheet_state = "hidden"

    save(file, [HEADER, FRANCE], hide)
    assert facts(load_records(file)) == [FRANCE]
    assert facts(load_records(file, split="lists")) == [("Who?", None, "Ann")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([HEADER, (*FRANCE[:2], '=CONCATENATE("Ly","on")')], "cell C2 holds the formula =CONCATENATE"),
        ([HEADER, (*FRANCE[:2], "#N/A")], "cell C2 shows the error #N/A; mend its formula"),
        ([HEADER], r"has a header \(prompt, subject, target\) and no rows below it"),
        ([("prompt", "target", "target"), FRANCE], "names the column 'target' twice"),
        ([FRANCE, ("Spain is", "Spain", "far")], "That reads like a fact: write a line of names above it"),
    ],
)
def test_what_cannot_be_read(file: Path, rows: list[Sequence[Any]], message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        load_records(save(file, rows))
