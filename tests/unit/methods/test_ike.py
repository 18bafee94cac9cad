"""IKE: which examples demonstrate a fact, in what order and words, against brute force."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make_records import ask, make_record

from kecore import Editor, EditRecord, EditRequest, PromptEdit, load_edit
from kecore.api.errors import KecoreWarning, UnsupportedCapabilityError
from kecore.edit import written
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_methods.prompt.encoders import CHARACTERS, load_sentence_encoder
from kecore_methods.prompt.ike import IkeConfig, choose_examples, demonstration

FRANCE = EditRequest("The capital of {} is", "France", "Rome", "Paris")
COOK = EditRequest("{} is the chief executive of", "Tim Cook", "Microsoft")
EXAMPLE = make_record(
    EditRequest("The capital of {} is", "Spain", "Oslo", "Madrid"),
    rephrases=("Spain's capital is",),
    neighbourhood=("The capital of Portugal is",),
)
KNOWLEDGE = "New Fact: The capital of Spain is Oslo\n"


def pool() -> list[EditRecord]:
    """Examples of one relation each, with paraphrases and neighbours."""
    facts = [
        ("The capital of {} is", "Spain"),
        ("The capital of {} is", "France"),  # what is to be edited itself
        ("{} is the chief executive of", "Steve Jobs"),
        ("The river {} flows through", "Danube"),
        ("{} was born in", "Mozart"),
        ("People in {} speak", "Chile"),
    ]
    return [
        make_record(EditRequest(prompt, subject, "Oslo", "Vienna"), (f"{subject}?",), (f"Not about {subject}:",))
        for prompt, subject in facts
    ]


@pytest.fixture
def editor() -> Iterator[Editor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        yield Editor(tiny_model("llama"), tiny_tokenizer(), examples=pool())


def test_three_kinds_of_demonstrations_follow_the_template() -> None:
    words = IkeConfig()
    assert demonstration(words, EXAMPLE, "copy") == f"{KNOWLEDGE}Prompt: The capital of Spain is Oslo\n\n"
    assert demonstration(words, EXAMPLE, "update") == f"{KNOWLEDGE}Prompt: Spain's capital is Oslo\n\n"
    assert demonstration(words, EXAMPLE, "retain") == f"{KNOWLEDGE}Prompt: The capital of Portugal is Madrid\n\n"


def test_a_locality_probe_is_retained_and_what_is_missing_is_copied() -> None:
    words = IkeConfig()
    bare = EditRecord(EXAMPLE.request)
    probed = make_record(EXAMPLE.request, locality={"other": (ask("The sea is"), ask("Grass is", "green"))})
    assert demonstration(words, probed, "retain") == f"{KNOWLEDGE}Prompt: Grass is green\n\n"
    assert demonstration(words, bare, "retain") == demonstration(words, bare, "update")
    assert demonstration(words, bare, "update") == demonstration(words, EXAMPLE, "copy")
    unknown = make_record(replace(EXAMPLE.request, ground_truth=None), neighbourhood=("The capital of Portugal is",))
    assert demonstration(words, unknown, "retain") == demonstration(words, EXAMPLE, "copy")


def test_the_nearest_examples_are_those_of_brute_force_and_the_nearest_stands_last(editor: Editor) -> None:
    examples, embed = pool(), load_sentence_encoder(CHARACTERS)
    asked = embed(["The capital of France is Rome"])[0].double()
    like = [
        float(asked @ embed([f"{r.request.text} {r.request.target}"])[0].double())
        if r.request.text != FRANCE.text
        else -1
        for r in examples
    ]
    order = sorted(range(len(like)), key=lambda i: -like[i])[:3]
    kinds = ("retain", "update", "retain")  # of the nearest, the second, the third
    expected = [demonstration(IkeConfig(), examples[i], kind) for i, kind in zip(order, kinds, strict=True)]
    editor.edit(FRANCE, "ike", encoder=CHARACTERS, demonstrations=3)
    assert written(editor.model, ["Where is Paris?"]) == [
        "".join(reversed(expected)) + "New Fact: The capital of France is Rome\nPrompt: Where is Paris?"
    ]


def test_the_new_fact_itself_can_be_the_last_demonstration(editor: Editor) -> None:
    config: dict[str, Any] = {"encoder": CHARACTERS, "demonstrations": 2}
    with editor:
        editor.edit(FRANCE, "ike", **config)
        (without,) = written(editor.model, ["Where is Paris?"])
    editor.edit(FRANCE, "ike", repeat=True, **config)
    own, end = "New Fact: The capital of France is Rome\n", "Prompt: Where is Paris?"
    assert written(editor.model, ["Where is Paris?"]) == [
        without.removesuffix(own + end) + f"{own}Prompt: The capital of France is Rome\n\n" + own + end
    ]


def test_kinds_come_in_their_shares_and_a_small_pool_is_used_up() -> None:
    examples = [EditRecord(EditRequest("Number {} is", f"n{i}", "even")) for i in range(40)]
    (chosen,) = choose_examples(torch.linspace(0, 1, 40)[None], [FRANCE], examples, 32)
    assert [i for i, _ in chosen] == list(range(8, 40))
    kinds = [kind for _, kind in chosen]
    assert (kinds.count("copy"), kinds.count("update"), kinds.count("retain")) == (4, 12, 16)
    (every,) = choose_examples(torch.zeros(1, 40), [FRANCE], examples, 100)
    assert sorted(i for i, _ in every) == list(range(40))


def test_of_several_facts_the_nearest_one_is_told(editor: Editor, tmp_path: Path) -> None:
    editor.edit(FRANCE, "ike", encoder=CHARACTERS, demonstrations=1)
    editor.edit(COOK, "ike", encoder=CHARACTERS, demonstrations=1)
    prompts = ["Which city is the capital of France?", "Whose chief executive is Tim Cook?", "Grass is"]
    told = written(editor.model, prompts)
    assert told[0].endswith("New Fact: The capital of France is Rome\nPrompt: Which city is the capital of France?")
    assert told[1].endswith("Tim Cook is the chief executive of Microsoft\nPrompt: Whose chief executive is Tim Cook?")
    assert "New Fact: " in told[2]
    loaded = load_edit(editor.save(tmp_path))
    assert isinstance(loaded, PromptEdit)
    assert loaded.effect.write(prompts) == told


def test_prompts_out_of_scope_can_be_left_alone(editor: Editor) -> None:
    editor.edit([FRANCE, COOK], "ike", encoder=CHARACTERS, demonstrations=1, everywhere=False)
    assert written(editor.model, ["Grass is", "The capital of Spain is"]) == ["Grass is", "The capital of Spain is"]
    assert written(editor.model, [COOK.text])[0].endswith(f"{COOK.text} Microsoft\nPrompt: {COOK.text}")


def test_examples_are_asked_for() -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(UnsupportedCapabilityError, match=r"--examples FILE.*examples=load_records\(FILE\)"):
        editor.edit(FRANCE, "ike", encoder=CHARACTERS)
    assert not editor.history
