"""Finds a subject in a prompt that spells it otherwise: letter case, Unicode forms, spaces and quotation marks."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["fold", "spelt_in", "stands_alone"]

_SAME = str.maketrans({
    "\u00a0": " ", "\u2007": " ", "\u202f": " ", "\u2009": " ",  # spaces that do not break, and narrow ones
    "\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u2032": "'", "\u00b4": "'", "`": "'",
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2033": '"', "\u00ab": '"', "\u00bb": '"',
    "\u2010": "-", "\u2011": "-", "\u2212": "-", "\u2013": "-",
})  # fmt: skip


def fold(text: str) -> str:
    """Return a text without differences of spelling: equal for texts that differ in these alone.

    Examples:
        >>> fold("The  CAPITAL of \u2018Zoe\u0301\u2019") == fold("the capital of 'Zo\u00e9'")
        True
    """
    return " ".join(_fold(text)[0].split())


def spelt_in(prompt: str, subject: str) -> str | None:
    """Return a subject as a prompt spells it; None where the prompt does not hold it in any spelling.

    Of several places the last one counts, those where it is a word of its own before others.

    Examples:
        >>> spelt_in("the halden plant belongs to", "Halden plant")
        'halden plant'
    """
    folded, places = _fold(prompt)
    wanted, _ = _fold(subject)
    pattern = re.escape(wanted)
    matches = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", folded)) or list(re.finditer(pattern, folded))
    if not matches or not wanted:
        return None
    start, end = places[matches[-1].start()], places[matches[-1].end() - 1] + 1
    while end < len(prompt) and unicodedata.combining(prompt[end]):
        end += 1  # an accent that stands behind its letter belongs to it
    return prompt[start:end]


def stands_alone(prompt: str, subject: str) -> bool:
    """Return whether a prompt holds a subject exactly as it is spelt, as words of its own."""
    start = prompt.find(subject)
    while start >= 0:
        before, after = prompt[:start][-1:], prompt[start + len(subject) :][:1]
        if not before.isalnum() and not after.isalnum() and not (after and unicodedata.combining(after)):
            return True
        start = prompt.find(subject, start + 1)
    return False


def _fold(text: str) -> tuple[str, list[int]]:
    """Return a text without differences of spelling, and for each of its characters the place in ``text``."""
    characters: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        plain = " " if character.isspace() else character.translate(_SAME)
        for part in unicodedata.normalize("NFD", plain).casefold():
            characters.append(part)
            places.append(place)
    return "".join(characters), places
