"""Matching of generated text, by cases."""

from __future__ import annotations

import pytest

from kecore.evaluate.matching import matches, normalise


@pytest.mark.parametrize(
    ("text", "answer", "prefix", "contains", "exact"),
    [
        ("Rome", "Rome", True, True, True),
        ("rome.", "Rome", True, True, True),
        ("the Hague", "The Hague", True, True, True),
        ("Rome, the city", "Rome", True, True, False),
        ("the city of Rome", "Rome", False, True, False),
        ("Romeo and Juliet", "Rome", False, False, False),
        ("Paris. The capital of Italy is Rome.", "Rome", False, True, False),
        ("Chrome and Rome", "Rome", False, True, False),
        ("", "Rome", False, False, False),
        ("Rome", "", False, False, False),
        ("it is", "The", False, False, False),
        ("1,998 people", "1998", False, False, False),
        ("東京です", "東京", True, True, False),
        ("日本の東京です", "東京", False, True, False),
        ("I don’t know.", "I don't know", True, True, True),
        ("ＲＯＭＥ", "Rome", True, True, True),
    ],
)
def test_rules(text: str, answer: str, prefix: bool, contains: bool, exact: bool) -> None:
    assert matches(text, answer, "prefix") is prefix
    assert matches(text, answer, "contains") is contains
    assert matches(text, answer, "exact") is exact


def test_strict_matching_minds_case() -> None:
    assert not matches("rome", "Rome", loose=False)
    assert matches(" Rome ", "Rome", "exact", loose=False)


def test_nothing_but_articles_is_not_empty() -> None:
    assert normalise("The") == "the"
    assert normalise("...") == "..."
