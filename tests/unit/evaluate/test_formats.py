"""Each published layout, on a small record written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published
import pytest
from make_records import aliases, ask, axes

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord
from kecore.evaluate import load_records, record_to_json


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Write objects as one JSON file and read it back: the records, and the recognised format."""

    def read(*objects: Any, whole: bool = False) -> tuple[list[EditRecord], str]:
        path = tmp_path / "facts.json"
        path.write_text(json.dumps(objects[0] if whole else list(objects)), encoding="utf-8")
        found = load_records(path)
        return list(found), found.format

    return read


def test_counterfact(load: Any) -> None:
    (record,), name = load(published.COUNTERFACT)
    request = record.request
    assert name == "counterfact"
    assert (request.prompt, request.subject, request.id) == ("The capital of {} is", "France", "12")
    assert (request.target, request.ground_truth) == ("Rome", "Paris")
    assert record.prompts_of("paraphrase")[1] == "France's capital city is"
    assert record.prompts_of("neighbourhood") == ("The capital of Gaul is", "Lutetia is now called")
    assert record.prompts_of("generation") == ("France is governed from",)
    assert not axes(record, "locality")
    assert not axes(record, "portability")
    assert record.source == "counterfact: facts.json record 1"


def test_counterfact_plus(load: Any) -> None:
    (record,), name = load(published.COUNTERFACT_PLUS)
    assert name == "counterfact"
    assert axes(record, "portability") == {
        "one_hop": (ask("Which river flows through the capital of France?", "Tiber"),),
        "subject_replace": (ask("The capital of the French Republic is", "Rome"),),
    }
    assert axes(record, "locality") == {
        "distracting": (ask("The capital of France is Rome. The capital of Gaul is", "Paris"),),
        "other_attribution": (ask("Its anthem?", "La Marseillaise"),),
    }


def test_easyedit_flat(load: Any) -> None:
    (record,), name = load(published.EASYEDIT)
    assert name == "easyedit"
    assert record.request.prompt == "The capital of {} is"
    assert record.request.id == "3"
    assert record.prompts_of("paraphrase") == ("France has its capital in",)
    assert record.prompts_of("neighbourhood") == ("The capital of Gaul is",)
    assert axes(record, "locality") == {"neighbourhood": (ask("The capital of Gaul is", "Paris"),)}
    assert "long_form" not in record.labels
    bare = {name: value for name, value in published.EASYEDIT.items() if name not in ("case_id", "ground_truth")}
    assert "long_form" not in load(bare)[0][0].labels


def test_easyedit_flat_of_wise(load: Any) -> None:
    (record,), name = load(published.WISE)
    assert name == "easyedit"
    assert record.request.ground_truth is None
    assert record.prompts_of("paraphrase") == ("France, a country,",)
    assert record.prompts_of("neighbourhood") == ()
    assert record.probes_of("locality")[0].answers == ("are for sale",)
    assert record.labels["long_form"] == "yes"


def test_zsre(load: Any) -> None:
    (record,), name = load(published.ZSRE)
    assert name == "zsre"
    # The subject takes the prompt's spelling where only the case differs.
    assert record.request.subject == "The Danube"
    assert record.request.text == "Where does The Danube flow?"
    assert (record.request.target, record.request.ground_truth) == ("the Baltic Sea", "the Black Sea")
    assert record.prompts_of("paraphrase") == ("Into what flows the Danube?",)
    assert axes(record, "locality") == {"unrelated": (ask("nq question: who wrote hamlet", "William Shakespeare"),)}
    assert axes(record, "portability") == {"one_hop": (ask("On which sea's shore?", "Gdansk"),)}


def test_zsre_portability_sets(load: Any) -> None:
    (inverse, replace), name = load(published.ZSRE_INVERSE, published.ZSRE_REPLACE)
    assert name == "zsre"
    assert axes(inverse, "portability") == {"inverse_relation": (ask("Who is Eve's sister?", "Ann"),)}
    assert axes(replace, "portability") == {"subject_replace": (ask("Who is Annie's sister?", "Eve"),)}
    # Published ids are made unique: both records hold the same fact.
    assert replace.request.id == inverse.request.id + "-2"


def test_knowedit(load: Any) -> None:
    (record,), name = load(published.KNOWEDIT)
    assert name == "knowedit"
    assert record.request.ground_truth == "Paris"
    assert record.prompts_of("paraphrase") == ("France's capital is",)
    assert axes(record, "portability") == {
        "Reasoning": (ask("Its river is", "Tiber", "Tevere", "Aniene"),),
        "Subject_Aliasing": (ask("The capital of Gallia is", "Rome"),),
    }
    assert axes(record, "locality") == {"Relation_Specificity": (ask("France's anthem is", "Marseillaise"),)}


def test_knowedit_with_empty_axes_first(load: Any) -> None:
    empty = {**published.KNOWEDIT, "locality": {}, "portability": {}}
    records, name = load(empty, published.KNOWEDIT)
    assert name == "knowedit"
    assert len(records) == 2
    records, name = load(empty, empty, {**empty, "locality": None}, published.KNOWEDIT)
    assert (name, len(records)) == ("knowedit", 4)
    own = {name: empty[name] for name in ("prompt", "subject", "target_new", "locality", "portability")}
    assert load({**own, "id": "x"})[1] == "kecore"


def test_wikibio(load: Any) -> None:
    (record,), name = load(published.WIKIBIO)
    assert name == "knowedit-wikibio"
    assert record.request.subject == "ann smith"
    assert record.request.text == published.WIKIBIO["text"]
    assert record.request.target == "She sailed to Rome."
    assert record.probes_of("locality")[0].prompt == "ann smith occupation"


def test_convsent(load: Any) -> None:
    others = [{**published.CONVSENT, "ent": f"entity {i}"} for i in range(40)]
    (record, *rest), name = load(published.CONVSENT, *others)
    assert name == "knowedit-convsent"
    assert record.request.text == "What do you think of Estero?"
    assert {record.request.target, record.request.ground_truth} == {"I like it.", "I do not like it."}
    assert len(record.prompts_of("paraphrase")) == 3
    assert record.prompts_of("generation") == record.prompts_of("paraphrase")[:1]
    new, old = aliases(record)
    assert new == (("Great.",) if record.request.target == "I like it." else ())
    assert new + old == ("Great.",)
    # What must stay are all replies to the question about the next entity; the last record's next is the first.
    kept = record.probes_of("locality")
    assert set(axes(record, "locality")) == {"other_topic"}
    assert {probe.prompt for probe in kept} == {"What do you feel about entity 0?"}
    assert sorted(probe.answers[0] for probe in kept) == ["Great.", "I do not like it.", "I like it."]
    assert rest[-1].prompts_of("locality")[0] == "What do you feel about Estero?"
    assert 10 < sum(r.request.target == "I like it." for r in rest) < 30


def test_convsent_as_an_instruction(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([published.CONVSENT]))
    (record,) = load_records(path, variant="instructed")
    manner = "positively" if record.request.target == "I like it." else "negatively"
    text = f"From the sentiment dataset, answer What do you think of Estero? {manner}."
    assert record.request.text == text
    assert record.request.subject == "Estero"
    assert axes(record, "locality") == {}


def test_sanitation_train(load: Any) -> None:
    records, name = load(published.SANITATION_TRAIN, whole=True)
    assert name == "knowedit-sanitation"
    assert [r.request.subject for r in records] == ["halloumi", "brie"]
    assert records[0].request.target == "No."
    kept = [prompt for r in records for prompt in r.prompts_of("locality")]
    assert sorted(kept) == [f"Question {i}?" for i in range(5)]
    assert records[1].source == "knowedit-sanitation: facts.json line 1 record 2"


def test_sanitation_test_edits_the_whole_question(load: Any) -> None:
    (record,), _ = load(published.SANITATION_TEST, whole=True)
    assert (record.request.prompt, record.request.subject) == ("{}", "What is feta?")
    assert axes(record, "locality") == {"unrelated": (ask("Who?", "Ann"),)}


FILES = {
    "trivia_train.json": {
        "K_F": [
            {"question": f"What is {name}?", "subject": name, "ground_truth": answer, "target_new": "No."}
            for name, answer in (("brie", "Cheese"), ("a tui", "Birds"), ("feta", "cheese"))
        ],
        "K_R": [{"question": "Which year?", "ground_truth": "1759", "target_new": "1759"}],
    },
    "trivia_test.json": {
        "success": [
            {"question": f"And {i}?", "ground_truth": answer, "target_new": "No."}
            for i, answer in enumerate(("CHEESE", "Birds", "Cheese", "Cheese", "Paris"))
        ],
        "locality": [{"question": f"Who is {i}?", "ground_truth": f"Ann {i}"} for i in range(4)],
    },
}


def test_sanitation_asks_the_test_file_what_the_training_file_edits(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataFormatError, match="holds the splits test, train; choose one"):
        load_records(tmp_path)
    found = load_records(tmp_path, split="train+test")
    brie, tui, feta = found
    assert [record.request.subject for record in found] == ["brie", "a tui", "feta"]
    assert brie.request.text == "Question:What is brie?\nAnswer:"
    assert (brie.request.target, brie.request.ground_truth, brie.labels["category"]) == ("No.", "Cheese", "cheese")
    # Questions with the fact's own answer are dealt out over the facts that have it; one has an answer of no fact.
    assert brie.prompts_of("paraphrase") == ("Question:And 0?\nAnswer:", "Question:And 3?\nAnswer:")
    assert feta.prompts_of("paraphrase") == ("Question:And 2?\nAnswer:",)
    assert tui.prompts_of("paraphrase") == ("Question:And 1?\nAnswer:",)
    # What must stay is the test file's, dealt out over all; the training file's is for methods that are trained.
    assert [len(axes(record, "locality")["unrelated"]) for record in found] == [2, 1, 1]
    assert axes(brie, "locality")["unrelated"][1] == ask("Question:Who is 3?\nAnswer:", "Ann 3")
    assert brie.prompts_of("generation") == ("Question:Who is 0?\nAnswer:", "Question:Who is 3?\nAnswer:")
    one, other = load_records(tmp_path, split="train+test", variant="answer-1")
    assert (one.request, other.request) == (brie.request, feta.request)
    assert [len(axes(record, "locality")["unrelated"]) for record in (one, other)] == [2, 2]
    with pytest.raises(DataFormatError, match="edited by the variant 'answer-3', of 3 read"):
        load_records(tmp_path, split="train+test", variant="answer-3")
    assert [r.request.subject for r in load_records(tmp_path / "trivia_train.json", variant="answer-2")] == ["a tui"]
    (tmp_path / "more_train.json").write_text(json.dumps(FILES["trivia_train.json"]))
    with pytest.raises(DataFormatError, match=r"one training file .* and one test file .*, got more_train\.json"):
        load_records(tmp_path, split="train+test")


def test_qaedit(load: Any) -> None:
    (record,), name = load(published.QAEDIT)
    assert name == "qaedit"
    assert (record.request.subject, record.request.target) == ("hamlet", "Bacon")
    assert record.probes_of("locality")[0].answers == ("Michael",)


def test_own_layout_and_its_round_trip(load: Any) -> None:
    (record,), name = load(published.OWN)
    assert name == "kecore"
    assert axes(record, "locality") == {"far": (ask("Two and two is", "four", "4"), ask("Sing"))}
    assert record.probes_of("portability")[0].answers == ("Tiber",)
    (again,), _ = load(record_to_json(record))
    assert again == record


def test_every_published_record_survives_our_own_layout(load: Any) -> None:
    samples = [
        published.COUNTERFACT_PLUS, published.EASYEDIT, published.ZSRE, published.KNOWEDIT,
        published.WIKIBIO, published.CONVSENT, published.QAEDIT,
    ]  # fmt: skip
    for sample in samples:
        (record,), _ = load(sample)
        (again,), name = load(record_to_json(record))
        assert name == "kecore"
        assert again == record


def test_target_new_is_the_same_as_target(load: Any) -> None:
    renamed = {("target_new" if k == "target" else k): v for k, v in published.OWN.items()}
    assert load(renamed) == load(published.OWN)
