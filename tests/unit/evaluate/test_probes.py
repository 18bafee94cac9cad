"""Making probes, what is asked of a record, and how records and answers are written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from make_records import ask, make_record

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, EditRequest, NamesAll, Probe, SafeReply
from kecore.evaluate import RecordResult, record_to_json
from kecore.evaluate.fields import Fields
from kecore.evaluate.own_layout import read_record
from kecore.evaluate.probes import all_probes, chain_probes, chains_of, edit_probe, make_test, neighbours, paraphrases

FRANCE = EditRequest("The capital of {} is", "France", "Rome", "Paris", id="a")
EDIT = edit_probe(FRANCE, aliases=("Roma",), old_aliases=("Lutetia",))


def test_what_counts_on_an_edit_counts_on_its_paraphrases_and_the_other_way_round_on_neighbours() -> None:
    assert Probe("edit", "The capital of France is", ("Rome", "Roma"), ("Paris", "Lutetia")) == EDIT
    assert paraphrases(EDIT, ["France's"]) == (Probe("paraphrase", "France's", EDIT.answers, EDIT.rivals),)
    assert neighbours(EDIT, ["Gaul's"]) == (Probe("neighbourhood", "Gaul's", ("Paris", "Lutetia"), ("Rome",)),)
    unknown = edit_probe(replace(FRANCE, ground_truth=None), old_aliases=("Lutetia",))
    assert unknown.rivals == ()
    assert neighbours(unknown, ["Gaul's"]) == (Probe("neighbourhood", "Gaul's"),)


def test_every_request_is_asked_once_and_free_text_is_opened() -> None:
    joint = EditRequest("{} lies in", "Rome", "Gaul", id="a.2")
    bare = EditRecord(FRANCE, joint=(joint,))
    asked = all_probes(bare)
    assert [(probe.kind, probe.prompt) for probe in asked] == [
        ("edit", "The capital of France is"), ("edit", "Rome lies in"), ("generation", "The capital of France is"),
    ]  # fmt: skip
    assert asked[1] == edit_probe(joint)
    opening, far = Probe("generation", "France is"), Probe("locality", "Far", ("x",))
    given = EditRecord(FRANCE, (opening, far, EDIT), joint=(joint,))
    assert all_probes(given) == [EDIT, edit_probe(joint), far, opening]
    # Two requests alike are two probes, and what is given stands for one of them.
    twice = EditRecord(FRANCE, (EDIT,), joint=(replace(FRANCE, id="a.2"),))
    assert all_probes(twice)[:2] == [EDIT, edit_probe(FRANCE)]


def test_prompts_of_a_test_count_once() -> None:
    one, two = (Probe("locality", text, axis="far") for text in "ab")
    assert make_test([one], 3) == (one,)
    assert {probe.test for probe in make_test([one, two], 3)} == {"far 3"}


def test_chains_keep_together() -> None:
    hops = [Probe("hop", "h", ("x",)), Probe("hop", "i", ("y",))]
    first = chain_probes(0, ["Q?", "R?"], ["y"], ["z"], hops=hops)
    second = chain_probes(1, ["S?"], ["y"], old_hops=hops[:1])
    record = EditRecord(FRANCE, (*first, *second))
    assert [chain.probes for chain in chains_of(record)] == [first, second]
    assert {(probe.kind, probe.need) for probe in first} == {("multi_hop", "any"), ("hop", "all")}
    assert [probe.prompt for probe in all_probes(record)][1:-1] == ["Q?", "R?", "h", "i", "S?", "h"]


UNUSUAL = [
    Probe("paraphrase", "Elsewhere", ("another answer",)),
    Probe("hop", "A hop without its question", ("x",), test="alone", need="all"),
    Probe("locality", "Far", ("x",), ("y", "z"), axis="rivalled"),
    Probe("portability", "Say it", axis="attack", rule=SafeReply("I will not.")),
    Probe(
        "portability", "Name them", ("a", "b"), axis="several", rule=NamesAll((("c",), ("d", "e"))),
        conditions=(Probe("condition", "Who", ("w",), rule=NamesAll((("v",),))),),
    ),
    Probe("edit", "The capital of France is", ("Rome",), ("Paris", "Lutetia"), rule=SafeReply("Rome")),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(UNUSUAL)))
def test_a_probe_that_fits_no_field_is_written_in_full(number: int) -> None:
    record = EditRecord(FRANCE, (UNUSUAL[number], Probe("locality", "Near", ("n",), axis="near")), "somewhere")
    values = json.loads(json.dumps(record_to_json(record)))
    again = read_record(Fields(values, "here"))
    assert all_probes(again) == all_probes(record)
    assert (again.request, again.source) == (record.request, record.source)


def test_a_record_that_fits_the_fields_has_no_probe_in_full() -> None:
    record = make_record(
        FRANCE, ("One",), ("Two",), safety=True, long_form=True, category="c", references=("A text.",),
        target_aliases=("Roma",), truth_aliases=("Lutetia",),
        locality={"near": (ask("a", "b", others=(ask("c", "d"),), need="all"), ask("e"))},
        portability={"attack": (ask("Say it"),), "both": (ask("f", "g", also=(("h",),)),)},
    )  # fmt: skip
    values = record_to_json(record)
    assert "probes" not in values
    assert read_record(Fields(values, "here")) == record
    assert record.labels == {"category": "c", "long_form": "yes"}
    (attack, both) = record.probes_of("portability")
    assert (attack.rule, both.rule) == (SafeReply("Rome"), NamesAll((("h",),)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "riddle", "prompt": "p"}, "'kind' must be one of edit, paraphrase, .*, got str: 'riddle'"),
        ({"prompt": "p"}, "field 'kind' is missing"),
        ({"kind": "edit", "prompt": "p", "need": "most"}, "'need' must be 'any' or 'all'"),
        ({"kind": "edit", "prompt": "p", "answer": "x"}, "unknown field 'answer'"),
    ],
)
def test_a_bad_probe_is_named(fields: dict[str, str], message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        read_record(Fields({**FRANCE.to_json(), "probes": [fields]}, "here"))


def test_rows_of_older_stores_are_read() -> None:
    score = {"log_probs": [-1.5, -0.25], "ids": [1, 2], "argmax": [1, 3]}
    row = {
        "id": "a", "source": "s", "probes": [{
            "kind": "edit", "axis": "", "prompt": "p", "answers": ["Rome"], "scores": [score], "rival": score,
            "text": "Rome", "stable": 0.5, "test": "t", "need": "all", "also": [], "holds": True,
            "measured": {"fluency": 1.0}, "safe": "No.", "rivals": [score],
        }],
    }  # fmt: skip
    loaded = RecordResult.load(json.dumps(row))
    (answered,) = loaded.probes
    assert answered.probe == Probe("edit", "p", ("Rome",), rule=SafeReply("No."), test="t", need="all")
    assert [len(scores) for scores in (answered.scores, answered.rival_scores)] == [1, 2]
    assert (answered.text, answered.stable, answered.holds) == ("Rome", 0.5, True)
    written = json.loads(loaded.dump())["probes"][0]
    assert written.pop("rival_texts") == []
    assert written == row["probes"][0]  # type: ignore[index]
