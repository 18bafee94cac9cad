"""MeLLo: the exchange between model and store, with a model that says what a test lets it say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kecore import Editor, EditRequest, PromptEdit, load_edit
from kecore.api.errors import EditStateError, KecoreWarning
from kecore.edit import Reader, written
from kecore.inference import Generation
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_methods.prompt import mello
from kecore_methods.prompt.encoders import CHARACTERS
from kecore_methods.prompt.mello import DEMONSTRATIONS, MelloConfig

FACTS = [
    EditRequest("{} is a citizen of", "Michael Feinstein", "Peru"),
    EditRequest("The capital of {} is", "Peru", "El Campu"),
]
QUESTION = "What is the capital of the country that Michael Feinstein is a citizen of?"
CHAIN = [
    "Subquestion: Which country is Michael Feinstein a citizen of?\n"
    "Generated answer: He is a citizen of France.\nRetrieved fact: something that the model makes up",
    "Retrieved fact contradicts to generated answer, so the intermediate answer is: Peru\n"
    "Subquestion: What is the capital of Peru?\nGenerated answer: The capital of Peru is Lima.\nRetrieved fact: The",
    "Retrieved fact contradicts to generated answer, so the intermediate answer is: El Campu\n"
    "Final answer: El Campu\n\nQuestion: Who",
]
TRANSCRIPT = f"""Question: {QUESTION}
Subquestion: Which country is Michael Feinstein a citizen of?
Generated answer: He is a citizen of France.
Retrieved fact: Michael Feinstein is a citizen of Peru.
Retrieved fact contradicts to generated answer, so the intermediate answer is: Peru
Subquestion: What is the capital of Peru?
Generated answer: The capital of Peru is Lima.
Retrieved fact: The capital of Peru is El Campu.
Retrieved fact contradicts to generated answer, so the intermediate answer is: El Campu
Final answer:"""

Ask = Callable[..., list[str]]


@pytest.fixture
def editor() -> Iterator[Editor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        yield Editor(tiny_model("llama"), tiny_tokenizer())


@pytest.fixture
def ask(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """What is read for questions when the model says these things, one after another, of each text that it is given."""

    def asked(questions: Sequence[str], said: Sequence[str], **config: Any) -> list[str]:
        turns = iter(said)
        replies: dict[int, str] = {}

        def speak(_view: object, _encoder: object, texts: Sequence[str], **_options: int) -> list[Generation]:
            turn = len(replies)
            replies[turn] = next(turns)
            return [Generation(replies[turn], (), True) for _ in texts]

        editor.edit(FACTS, "mello", encoder=CHARACTERS, demonstrations=0, **config)
        monkeypatch.setattr(mello, "generate", speak)
        return written(editor.model, questions, Reader(editor.view, editor.encoder))

    return asked


def test_each_answer_is_followed_by_the_nearest_fact_and_the_text_ends_before_the_answer(ask: Ask) -> None:
    assert ask([QUESTION], CHAIN) == [TRANSCRIPT]


def test_questions_are_taken_apart_side_by_side(ask: Ask) -> None:
    other = QUESTION.replace("capital", "largest city")
    assert ask([QUESTION, other, QUESTION], CHAIN) == [
        TRANSCRIPT,
        TRANSCRIPT.replace("What is the capital of the country", "What is the largest city of the country"),
        TRANSCRIPT,
    ]


@pytest.mark.parametrize(
    "said",
    ["I do not know.", "Subquestion: Who is it?\nGenerated answer: nobody", "Generated answer: x\nRetrieved fact:"],
)
def test_a_model_that_loses_the_thread_answers_with_what_there_is(ask: Ask, said: str) -> None:
    assert ask([QUESTION], [CHAIN[0], said]) == [
        TRANSCRIPT.partition("Retrieved fact contradicts")[0] + "Final answer:"
    ]


def test_there_are_no_more_hops_than_asked_for(ask: Ask) -> None:
    (text,) = ask([QUESTION], [CHAIN[0], CHAIN[1]], hops=1)
    assert text == TRANSCRIPT.partition("Retrieved fact contradicts")[0] + "Final answer:"


def test_worked_questions_stand_first_and_are_in_one_format(editor: Editor) -> None:
    opening = mello.MelloWriter(FACTS, sentences(), MelloConfig(demonstrations=2)).opening("Who?")
    assert opening == f"{DEMONSTRATIONS[0]}\n{DEMONSTRATIONS[1]}\nQuestion: Who?\n"
    for text in DEMONSTRATIONS:
        kinds = [
            line.partition(":")[0].partition(" does not")[0].partition(" contradicts")[0] for line in text.splitlines()
        ]
        hop = ["Subquestion", "Generated answer", "Retrieved fact", "Retrieved fact"]
        assert kinds == ["Question", *hop * ((len(kinds) - 2) // 4), "Final answer"]


KNOWN = {
    "Which country is Michael Feinstein a citizen of?": ("Michael Feinstein is a citizen of", "United States"),
    "What is the capital of United States?": ("The capital of United States is", "Washington"),
    "What is the capital of Peru?": ("The capital of Peru is", "Lima"),
}
"""What the scripted model knows: of each question the statement that answers it, and the answer before any edit."""


def scripted(text: str) -> str:
    """A scripted stand-in for a capable model: it keeps to the format, and goes by what it reads.

    It takes the question apart, answers each part from what it knows, and holds a retrieved fact against that: a fact
    about the very thing that was asked decides, any other does not.
    """
    *_, last = text.strip().splitlines()
    asked = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Subquestion:")]
    found = [line.rpartition(": ")[2] for line in text.splitlines() if "the intermediate answer is:" in line]
    if last == "Final answer:":
        return f" {found[-1]}\n\nQuestion: Who"
    if last.startswith("Question:"):
        return _asking("Which country is Michael Feinstein a citizen of?")
    statement, own = KNOWN[asked[-1]]
    told = last.removeprefix("Retrieved fact: ").removesuffix(".")
    if told.startswith(statement):
        answer = told.removeprefix(statement).strip()
        said = f"Retrieved fact contradicts to generated answer, so the intermediate answer is: {answer}\n"
    else:
        answer = own
        said = f"Retrieved fact does not contradict to generated answer, so the intermediate answer is: {answer}\n"
    return said + (f"Final answer: {answer}\n" if len(asked) == 2 else _asking(f"What is the capital of {answer}?"))


def _asking(question: str) -> str:
    statement, answer = KNOWN[question]
    return f"Subquestion: {question}\nGenerated answer: {statement} {answer}.\nRetrieved fact: made up"


@pytest.mark.parametrize(("facts", "answer"), [(0, "Washington"), (1, "Lima"), (2, "El Campu")])
def test_a_scripted_model_answers_over_two_hops_with_what_was_edited(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, facts: int, answer: str
) -> None:
    """The whole loop with a script in the model's place; of real models the page says what was measured.

    With no fact about it in the store, one about something else is retrieved, which the script has to leave alone. With
    the citizenship edited the second hop asks about Peru and nothing in the store speaks of its capital; with both
    edited, both hops follow.
    """
    read: list[str] = []

    def speak(_view: object, _encoder: object, texts: Sequence[str], **_options: int) -> list[Generation]:
        read.extend(texts)
        return [Generation(scripted(text), (), True) for text in texts]

    monkeypatch.setattr(mello, "generate", speak)
    unrelated = EditRequest("The author of {} is", "The Trial", "Jane Austen")
    editor.edit([*FACTS[:facts], unrelated], "mello", encoder=CHARACTERS, demonstrations=0)
    (text,) = written(editor.model, [QUESTION], Reader(editor.view, editor.encoder))
    assert scripted(text) == f" {answer}\n\nQuestion: Who"
    assert len(read) == 3, "one exchange a hop, and the last that ends it"
    assert text.count("fact contradicts") == facts


def sentences() -> Any:
    from kecore_methods.prompt.encoders import load_sentence_encoder

    return load_sentence_encoder(CHARACTERS)([fact.text for fact in FACTS])


def test_the_edited_model_is_asked_without_the_edit_itself(editor: Editor, tmp_path: Path) -> None:
    edit = editor.edit(FACTS, "mello", encoder=CHARACTERS, demonstrations=0, new_tokens=8)
    reader = Reader(editor.view, editor.encoder)
    assert written(editor.model, ["Who is it?"], reader) == ["Question: Who is it?\nFinal answer:"]
    loaded = load_edit(edit.save(tmp_path))
    editor.revert()
    assert isinstance(loaded, PromptEdit)
    loaded.attach(editor.model)
    assert written(editor.model, ["Who is it?"], reader) == ["Question: Who is it?\nFinal answer:"]
    with pytest.raises(EditStateError, match="take questions apart"):
        written(editor.model, ["Who is it?"])
