"""ICE, and what the methods share that change only prompts: wording, memory of earlier edits, the command line."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make_records import make_record
from typer.testing import CliRunner

from kecore import Editor, EditRequest, PromptEdit, load_edit, models
from kecore.api.errors import ConfigError, EditStateError, KecoreWarning, PromptTooLongError, RequestConflictError
from kecore.cli import app
from kecore.edit import written
from kecore.evaluate import Protocol
from kecore.testing import tiny_model, tiny_tokenizer

FRANCE = EditRequest("The capital of {} is", "France", "Rome", "Paris")
ITALY = EditRequest("The capital of {} is", "Italy", "Berlin")
JAPAN = EditRequest("{}的首都是", "日本", "柏林")
PROMPT = "Where is Paris?"
FACT = ("--prompt", "The Eiffel Tower is in", "--subject", "The Eiffel Tower", "--target", "Rome")
CONFIGS = {
    "ice": (),
    "retrieval": ("--set", "encoder=character-ngrams"),
    "ike": ("--set", "encoder=character-ngrams", "--set", "demonstrations=1"),
}


@pytest.fixture
def editor() -> Iterator[Editor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        yield Editor(tiny_model("llama"), tiny_tokenizer())


def test_the_fact_stands_before_every_prompt(editor: Editor) -> None:
    editor.edit(FRANCE, "ice")
    assert written(editor.model, [FRANCE.text, PROMPT]) == [
        "New Fact: The capital of France is Rome\nPrompt: The capital of France is",
        "New Fact: The capital of France is Rome\nPrompt: Where is Paris?",
    ]


def test_a_batch_is_told_in_one_order_whatever_order_it_came_in(editor: Editor) -> None:
    facts = ("The capital of France is Rome", "The capital of Italy is Berlin", "日本的首都是柏林")
    told = "".join(f"New Fact: {fact}\n" for fact in facts)
    for batch in ([FRANCE, ITALY, JAPAN], [JAPAN, ITALY, FRANCE, ITALY]):
        with editor:
            editor.edit(batch, "ice")
            assert written(editor.model, [PROMPT]) == [f"{told}Prompt: {PROMPT}"]


def test_the_wording_of_ripple_edits_is_a_preset(editor: Editor) -> None:
    editor.edit(FRANCE, "ice", preset="ripple-edits")
    assert written(editor.model, [PROMPT]) == ["Imagine that The capital of France is Rome. Where is Paris?"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", "{prompt} ->", r"must end with \{prompt\}"),
        ("prompt", "Q: {prompt} A: {prompt}", r"must end with \{prompt\}, and hold it once"),
        ("fact", "News: ", r"must hold \{fact\} once"),
    ],
)
def test_a_wording_that_loses_the_prompt_or_the_fact_is_refused(
    editor: Editor, field: str, value: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        editor.edit(FRANCE, "ice", **{field: value})


def test_later_edits_hold_the_earlier_facts_and_replace_those_they_contradict(editor: Editor) -> None:
    editor.edit([FRANCE, ITALY], "ice")
    first = written(editor.model, [PROMPT])
    later = editor.edit(replace(FRANCE, target="Madrid", id=""), "ice", fact="{fact}. ", prompt="{prompt}")
    assert written(editor.model, [PROMPT]) == [
        "The capital of Italy is Berlin. The capital of France is Madrid. Where is Paris?"
    ]
    assert [request.target for request in later.requests] == ["Berlin", "Madrid"]
    editor.revert()
    assert written(editor.model, [PROMPT]) == first
    third = editor.edit(JAPAN, "ice")
    assert [request.target for request in third.requests] == ["Rome", "Berlin", "柏林"]


def test_facts_of_one_batch_must_not_contradict_each_other(editor: Editor) -> None:
    with pytest.raises(RequestConflictError):
        editor.edit([FRANCE, replace(FRANCE, target="Madrid", id="")], "ice")


def test_a_loaded_edit_writes_the_same_to_any_model(editor: Editor, tmp_path: Path) -> None:
    editor.edit([FRANCE, JAPAN], "ice")
    loaded = load_edit(editor.save(tmp_path))
    assert isinstance(loaded, PromptEdit)
    other = tiny_model("gpt2")
    loaded.attach(other)
    assert written(other, [PROMPT]) == written(editor.model, [PROMPT])


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_the_unedited_model_on_the_written_prompts(chat: bool) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer(), chat=chat)
    record = make_record(FRANCE, ("France's capital is",), ("The capital of Italy is", "Anna lives in"))
    protocol = Protocol(form="chat" if chat else "plain", edits="single", max_new_tokens=4)
    with editor:
        editor.edit(record, "ice")
        text, *texts = written(editor.model, [probe.prompt for probe in record.probes])
        edited = editor.evaluate([record], protocol)
    probes = [replace(probe, prompt=prompt) for probe, prompt in zip(record.probes, (text, *texts), strict=True)]
    read = replace(record, request=replace(FRANCE, prompt=text), probes=tuple(probes))
    assert editor.evaluate([read], protocol).scores == edited.scores
    for one, other in zip(editor.evaluate([read], protocol).rows[0].probes, edited.rows[0].probes, strict=True):
        assert (one.scores, one.rival, one.text) == (other.scores, other.rival, other.text)


def test_an_edit_that_asks_the_model_says_what_it_lacks(editor: Editor) -> None:
    editor.edit(FRANCE, "retrieval", encoder="model", threshold=-1.0)
    with pytest.raises(EditStateError, match="asks the edited model itself"):
        written(editor.model, [FRANCE.text])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    file.write_text(json.dumps({"prompt": "The sea is", "subject": "The sea", "target": "red"}) + "\n")
    return file


@pytest.mark.parametrize("method", CONFIGS)
def test_edit_chat_and_inspect(method: str, tiny: Path, examples: Path, tmp_path: Path) -> None:
    more = ("--examples", examples) if method == "ike" else ()
    words = ("edit", tiny, "--method", method, *FACT, *CONFIGS[method], *more, "--out", tmp_path / "edit")
    found = result(*words, "--chat")
    assert found["method"] == method
    assert found["statistics"] is None
    assert found["samples"][0]["prompt"] == "The Eiffel Tower is in"
    assert json.loads((tmp_path / "edit" / "result.json").read_text())["samples"] == found["samples"]
    turns = result(
        "chat", tiny, "--edit", tmp_path / "edit", "--chat", "--max-new-tokens", 20,
        input="The Eiffel Tower is in\nAnna is\n",
    )["turns"]  # fmt: skip
    assert turns[0]["before"].startswith(found["samples"][0]["before"][:3])
    assert (turns[1]["before"] == turns[1]["after"]) == (method == "retrieval")
    assert result("inspect", tmp_path / "edit")["settings"]["facts"][0]["target"] == "Rome"
    for_people = CliRunner().invoke(app, ["inspect", str(tmp_path / "edit")])
    assert for_people.exit_code == 0
    assert "The Eiffel Tower" in for_people.stdout


def test_no_examples(tiny: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["edit", str(tiny), "--method", "ike", *FACT, "--out", str(tmp_path), "--json"])
    said = json.loads(done.stdout)["error"]
    assert said["type"] == "UnsupportedCapabilityError"
    assert "--examples FILE" in said["message"]


def result(*words: object, **options: Any) -> dict[str, Any]:
    """The JSON object of a command that succeeds."""
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--json")], **options)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_nothing_is_written_while_an_edit_is_suspended(editor: Editor) -> None:
    from kecore.edit import suspended

    editor.edit(FRANCE, "ice")
    with suspended(editor.model), torch.no_grad():
        assert written(editor.model, [PROMPT]) == [PROMPT]


def test_more_facts_than_fit_are_refused_with_the_number_that_fits(editor: Editor) -> None:
    facts = [EditRequest("The capital of {} is", f"Country {number}", "Rome") for number in range(40)]
    with pytest.raises(PromptTooLongError, match=r"40 facts before .* holds 256.*: (\d+) of the facts fit") as caught:
        editor.preflight(facts, "ice")  # before anything is run
    fitting = int(re.findall(r"(\d+) of the facts fit", str(caught.value))[0])
    in_order = sorted(facts, key=lambda request: request.text)
    editor.edit(in_order[:fitting], "ice")
    with pytest.raises(PromptTooLongError, match=f"{fitting} of the facts fit"):
        editor.edit(in_order[fitting], "ice")  # with the facts of the edit before


def test_the_command_suggests_nothing_that_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    folder = models.save_model(model, tokenizer, tmp_path / "model")  # type: ignore[arg-type]
    for method, shown in (("ice", False), ("lora", True)):
        words = ["edit", str(folder), "--method", method, *FACT, "--no-evaluate", "--out", str(tmp_path / method)]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert ("kecore attach" in done.stdout, "kecore export" in done.stdout) == (shown, shown)
        assert ("cannot carry it" in done.stderr) is not shown
    assert load_edit(tmp_path / "ice").model == str(folder)
