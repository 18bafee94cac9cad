"""What a spreadsheet shows of a value; the expectations are what spreadsheet programs show for these formats."""

from __future__ import annotations

import datetime as dt

import pytest

from kecore.evaluate.cell_formats import Cell, shown

DAY, NOON = dt.datetime(2024, 1, 5), dt.datetime(2024, 1, 5, 15, 5, 9)


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        (12000, "General", "12000"),
        (1e6, "General", "1000000"),
        (0.1 + 0.2, "General", "0.3"),
        (1 / 3, "General", "0.3333333333"),
        (True, "General", "TRUE"),
        (12000, "#,##0", "12,000"),
        (1234567.891, "#,##0.00", "1,234,567.89"),
        (0.25, "0%", "25%"),
        (0.256, "0.0%", "25.6%"),
        (2.5, "0", "3"),
        (3.0, "0.##", "3"),
        (3.1, "0.00", "3.10"),
        (0.5, "#.0", ".5"),
        (7, "000", "007"),
        (12345, "0.00E+00", "1.23E+04"),
        (1500000, '0.0,,"M"', "1.5M"),
        (1234.5, '"$"#,##0.00', "$1,234.50"),
        (1234.5, "[$€-407] #,##0.00", "€ 1,234.50"),
        (12000, "#,##0 [$kr-41D]", "12,000 kr"),
        (5, '0 "km"', "5 km"),
        (-5, "0", "-5"),
        (-5, "0;(0)", "(5)"),
        (-0.4, "0", "0"),
        (0, '0;-0;"none"', "none"),
        (1.5, '_(* #,##0.00_);_(* \\(#,##0.00\\);_(* "-"??_);_(@_)', "1.50"),
        (0, '_(* #,##0.00_);_(* \\(#,##0.00\\);_(* "-"??_);_(@_)', "-"),
        (DAY, "DD.MM.YYYY", "05.01.2024"),
        (DAY, "d/m/yyyy;@", "5/1/2024"),
        (DAY, "mmm-yy", "Jan-24"),
        (DAY, "dddd, mmmm d, yyyy", "Friday, January 5, 2024"),
        (DAY, "[$-409]d mmmm yyyy", "5 January 2024"),
        (DAY, 'yyyy"年"m"月"d"日"', "2024年1月5日"),
        (dt.date(2024, 1, 5), "yyyy", "2024"),
        (NOON, "yyyy-mm-dd hh:mm", "2024-01-05 15:05"),
        (NOON, "h:mm AM/PM", "3:05 PM"),
        (dt.time(9, 30, 5), "mm:ss", "30:05"),
        (dt.timedelta(hours=30, minutes=5), "[h]:mm:ss", "30:05:00"),
        ("text", "#,##0", "text"),
    ],
)
def test_as_shown(value: Cell, code: str, text: str) -> None:
    assert shown(value, code) == text


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        (DAY, "mm-dd-yy", "2024-01-05"),
        (NOON, "m/d/yy h:mm", "2024-01-05 15:05:09"),
        (DAY, "[$-F800]dddd, mmmm dd, yyyy", "2024-01-05"),
        (DAY, "[$-407]d. mmmm yyyy", "2024-01-05"),
    ],
)
def test_dates_that_each_program_shows_in_its_own_way_are_iso(value: Cell, code: str, text: str) -> None:
    assert shown(value, code) == text


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.5, "# ?/?"), (5551234, "000-0000"), (42, "[>=100]0;0.0"), (dt.timedelta(hours=3), "[mm]:ss.0")],
)
def test_formats_that_are_not_known(value: Cell, code: str) -> None:
    assert shown(value, code) is None
