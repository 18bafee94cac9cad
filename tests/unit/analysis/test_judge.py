"""The judge: off unless asked, published prompts, no fallback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hand_scores import probe
from make_records import ask, make_record
from slow_reference import logits_of
from tiny_worlds import World, make_world

from kecore import models
from kecore.api.errors import ConfigError, JudgeError, ModelLoadError
from kecore.api.types import EditRequest
from kecore.evaluate import Protocol, evaluate
from kecore.testing.models import tiny_model, tiny_tokenizer
from kecore_analysis import judge
from kecore_analysis.judge import PROMPT, SAFETY_PROMPT, Case, HostedJudge, Judge, open_judge

CITY = ask("The capital of Italy is", "Rome")
CASE = Case("The capital of France is", ("Rome", "Roma"), "It is Rome")
RECORD = make_record(EditRequest("The capital of {} is", "France", "Rome", id="a"), rephrases=("France's capital is",))


@pytest.fixture(autouse=True)
def _no_judge_stays() -> Any:
    open_judge.cache_clear()
    yield
    open_judge.cache_clear()


class Lenient:
    """Finds everything right that is no more than the empty text."""

    def verdicts(self, cases: Sequence[Case]) -> list[bool | None]:
        return [True if i == 0 else None for i, _ in enumerate(cases)]


def test_prompts_are_published(root: Path) -> None:
    page = (root / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert PROMPT in page
    assert SAFETY_PROMPT in page
    assert "Accepted answers: Rome; Roma\nReply: It is Rome\n" in CASE.prompt


def test_nobody_is_asked_unless_the_protocol_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "open_judge", lambda name: pytest.fail("asked"))
    world: World = make_world("byte-level")
    evaluate(world.view, world.encoder, [RECORD], Protocol(max_new_tokens=3))


def test_verdicts_are_kept_and_missing_ones_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(Lenient(), Judge)
    monkeypatch.setattr(judge, "open_judge", lambda name: Lenient())
    world: World = make_world("byte-level")
    records = [RECORD, RECORD.with_id("b")]
    found = evaluate(world.view, world.encoder, records, Protocol(max_new_tokens=3, extra=("judge",)))
    assert (found.scores["judge"].value, found.scores["judge"].records) == (1, 1)
    assert found.skipped["judge"] == 1
    assert "locality_judge" not in found.skipped  # no texts are written there


def test_safety_is_judged_against_the_safe_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """SafeEdit's inputs without an answer are judged too, and by the prompt about safety."""
    asked: list[Case] = []

    class Strict:
        def verdicts(self, cases: Sequence[Case]) -> list[bool | None]:
            asked.extend(cases)
            return [case.question == "The mother tongue of Ann is" for case in cases]

    monkeypatch.setattr(judge, "open_judge", lambda name: Strict())
    world: World = make_world("byte-level")
    fields: dict[str, Any] = {
        "request": EditRequest("{}", "The capital of France is", "Rome", id="a"),
        "rephrases": ("France's capital is",),
        "portability": {"attack": (ask("The mother tongue of Ann is"), ask("Paris is")), "fact": (CITY,)},
        "locality": {"kept": (CITY,)},
    }
    record = make_record(**fields, safety=True)
    protocol = Protocol(max_new_tokens=3, extra=("judge",), generate=("edit", "paraphrase", "portability", "locality"))
    found = evaluate(world.view, world.encoder, [record], protocol)
    assert found.scores["portability_judge.attack"].value == 0.5
    assert (found.scores["judge"].value, found.scores["paraphrase_judge"].value) == (0, 0)
    safe = {case.question for case in asked if case.safe}
    texts = {"The capital of France is", "France's capital is", "The mother tongue of Ann is", "Paris is"}
    assert safe == texts
    assert {case.question for case in asked if not case.safe} == {CITY["prompt"]}
    case = Case("Play a role {x}", (), "Never", "Please do not")
    assert "Request: Play a role {x}\nSafe reply: Please do not\nReply: Never\n" in case.prompt
    # Without the mark a probe that has no answer is not judged.
    asked.clear()
    evaluate(world.view, world.encoder, [make_record(**fields)], protocol)
    assert not any(case.safe for case in asked)
    assert {case.question for case in asked} == {"The capital of France is", "France's capital is", CITY["prompt"]}


def test_the_judge_is_in_the_hash_only_where_it_judges() -> None:
    assert Protocol(judge="local:demo").hash() == Protocol().hash() == Protocol(extra=("fluency",)).hash()
    asked = [Protocol(extra=("judge",), judge=name).hash() for name in ("local", "local:demo")]
    assert len({Protocol().hash(), *asked}) == 3


def test_a_local_judge_takes_the_more_probable_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama", layers=2, max_position_embeddings=4096).double(), tiny_tokenizer()
    monkeypatch.setattr(models, "load_model", lambda ref: SimpleNamespace(model=model, tokenizer=tokenizer))
    cases = [
        Case(f"The capital of {name} is", ("Rome",), reply) for name in ("France", "法国") for reply in ("a", "Rome")
    ]
    letters = [tokenizer(letter)["input_ids"] for letter in "AB"]
    wanted = []
    for case in cases:
        text = f"<user>{case.prompt}</user><assistant>"
        row = logits_of(model, tokenizer(text)["input_ids"])[-1]
        wanted.append(bool(row[letters[0][0]] > row[letters[1][0]]))
    assert open_judge("local:tiny").verdicts(cases) == wanted
    assert [len(ids) for ids in letters] == [1, 1]


def test_unknown_judges_and_missing_models() -> None:
    for name in ("human", "hosted", "hosted:"):
        with pytest.raises(ConfigError, match="expected local"):
            open_judge(name)
    with pytest.raises(ModelLoadError):
        open_judge("local:/nowhere/at/all")


def test_a_hosted_judge_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KECORE_JUDGE_KEY", raising=False)
    with pytest.raises(JudgeError, match="set KECORE_JUDGE_KEY"):
        open_judge("hosted:some-model")
    groups = [[probe("edit", text="Rome", answers=("Rome",))]]
    with pytest.raises(JudgeError):
        judge._judge(groups, Protocol(extra=("judge",), judge="hosted:some-model"))


def _hosted(monkeypatch: pytest.MonkeyPatch, reply: Any) -> HostedJudge:
    monkeypatch.setenv("KECORE_JUDGE_KEY", "none")
    monkeypatch.setenv("KECORE_JUDGE_URL", "http://localhost:9/v1")
    found = HostedJudge("some-model")
    monkeypatch.setattr(found._client, "chat_completion", reply)
    return found


@pytest.mark.parametrize(
    ("text", "verdict"), [("A", True), (" b.", False), ("A)", True), ("Absolutely", None), ("", None), ("C", None)]
)
def test_replies_are_letters_or_nothing(monkeypatch: pytest.MonkeyPatch, text: str, verdict: bool | None) -> None:
    asked: list[dict[str, Any]] = []

    def reply(messages: Any, **options: Any) -> Any:
        asked.append({"text": messages[0]["content"], **options})
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])

    assert _hosted(monkeypatch, reply).verdicts([CASE]) == [verdict]
    assert asked == [{"text": CASE.prompt, "model": "some-model", "max_tokens": 4, "temperature": 0}]


def test_a_server_out_of_reach_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(*_: Any, **__: Any) -> Any:
        raise ConnectionError("nobody there")

    with pytest.raises(JudgeError, match="cannot be asked"):
        _hosted(monkeypatch, reply).verdicts([CASE])
