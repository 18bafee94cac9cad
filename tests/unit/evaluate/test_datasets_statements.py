"""The layouts of statements, code, concepts and medicine, on small records written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published
import pytest
from make_records import aliases, ask, axes

from kecore.api.errors import DataFormatError
from kecore.api.types import SafeReply
from kecore.evaluate import load_records


def test_fever(load: Any) -> None:
    (record,) = load(published.FEVER)
    assert (record.request.target, record.request.ground_truth) == ("REFUTES", "SUPPORTS")
    assert record.request.subject == "Ann sailed to Rome."
    assert record.prompts_of("paraphrase") == ("Rome was reached by Ann in a ship.",)
    assert axes(record, "locality") == {"unrelated": (ask("Bea wrote a play.", "SUPPORTS"),)}
    (given,) = load({**published.FEVER, "ans": "NOT ENOUGH INFO", "subject": "Ann"})
    assert (given.request.subject, given.request.ground_truth) == ("Ann", "NOT ENOUGH INFO")


def test_memit_csk_edits_a_part_of_the_statement(load: Any) -> None:
    for part, word in (("subject", "Boats"), ("verb", "eat"), ("object", "soup")):
        (record,) = load(published.MEMIT_CSK, variant=part)
        assert (record.request.text, record.request.subject) == ("Boats eat soup:", word)
        assert (record.request.id, record.request.target, record.request.ground_truth) == ("4", "False", "True")
    assert record.prompts_of("paraphrase") == ("Soup is food of boats:",)
    by_axis = {probe.axis: probe for probe in record.probes_of("portability")}
    neighbour, reason = by_axis["affected_neighborhood_verb"], by_axis["affected_reasoning"]
    assert (neighbour.prompt, neighbour.answers, neighbour.rivals) == ("Boats devour soup:", ("False",), ("True",))
    assert (reason.answers, reason.rivals) == (("True",), ("False",))
    stays = [(probe.axis, probe.answers) for probe in record.probes_of("locality")]
    assert stays == [("unaffected_neighborhood_subject", ()), ("unaffected_neighborhood_object", ())]
    (plain,) = load({"prompt": "a boat eats soup", "label": 0}, format="memit_csk")
    assert (plain.request.subject, plain.request.target) == ("a boat eats soup:", "False")
    bad = {**published.MEMIT_CSK, "label": "maybe"}
    with pytest.raises(DataFormatError, match="record 1: field 'label' must be True, False, 1 or 0, got str: 'maybe'"):
        load(bad, format="memit_csk", skip_errors=False)
    assert load({"prompt": "Is it far?", "label": "1"}).format == "kecore", "anybody's labels are not its verdicts"


def test_medicine(load: Any) -> None:
    facts, explanation = load(published.MEDCF, published.MEDFE)
    assert (facts.request.ground_truth, facts.labels) == ("colds", {})
    assert list(axes(facts, "locality")) == ["target", "mapping", "struc", "tokenSem"]
    assert axes(facts, "locality")["target"] == (ask("What does tea help against?", "colds"),)
    assert explanation.labels == {"category": "Colds", "long_form": "yes"}
    assert (explanation.request.subject, explanation.request.ground_truth) == ("zinc", None)
    assert list(axes(explanation, "locality")) == ["tokenSem", "topic"]


@pytest.mark.parametrize(("sample", "format"), [(published.LEME, "leme"), (published.LEME_ZSRE, "leme-zsre")])
def test_leme_opens_two_essays(load: Any, sample: dict[str, Any], format: str) -> None:
    found = load(sample)
    subject, (about, coupled) = found[0].request.subject, found[0].prompts_of("generation")
    assert (found.format, subject) == (format, "France" if format == "leme" else "The Danube")
    assert about == f"Write on France.\nTell:\n- capital\n- relationship to the Seine\n\n{subject}"
    assert coupled == f"Write on the Seine.\nTell:\n- mouth\n- relationship to {subject}\n\nthe Seine"
    alone = {**sample["coupled_prompts_and_properties"], "coupled_entities": []}
    assert len(load({**sample, "coupled_prompts_and_properties": alone})[0].prompts_of("generation")) == 1


def test_evoke_asks_where_an_overfitted_edit_writes_its_target(load: Any) -> None:
    found = load(published.EVOKE)
    assert found.format == "counterfact"
    distracted, specific = found[0].probes_of("locality")
    assert (distracted.axis, distracted.answers, distracted.rivals) == ("prefix_distraction", ("Paris",), ("Rome",))
    assert (specific.prompt, specific.answers) == ("France's anthem is", ("Marseillaise", "The M."))
    assert specific.rivals == ("Rome",)
    assert found[0].probes_of("portability") == ()


def test_elken_edits_the_event_or_its_facts(load: Any) -> None:
    (event,) = load(published.ELKEN)
    assert (event.request.text, event.request.target) == ("Ann weds", "Tom in Rome.")
    assert event.labels == {"category": "marry", "long_form": "yes"}
    assert axes(event, "portability") == {
        "fact": (ask("Who is Ann's spouse?", "Tom", "Thomas"), ask("Who is Tom's spouse?", "Ann")),
        "tendency": (ask("Her joy?\n(A) Grows (B) Ends", "A"),),
    }
    assert axes(event, "locality") == {
        "fact": (ask("Who is Ann's mother?", "Eve", "Eva"),),
        "tendency": (ask("The price of tin?\n(A) Grows (B) Stays", "B"),),
    }
    none = {**published.ELKEN, "fact": {"qas": [], "local_qas": []}}
    (facts,) = load(none, published.ELKEN, variant="facts")
    assert [(r.subject, r.target) for r in facts.requests] == [("Ann", "Tom"), ("Tom", "Ann")]
    assert aliases(facts) == (("Thomas",), ())
    assert list(axes(facts, "portability")) == ["tendency"]
    with pytest.raises(DataFormatError, match=r"no record of facts.json is edited by the variant 'facts', of 1 read"):
        load(none, variant="facts")
    with pytest.raises(DataFormatError, match="record 1: field 'event' must be a statement of two words or more"):
        load({**published.ELKEN, "event": "War."}, skip_errors=False)


def test_dune(load: Any, tmp_path: Path) -> None:
    news, total = load(published.DUNE)
    assert (news.request.text, news.request.target) == ("Ann won the", "race of 2030.")
    assert axes(news, "portability") == {"query": (ask("Who won? A. Ann B. Bea", "A"), ask("Where? A. Here", "A"))}
    assert (total.request.text, total.request.target, total.labels) == ("3 + 4 =", "7", {})
    assert axes(total, "portability") == {"query": (ask("Ann has 3 nuts and finds 4. Now?", "7"),)}
    (biased,) = load({"edits: ": published.DUNE_BIASED["edits"], "test_inputs": published.DUNE_BIASED["test_inputs"]})
    (query,) = biased.probes_of("portability")
    assert (query.axis, query.answers, query.rivals) == ("stereotype", (), ("Men",))
    assert query.rule == SafeReply("Nobody sails better by birth.")
    with pytest.raises(DataFormatError, match=r"'test_inputs' must be a list as long as 'edits' \(2\)"):
        load({**published.DUNE, "test_inputs": []})
    for name, document in (("sums.json", published.DUNE), ("sums_locality.json", published.DUNE_LOCALITY)):
        (tmp_path / "dune" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "dune" / name).write_text(json.dumps(document), encoding="utf-8")
    first, second = load_records(tmp_path / "dune")
    assert first.labels["category"] == "sums"
    assert axes(first, "locality") == {"unrelated": (ask("Is tin a metal?", "Yes"),)}
    assert axes(second, "locality") == {"unrelated": (ask("One nut and one nut?", "2"),)}


def test_ultraeditbench(load: Any) -> None:
    found = load(published.ULTRAEDITBENCH)
    assert found.format == "ultraeditbench"
    assert (found[0].request.text, found[0].request.target) == ("Where does Ann live?", "Rome")
    assert found[0].prompts_of("paraphrase") == ("What is Ann's home?",)
    assert axes(found[0], "locality") == {"unrelated": (ask("Where does Bea live?", "Paris"),)}


def test_code_updates_are_edited_in_three_ways(load: Any) -> None:
    (signature,) = load(published.CODEUPDATEARENA)
    request = signature.request
    assert (request.text, request.subject) == ("The signature of tools.walk is", "tools.walk")
    assert (request.target, request.ground_truth) == ("tools.walk(path, step=1)", "tools.walk(path)")
    task = "Ann walks.\nWalk two at a time.\ndef go(path):"
    solution = published.CODEUPDATEARENA["prog_syn"]["ref_solution"]
    assert axes(signature, "portability") == {"program": (ask(task, solution),)}
    assert signature.labels == {"category": "tools", "relation": "add-argument"}
    (docstring,) = load(published.CODEUPDATEARENA, variant="docstring")
    assert (docstring.request.subject, docstring.request.target) == ("tools.walk", "The step tells how far.")
    (program,) = load(published.CODEUPDATEARENA, variant="solution")
    assert (program.request.text, program.request.target) == (task, solution)
    assert program.probes_of("portability") == ()
    lacking = {**published.CODEUPDATEARENA, "update": {"signature": "f()"}}
    with pytest.raises(DataFormatError, match="record 1, 'update': field 'function_path' is missing"):
        load(lacking, skip_errors=False)


def test_taxi_asks_for_properties_and_for_who_has_them(load: Any) -> None:
    (record,) = load(published.TAXI)
    assert (record.request.text, record.request.target) == ("a Siamese is a kind of", "dog")
    assert (record.request.subject, record.request.ground_truth) == ("Siamese", "cat")
    asked = [(probe.kind, probe.axis, probe.prompt, probe.answers, probe.rivals) for probe in record.probes[1:]]
    assert asked == [
        ("portability", "property", "a Siamese says", ("woof",), ("purr",)),
        ("portability", "reverse", "woof is said by a", ("Siamese",), ("trout",)),
        ("locality", "property", "a Siamese has", ("four legs",), ("no legs",)),
        ("locality", "reverse", "four legs are found on a", ("Siamese",), ("trout",)),
    ]
    without = {name: {row: value for row, value in column.items() if row != "0"} for name, column in
               published.TAXI.items()}  # fmt: skip
    with pytest.raises(DataFormatError, match="rows of which one has the property 'category_membership'"):
        load(without)


def test_concepts(load: Any) -> None:
    (record,) = load(published.CONCEPTEDIT)
    assert (record.request.subject, record.request.target) == ("ship", "a house that stands on a hill.")
    assert axes(record, "portability") == {"instance": (ask("Is the Argo a ship?"),)}
    assert axes(record, "locality") == {"unrelated": (ask("The definition of tin is", "a metal."),)}
    with pytest.raises(DataFormatError, match=r"'locality_answer' must be a list as long as 'locality_prompt' \(1\)"):
        load({**published.CONCEPTEDIT, "locality_answer": []}, skip_errors=False)


def test_uniedit_takes_a_domains_file_apart(load: Any) -> None:
    (record,) = load(published.UNIEDIT)
    assert (record.request.id, record.request.subject, record.request.target) == ("1234", "Ann", "Rome")
    assert record.labels == {"relation": "P551"}
    assert axes(record, "portability") == {"single": (ask("The river of Ann's home is", "Tiber"),)}
    assert axes(record, "locality") == {"double": (ask("The home of Bea is", "Paris"),)}
