"""What a spreadsheet shows of a number or a date: its value in the number format of the cell.

The codes of number formats are those of Office Open XML (ECMA-376, part 1, section 18.8.31). Dates in a format that
follows the reader's own settings, and the names of months in other languages than English, are written by ISO 8601.
"""

from __future__ import annotations

import datetime
import re
from decimal import ROUND_HALF_UP, Decimal
from typing import TypeAlias

__all__ = ["Cell", "shown"]

Cell: TypeAlias = str | bool | int | float | datetime.date | datetime.time | datetime.timedelta

_TOKEN = re.compile(
    r'"[^"]*"|\\.|_.|\*.|\[[^\]]*\]|AM/PM|A/P|[0#?.,]+|E[+-]0+|([ymdhs])\1*|.', re.IGNORECASE | re.DOTALL
)
_PATTERN = re.compile(r"(?P<whole>[0#?,]*)(?:\.(?P<fraction>[0#?]*))?(?P<thousands>,*)")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_OF_THE_READER = ("mm-dd-yy", "m/d/yy h:mm", "m/d/yyyy", "m/d/yyyy h:mm")
"""Formats 14 and 22, which every program shows as its country writes dates."""
_ENGLISH = 0x09
"""Primary language of a locale, its lowest ten bits."""


def shown(value: Cell, code: str) -> str | None:
    """Return a cell's value as the sheet shows it; None where the format is one that is not known here.

    Args:
        value: number, date, time, duration, boolean or text.
        code: the cell's number format, such as ``#,##0.00`` or ``dd.mm.yyyy``.

    Examples:
        >>> shown(12000, "#,##0"), shown(0.255, "0.0%"), shown(datetime.date(2024, 5, 1), "d mmmm yyyy")
        ('12,000', '25.5%', '1 May 2024')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        return _general(value) if code in ("General", "@", "") else _number(value, code)
    if isinstance(value, datetime.timedelta):
        return _elapsed(value, code)
    return _date(value, code.split(";")[0])


def _general(value: float) -> str:
    """Write a number as cells without a format do: whole numbers in full, others with at most ten digits."""
    if isinstance(value, int) or value.is_integer():
        return str(int(value))
    text = f"{value:.10g}"
    return str(value) if "e" in text else text


def _number(value: float, code: str) -> str | None:
    sections = _sections(code)
    if any(re.search(r"\[[<>=]", section) for section in sections):
        return None  # conditions of one's own
    section = sections[0]
    sign = "-" if value < 0 else ""
    if value < 0 and len(sections) > 1:
        section, sign = sections[1], ""
    elif value == 0 and len(sections) > 2:
        section = sections[2]
    pieces = _pieces(section)
    patterns = [piece for piece, is_pattern in pieces if is_pattern]
    literals = "".join(piece for piece, is_pattern in pieces if not is_pattern)
    if len(patterns) > 1 or "/" in literals or "General" in section:
        return None  # fractions, and numbers in groups of digits, such as those of telephones
    if not patterns:
        return (sign + literals).strip()
    scale = Decimal(100) ** section.count("%")
    digits = _digits(abs(Decimal(repr(value))) * scale, patterns[0])
    if digits is None:
        return None
    text = "".join(digits if is_pattern else piece for piece, is_pattern in pieces)
    return (sign + text).strip() if digits.strip("0.,") else text.strip()  # nothing is shown as -0


def _sections(code: str) -> list[str]:
    """Divide a format into those of positive, negative and zero values."""
    sections = [""]
    for token in _TOKEN.finditer(code):
        if token[0] == ";":
            sections.append("")
        else:
            sections[-1] += token[0]
    return sections


def _pieces(section: str) -> list[tuple[str, bool]]:
    """Divide a section into texts and patterns of digits; the flag is set for patterns."""
    pieces: list[tuple[str, bool]] = []
    for match in _TOKEN.finditer(section):
        token = match[0]
        if token[0] in "0#?" or re.fullmatch(r"\.[0#?]+", token):
            pieces.append((token, True))
        elif re.fullmatch(r"E[+-]0+", token, re.IGNORECASE) and pieces and pieces[-1][1]:
            pieces[-1] = (pieces[-1][0] + token, True)
        else:
            pieces.append((_literal(token), False))
    return pieces


def _literal(token: str) -> str:
    """Return what a part of a format that holds no digits shows."""
    if token[0] == '"':
        return token[1:-1]
    if token[0] == "\\":
        return token[1:]
    if token[0] == "[":
        currency = re.fullmatch(r"\[\$([^-\]]*)(?:-[^\]]*)?\]", token)
        return currency[1] if currency else ""  # else a colour
    return "" if token[0] in "_*" and len(token) == 2 else token  # room as wide as a character, or filled with it


def _digits(value: Decimal, pattern: str) -> str | None:
    """Write a number that is not negative by a pattern such as ``#,##0.00``, ``000`` or ``0.00E+00``."""
    mantissa, _, exponent = pattern.upper().partition("E")
    match = _PATTERN.fullmatch(mantissa)
    if match is None:
        return None
    whole, fraction = match["whole"], match["fraction"] or ""
    if exponent:
        if whole not in ("0", "#") or exponent != "+00":
            return None
        digits, _, power = f"{value:.{len(fraction)}E}".partition("E")
        return f"{digits}E{power[0]}{power[1:].rjust(2, '0')}"
    thousands = len(match["thousands"]) + len(whole) - len(whole.rstrip(","))  # each divides by a thousand
    whole = whole.rstrip(",")
    rounded = (value / 1000**thousands).quantize(Decimal(1).scaleb(-len(fraction)), ROUND_HALF_UP)
    before, _, after = f"{rounded:f}".partition(".")
    while after and len(after) > fraction.count("0") and after.endswith("0"):
        after = after[:-1]
    before = before.lstrip("0").rjust(whole.count("0"), "0")
    if "," in whole:
        before = re.sub(r"(?<=\d)(?=(\d{3})+$)", ",", before)
    return f"{before}.{after}" if after else before


def _date(value: datetime.date | datetime.time, code: str) -> str:
    """Write a date or a time; by ISO 8601 where the format follows settings of the reader."""
    tokens = [match[0] for match in _TOKEN.finditer(code)]
    if code.casefold() in _OF_THE_READER or not _is_english(tokens):
        return _iso(value)
    date = value if isinstance(value, datetime.date) else None
    time = value if isinstance(value, datetime.datetime | datetime.time) else datetime.time()
    has_noon = any(token.upper() in ("AM/PM", "A/P") for token in tokens)
    written: list[str] = []
    for index, token in enumerate(tokens):
        kind = token.casefold()
        if kind in ("m", "mm") and _is_minute(tokens, index):
            written.append(str(time.minute).rjust(len(kind), "0"))
        elif kind[0] in "ymd":
            if date is None:
                return _iso(value)
            written.append(_date_part(date, kind))
        elif kind[0] == "h":
            hour = (time.hour + 11) % 12 + 1 if has_noon else time.hour
            written.append(str(hour).rjust(len(kind), "0"))
        elif kind[0] == "s":
            written.append(str(time.second).rjust(len(kind), "0"))
        elif kind in ("am/pm", "a/p"):
            half = "PM" if time.hour >= 12 else "AM"
            written.append(half if kind == "am/pm" else half[0])
        elif token[0] in "0#?":
            return _iso(value)
        else:
            written.append(_literal(token))
    return "".join(written).strip() or _iso(value)


def _date_part(date: datetime.date, kind: str) -> str:
    """Write year, month or day as ``yyyy``, ``mmm``, ``dddd`` and so on say."""
    length = len(kind)
    if kind[0] == "y":
        return f"{date.year:04d}" if length > 2 else f"{date.year % 100:02d}"
    number, names = (date.month, _MONTHS) if kind[0] == "m" else (date.day, _DAYS)
    if length < 3:
        return str(number).rjust(length, "0")
    name = names[date.month - 1] if kind[0] == "m" else names[date.weekday()]
    return {3: name[:3], 5: name[:1]}.get(length, name)


def _is_minute(tokens: list[str], index: int) -> bool:
    """Return whether an ``m`` stands behind hours or before seconds, where it means minutes."""
    kinds = [
        (at, token.casefold().strip("[]")[:1])
        for at, token in enumerate(tokens)
        if re.match(r"\[?[ymdhs]", token, re.IGNORECASE)
    ]
    before = [kind for at, kind in kinds if at < index]
    after = [kind for at, kind in kinds if at > index]
    return before[-1:] == ["h"] or after[:1] == ["s"]


def _is_english(tokens: list[str]) -> bool:
    """Return whether names of months and days, if there are any, are English, and no setting of the reader decides."""
    locales = [match[1] for token in tokens if (match := re.fullmatch(r"\[\$[^-\]]*-([^\]]*)\]", token))]
    if any(locale.upper() in ("F800", "F400", "X-SYSDATE", "X-SYSTIME") for locale in locales):
        return False
    has_names = any(re.fullmatch(r"m{3,}|d{3,}", token, re.IGNORECASE) for token in tokens)
    foreign = [locale for locale in locales if not _is_english_locale(locale)]
    return not (has_names and foreign)


def _is_english_locale(locale: str) -> bool:
    if re.fullmatch(r"[0-9a-f]+", locale, re.IGNORECASE):
        return int(locale, 16) & 0x3FF == _ENGLISH
    return locale.casefold().startswith("en")


def _elapsed(value: datetime.timedelta, code: str) -> str | None:
    """Write a duration in ``[h]:mm`` or ``[h]:mm:ss``."""
    match = re.fullmatch(r"\[h+\]:mm(:ss)?(;@)?", code, re.IGNORECASE)
    if match is None:
        return None
    seconds = round(value.total_seconds())
    text = f"{seconds // 3600}:{seconds // 60 % 60:02d}"
    return f"{text}:{seconds % 60:02d}" if match[1] else text


def _iso(value: datetime.date | datetime.time) -> str:
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(sep=" ")
    return value.isoformat()
