"""What ``kecore check`` finds doubtful about facts, without a model and with its tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kecore import EditRecord, EditRequest
from kecore.testing.models import tiny_tokenizer
from kecore.text import Encoder
from kecore_analysis.doubts import LONG_TARGET, find_doubts, find_target_doubts

FRANCE = EditRequest("The capital of France is", "France", "Lyon", "Paris")


def kinds(*requests: EditRequest, **record: Any) -> dict[str, tuple[int, bool]]:
    """Number of facts, and whether they stop the edit, by the beginning of the doubt."""
    doubts = find_doubts([EditRecord(request, **record) for request in requests])
    return {doubt.kind.partition(";")[0]: (len(doubt.ids), doubt.stops) for doubt in doubts}


def test_facts_without_doubts() -> None:
    assert kinds(FRANCE) == {}


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "kind", "stops"),
    [
        ("The capital of France is", "France", "Nice", "two targets for one prompt", True),
        ("the Capital of  FRANCE is", "FRANCE", "Nice", "two targets for one prompt in two spellings", False),
        ("the Capital of  FRANCE is", "FRANCE", "lyon", "given more than once", False),
        ("The capital of France is", "France", "Lyon", "given more than once", False),
        ("Paris, not paris Hilton, is", "Paris", "a city", "subject stands in the prompt more than once", False),
        ("AcmeSoft is made by", "Acme", "Ann", "subject is part of a longer word", False),
        ("Who runs it?", None, "Ann", "without a subject", False),
    ],
)
def test_doubts_about_a_second_fact(prompt: str, subject: str | None, target: str, kind: str, stops: bool) -> None:
    assert kinds(FRANCE, EditRequest(prompt, subject, target, "Paris")) == {kind: (1, stops)}


def test_unicode_forms_are_one_spelling() -> None:
    composed, decomposed = EditRequest("Zo\u00e9 is in", None, "Lyon"), EditRequest("Zoe\u0301 is in", None, "Nice")
    assert kinds(composed, decomposed)["two targets for one prompt in two spellings"] == (1, False)


def test_a_chat_without_its_beginning() -> None:
    kind = "a chat of which the last reply alone is edited, without the turns before"
    assert kinds(FRANCE, notes={"earlier turns": "user: Hi"}) == {kind: (1, False)}


def test_targets_that_a_tokenizer_divides_into_many_parts() -> None:
    encoder = Encoder(tiny_tokenizer("byte-bpe"))
    emoji = EditRequest("The sign of Acme is", "Acme", "\U0001f50d pizza")
    long = EditRequest("The rule of Acme is", "Acme", "xq zj vk " * LONG_TARGET)
    many, split = find_target_doubts(encoder, [FRANCE, emoji, long])
    assert (many.ids, many.stops) == ((long.id,), False)
    assert (split.ids, split.stops) == ((emoji.id,), False)
    assert split.example.startswith("4 of ")


def test_a_target_that_a_tokenizer_has_no_token_for() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "it": 1, "is": 2, "far": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))
    (doubt,) = find_target_doubts(encoder, [EditRequest("it is", None, "Lyon"), EditRequest("it is", None, "far")])
    assert (len(doubt.ids), doubt.stops) == (1, True)


def test_statements_with_labels() -> None:
    kind = "target is a label"
    statements = [EditRequest("Lions fly", "Lions", "0", "1"), EditRequest("Birds fly", "Birds", "1", "0")]
    assert kinds(*statements) == {kind: (2, False)}
    assert kinds(*statements, FRANCE) == {}
    assert kinds(EditRequest("Do lions fly?", "lions", "No", "Yes")) == {}
