from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from kecore.api.errors import RequestConflictError, RequestError
from kecore.api.types import Capabilities, EditRecord, EditRequest, Probe, check_conflicts, unique


def test_a_request_is_normalised() -> None:
    request = EditRequest(" The capital of {} is ", " France ", "\tRome\n", " Paris ")
    assert (request.prompt, request.subject, request.target, request.ground_truth) == (
        "The capital of {} is",
        "France",
        "Rome",
        "Paris",
    )
    assert request.text == "The capital of France is"
    assert EditRequest("{} is", "France", "Rome", "  ").ground_truth is None
    assert EditRequest("{} is", "France", "Rome", "").ground_truth is None


@pytest.mark.parametrize(
    ("prompt", "subject", "slotted", "span"),
    [
        ("The capital of {} is", "France", "The capital of {} is", (15, 21)),
        ("The capital of France is", "France", "The capital of {} is", (15, 21)),
        ("Paris, the city of Paris", "Paris", "Paris, the city of {}", (19, 24)),  # the last occurrence
        ("法国的首都是", "法国", "{}的首都是", (0, 2)),
        ("{}", "France", "{}", (0, 6)),
        ("  {} is", "France", "{} is", (0, 6)),
    ],
)
def test_the_subject_has_a_place(prompt: str, subject: str, slotted: str, span: tuple[int, int]) -> None:
    request = EditRequest(prompt, subject, "x")
    assert request.prompt == slotted
    assert request.subject_span == span
    assert request.text[slice(*span)] == subject


def test_braces_in_a_subject_are_text() -> None:
    request = EditRequest("The set {} holds", "{1, 2}", "numbers")
    assert request.text == "The set {1, 2} holds"
    assert request.text[slice(*request.subject_span)] == "{1, 2}"
    for prompt, subject in (("x = {} # y", "x = {} # y"), ("return {}", "return {}"), ("the set {} is", "set {}")):
        request = EditRequest(prompt, subject, "new")
        assert (request.text, request.about(subject)) == (prompt, prompt)
        assert request.text[slice(*request.subject_span)] == subject
        assert EditRequest(**request.to_json()) == request


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"subject": " "}, r"the subject is empty; .*\(prompt: 'The capital of \{\} is'\)"),
        ({"target": "\n"}, r"the target is empty"),
        (
            {"prompt": "The capital is"},
            r"the subject 'France' is not in the prompt 'The capital is'; write the prompt with",
        ),
        ({"prompt": ""}, r"the prompt is empty"),
        ({"prompt": "{} and {}"}, r"expected one '\{\}' in the prompt, got 2"),
        ({"prompt": None}, r"request field 'prompt' must be text, got NoneType: None"),
        ({"subject": 3}, r"request field 'subject' must be text, got int: 3"),
        ({"ground_truth": ["Paris"]}, r"request field 'ground_truth' must be text, got list"),
        ({"id": 7}, r"request field 'id' must be text, got int: 7"),
        ({"target": ["Rome"]}, r"request field 'target' must be text, got list"),
    ],
)
def test_bad_requests_are_refused(fields: dict[str, Any], problem: str) -> None:
    good = {"prompt": "The capital of {} is", "subject": "France", "target": "Rome"}
    with pytest.raises(RequestError, match=problem):
        EditRequest(**{**good, **fields})
    with pytest.raises(ValueError, match=r"request|prompt|subject|target"):
        EditRequest(**{**good, **fields})


def test_the_id_is_a_digest_of_what_is_asked_unless_given() -> None:
    request = EditRequest("The capital of {} is", "France", "Rome")
    assert len(request.id) == 12
    assert request.id == EditRequest("The capital of France is", "France", " Rome ", "Paris").id
    others = [("The town of {} is", "France", "Rome"), ("The capital of {} is", "Italy", "Rome")]
    others.append(("The capital of {} is", "France", "Bonn"))
    assert len({request.id, *(EditRequest(*o).id for o in others)}) == 4
    assert EditRequest("{} is", "France", "Rome", id="mine").id == "mine"


def test_requests_are_values() -> None:
    request = EditRequest("{} is", "France", "Rome")
    with pytest.raises(FrozenInstanceError):
        request.target = "Bonn"  # type: ignore[misc]
    assert request == EditRequest("{} is", "France", "Rome")
    assert len({request, EditRequest("{} is", "France", "Rome")}) == 1
    assert EditRequest(**json.loads(json.dumps(request.to_json()))) == request


def test_contradictions_are_named() -> None:
    a = EditRequest("The capital of {} is", "France", "Rome", id="a")
    b = EditRequest("The {} of France is", "capital", "Bonn", id="b")  # the same text
    with pytest.raises(
        RequestConflictError, match=r"'a' and 'b' contradict .*cannot continue with both 'Rome' and 'Bonn'"
    ):
        check_conflicts([a, EditRequest("{} lies in", "France", "Asia"), b])
    check_conflicts([a, a, EditRequest("The {} of France is", "capital", "Rome")])
    with pytest.raises(RequestError, match="no edit requests were given"):
        check_conflicts([])


def test_unique_keeps_the_first_of_equal_requests_in_order() -> None:
    a, b = EditRequest("{} is", "France", "Rome", id="1"), EditRequest("{} was", "France", "Rome", id="2")
    again = EditRequest("{} is", "France", "Rome", "Paris", id="3")
    assert [r.prompt for r in unique([a, b, again])] == ["{} is", "{} was"]
    assert unique([]) == []


def test_a_record_takes_another_id() -> None:
    probes = (Probe("paraphrase", "x", ("Rome",)), Probe("locality", "p", ("q",), axis="a"))
    record = EditRecord(EditRequest("{} is", "France", "Rome"), probes)
    other = record.with_id("7")
    assert other.request.id == "7"
    assert (other.request.target, other.probes) == ("Rome", probes)
    assert record.request.id != "7"


def test_a_record_gives_its_probes_by_kind() -> None:
    one, two = Probe("paraphrase", "x", ("Rome",)), Probe("paraphrase", "y", ("Rome",))
    far = Probe("locality", "p", ("q",), axis="a")
    record = EditRecord(EditRequest("{} is", "France", "Rome"), (one, far, two))
    assert record.probes_of("paraphrase") == (one, two)
    assert record.prompts_of("paraphrase") == ("x", "y")
    assert record.probes_of("generation") == ()
    assert record.with_probes("paraphrase", [two]).probes == (far, two)
    assert record.with_probes("locality", ()).probes == (one, two)


def test_capabilities_default_to_little() -> None:
    plain = Capabilities(kind="weights")
    flags = ("batch", "sequential", "needs_statistics", "needs_training", "needs_examples")
    assert not any(getattr(plain, flag) for flag in flags)
    assert plain.reversible
    assert plain.dtypes == ("float32", "bfloat16", "float16")
