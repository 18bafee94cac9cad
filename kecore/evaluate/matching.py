"""Decides whether a generated text gives an answer."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

__all__ = ["Match", "matches", "normalise"]

Match = Literal["prefix", "contains", "exact"]
"""Whether a text must begin with an answer, hold it, or equal it."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Fold case and width, turn punctuation into spaces, drop English articles, squeeze spaces.

    The rule of SQuAD's evaluation (arXiv 1606.05250), with Unicode punctuation. A text of nothing but
    articles and punctuation is only folded, so that it cannot become empty and match everything.

    Examples:
        >>> normalise("The  Hague, (NL).")
        'hague nl'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in folded)
    return " ".join(_ARTICLES.sub(" ", words).split()) or " ".join(folded.split())


def matches(text: str, answer: str, match: Match = "prefix", *, loose: bool = True) -> bool:
    """Return whether ``text`` begins with, holds or equals ``answer``, in whole words.

    Args:
        text: what the model wrote.
        answer: what counts as right.
        match: the rule.
        loose: compare by :func:`normalise`, else only without outer white space.

    Examples:
        >>> matches("Rome. It lies on the Tiber", "rome"), matches("Romeo", "Rome")
        (True, False)
    """
    text, answer = (normalise(text), normalise(answer)) if loose else (text.strip(), answer.strip())
    if not answer:
        return False
    if match == "exact":
        return text == answer
    starts = [0] if match == "prefix" else [m.start() for m in re.finditer(f"(?={re.escape(answer)})", text)]
    return any(
        text.startswith(answer, start) and _cut(text, start) and _cut(text, start + len(answer)) for start in starts
    )


def _cut(text: str, index: int) -> bool:
    """Return whether a word may end at ``index``: not between two letters or digits of a script with spaces."""
    if not 0 < index < len(text):
        return True
    pair = text[index - 1 : index + 1]
    wide = any(unicodedata.east_asian_width(c) in "WF" for c in pair)
    return wide or not all(c.isalnum() for c in pair)
