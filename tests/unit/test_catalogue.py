"""The catalogue says of every method what can be set, what it can, needs and costs, and when to take it."""

from __future__ import annotations

from typing import Any

import pytest

import kecore
from kecore.api.errors import MethodNotFoundError
from kecore.api.registry import default_registry


def test_every_method_has_a_card() -> None:
    catalogue = kecore.methods()
    assert [card.name for card in catalogue] == default_registry().names()
    assert sum(map(len, catalogue.families().values())) == len(catalogue)
    for card in catalogue:
        method = default_registry().get(card.name)
        assert card.summary
        assert card.use_when
        assert card.reference == method.reference
        assert {field.name for field in card.fields} == set(method.Config.model_fields)
        assert all(field.meaning for field in card.fields)
        assert card.presets == method.Config.presets()


def test_one_card() -> None:
    card = kecore.methods("memit + blue")
    assert (card.name, card.family, card.changes) == ("memit + blue", "locate", "weights")
    steps = next(field for field in card.fields if field.name == "steps")
    assert (steps.type, steps.default, steps.bounds) == ("int", 20, ">= 1")
    measured = kecore.methods()["memit"].measured
    assert measured is not None
    assert (measured.success, measured.seconds_per_fact) == (1.0, 10.62)
    assert kecore.methods("grace").to_json()["measured"]["neighbours"] == 0.792
    with pytest.raises(MethodNotFoundError, match="did you mean 'memit'"):
        kecore.methods("memti")


def test_a_class_that_is_not_installed() -> None:
    from kecore_methods.memory.grace import Grace

    class Mine(Grace):
        """Do as Grace does."""

        name = "mine"

    card = kecore.methods(Mine)
    assert (card.summary, card.measured, card.docs) == ("Do as Grace does.", None, "")
    assert card.family == __name__.partition(".")[0]


def test_it_prints_in_lines_and_as_a_table() -> None:
    catalogue: Any = kecore.methods()
    lines = repr(catalogue).splitlines()
    assert len(lines) == len(catalogue)
    assert max(map(len, lines)) <= 120
    page = catalogue._repr_html_()
    assert all(f">{card.title}</td>" in page for card in catalogue)
    card: Any = catalogue["memit"]
    assert "presets: gpt2-xl" in repr(card)
    assert ">preservation</td>" in card._repr_html_()
    assert [card.name for card in catalogue[:2]] == ["adalora", "alphaedit"]
