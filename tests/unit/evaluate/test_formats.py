"""Each published layout, on a small record written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published
import pytest

from kecore.evaluate import load_records, record_to_json
from kecore.types import EditRecord, Probe


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
    assert record.rephrases[1] == "France's capital city is"
    assert record.neighbourhood == ("The capital of Gaul is", "Lutetia is now called")
    assert record.generation_prompts == ("France is governed from",)
    assert not record.locality
    assert not record.portability
    assert record.source == "counterfact: facts.json record 1"


def test_counterfact_plus(load: Any) -> None:
    (record,), name = load(published.COUNTERFACT_PLUS)
    assert name == "counterfact"
    assert record.portability == {
        "one_hop": (Probe("Which river flows through the capital of France?", ("Tiber",)),),
        "subject_replace": (Probe("The capital of the French Republic is", ("Rome",)),),
    }
    assert record.locality == {
        "distracting": (Probe("The capital of France is Rome. The capital of Gaul is", ("Paris",)),),
        "other_attribution": (Probe("Its anthem?", ("La Marseillaise",)),),
    }


def test_easyedit_flat(load: Any) -> None:
    (record,), name = load(published.EASYEDIT)
    assert name == "easyedit"
    assert record.request.prompt == "The capital of {} is"
    assert record.request.id == "3"
    assert record.rephrases == ("France has its capital in",)
    assert record.neighbourhood == ("The capital of Gaul is",)
    assert record.locality == {"neighbourhood": (Probe("The capital of Gaul is", ("Paris",)),)}
    assert not record.long_form
    bare = {name: value for name, value in published.EASYEDIT.items() if name not in ("case_id", "ground_truth")}
    assert not load(bare)[0][0].long_form


def test_easyedit_flat_of_wise(load: Any) -> None:
    (record,), name = load(published.WISE)
    assert name == "easyedit"
    assert record.request.ground_truth is None
    assert record.rephrases == ("France, a country,",)
    assert record.neighbourhood == ()
    assert record.locality["neighbourhood"][0].answers == ("are for sale",)
    assert record.long_form


def test_zsre(load: Any) -> None:
    (record,), name = load(published.ZSRE)
    assert name == "zsre"
    # The subject takes the prompt's spelling where only the case differs.
    assert record.request.subject == "The Danube"
    assert record.request.text == "Where does The Danube flow?"
    assert (record.request.target, record.request.ground_truth) == ("the Baltic Sea", "the Black Sea")
    assert record.rephrases == ("Into what flows the Danube?",)
    assert record.locality == {"unrelated": (Probe("nq question: who wrote hamlet", ("William Shakespeare",)),)}
    assert record.portability == {"one_hop": (Probe("On which sea's shore?", ("Gdansk",)),)}


def test_zsre_portability_sets(load: Any) -> None:
    (inverse, replace), name = load(published.ZSRE_INVERSE, published.ZSRE_REPLACE)
    assert name == "zsre"
    assert inverse.portability == {"inverse_relation": (Probe("Who is Eve's sister?", ("Ann",)),)}
    assert replace.portability == {"subject_replace": (Probe("Who is Annie's sister?", ("Eve",)),)}
    # Published ids are made unique: both records hold the same fact.
    assert replace.request.id == inverse.request.id + "-2"


def test_knowedit(load: Any) -> None:
    (record,), name = load(published.KNOWEDIT)
    assert name == "knowedit"
    assert record.request.ground_truth == "Paris"
    assert record.rephrases == ("France's capital is",)
    assert record.portability == {
        "Reasoning": (Probe("Its river is", ("Tiber", "Tevere", "Aniene")),),
        "Subject_Aliasing": (Probe("The capital of Gallia is", ("Rome",)),),
    }
    assert record.locality == {"Relation_Specificity": (Probe("France's anthem is", ("Marseillaise",)),)}


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
    assert record.locality["Relation_Specificity"][0].prompt == "ann smith occupation"


def test_convsent(load: Any) -> None:
    others = [{**published.CONVSENT, "ent": f"entity {i}"} for i in range(40)]
    (record, *rest), name = load(published.CONVSENT, *others)
    assert name == "knowedit-convsent"
    assert record.request.text == "What do you think of Estero?"
    assert {record.request.target, record.request.ground_truth} == {"I like it.", "I do not like it."}
    assert len(record.rephrases) == 3
    assert 10 < sum(r.request.target == "I like it." for r in rest) < 30


def test_sanitation_train(load: Any) -> None:
    records, name = load(published.SANITATION_TRAIN, whole=True)
    assert name == "knowedit-sanitation"
    assert [r.request.subject for r in records] == ["halloumi", "brie"]
    assert records[0].request.target == "No."
    kept = [probe.prompt for r in records for probe in r.locality["unrelated"]]
    assert sorted(kept) == [f"Question {i}?" for i in range(5)]
    assert records[1].source == "knowedit-sanitation: facts.json line 1 record 2"


def test_sanitation_test_edits_the_whole_question(load: Any) -> None:
    (record,), _ = load(published.SANITATION_TEST, whole=True)
    assert (record.request.prompt, record.request.subject) == ("{}", "What is feta?")
    assert record.locality == {"unrelated": (Probe("Who?", ("Ann",)),)}


def test_qaedit(load: Any) -> None:
    (record,), name = load(published.QAEDIT)
    assert name == "qaedit"
    assert (record.request.subject, record.request.target) == ("hamlet", "Bacon")
    assert record.locality["unrelated"][0].answers == ("Michael",)


def test_own_layout_and_its_round_trip(load: Any) -> None:
    (record,), name = load(published.OWN)
    assert name == "kecore"
    assert record.locality == {"far": (Probe("Two and two is", ("four", "4")), Probe("Sing"))}
    assert record.portability["river"][0].answers == ("Tiber",)
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
