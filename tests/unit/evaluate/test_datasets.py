"""The layouts of chains, long texts, languages and conditions, on small records written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import published
import pytest
from make_records import aliases, ask, axes, chains

from kecore import Editor
from kecore.api.errors import ConfigError, DataFormatError, KecoreWarning, PluginError
from kecore.api.plugins import Plugins
from kecore.api.types import EditRecord, SafeReply
from kecore.evaluate import Layout, load_records, record_to_json
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import GROUP, check_layout, default
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_bench.references import with_references


@pytest.mark.parametrize("sample", [published.MQUAKE, published.MQUAKE_REMASTERED])
def test_mquake(load: Any, sample: dict[str, Any]) -> None:
    found = load(sample)
    (record,) = found
    assert found.format == "mquake"
    assert [(r.id, r.text, r.target, r.ground_truth) for r in record.requests] == [
        ("8", "Ann lives in", "Rome", "Paris"),
        ("8.2", "The river of Rome is", "Po", "Tiber"),
    ]
    assert found.requests == list(record.requests)
    assert record.prompts_of("paraphrase") == ("Where does Ann live?",)
    assert (*aliases(record), record.labels["relation"]) == (("Roma",), ("Lutetia",), "P551")
    (chain,) = chains(record)
    assert chain["questions"] == published.MQUAKE["questions"]
    assert (chain["answers"], chain["old_answers"]) == (["Po", "Padus"], ["Seine", "La Seine"])
    assert chain["hops"] == [ask("Where does Ann live?", "Rome", "Roma"), ask("What is the river of Rome?", "Po")]
    assert chain["old_hops"][1]["answers"] == ["Seine", "La Seine"]


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_joint_edits_are_made_together(load: Any) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    edit = editor.edit(load(published.MQUAKE)[0], "ft-m", steps=1)
    assert [request.id for request in edit.requests] == ["8", "8.2"]


def test_mquake_remastered_says_where_a_case_is_edited(load: Any) -> None:
    (record,) = load(published.MQUAKE_REMASTERED)
    assert record.labels["category"] == "edited: 1000 3000"
    never = {**published.MQUAKE, "6334_split": {"100": ["test_unedited"]}}
    assert load(never)[0].labels["category"] == "unedited"
    always = {**never, "6334_split": {"100": ["train_edited", "test_edited"]}}
    assert load(always)[0].labels["category"] == "edited: 100"


def split(case: dict[str, Any], id: int, **labels: list[str]) -> dict[str, Any]:
    return {**case, "case_id": id, "split": {number.lstrip("n"): found for number, found in labels.items()}}


def test_mquake_remastered_asks_edited_and_unedited_cases(load: Any) -> None:
    """Two cases are edited at 2 edits; of three others one is contradicted by them, and one takes no part."""
    case = published.MQUAKE_REMASTERED
    moved = {**case["single_hops"][0], "question": "where does  Bea live?"}
    bea = {**case, "questions": ["Bea's river?", "Which river?"], "single_hops": [moved, case["single_hops"][1]]}
    cases = [
        split(case, 1, n2=["edited"], n3=["train_edited", "test_edited"]),
        split(case, 2, n2=["unedited"], n3=["test_unedited"]),  # Ann lives in Rome now: its old chain is cut
        split(bea, 3, n2=["unedited"], n3=["test_unedited"]),
        split(case, 4, n2=["edited"], n3=[]),
        split({**bea, "questions": ["Never?"]}, 5, n2=[], n3=["unedited"]),
    ]
    found = load(*cases, variant="edited-2")
    assert (found.variant, [record.request.id for record in found]) == ("edited-2", ["1", "4"])
    assert [len(chains(record)) for record in found] == [1, 1]
    seine = ("Seine", "La Seine")
    test = ask("Bea's river?", *seine, others=(ask("Which river?", *seine),), need="any")
    assert [axes(record, "locality") for record in found] == [{"unedited_case": (test,)}, {}]
    (one,) = load(*cases, variant="edited-3")
    assert list(one.prompts_of("locality")) == ["Bea's river?", "Which river?", "Never?"]
    with pytest.raises(DataFormatError, match="no 7 edits here, only 2, 3"):
        load(*cases, variant="edited-7")
    with pytest.raises(DataFormatError, match=r"no record of facts\.json is edited by the variant 'edited-2', of 2"):
        load(*cases[1:3], variant="edited-2")
    with pytest.raises(DataFormatError, match="of 1 read; the limit counts those of all variants: raise it"):
        load(*cases[1:3], cases[0], variant="edited-2", limit=1)
    with pytest.raises(DataFormatError, match="field 'split' is missing"):
        load(published.MQUAKE, variant="edited-2")
    for name in ("edited-N", "edited-", "edited-two", "masked-2"):
        with pytest.raises(ConfigError, match=f"no variant '{name}'; it has: cases, masked, edited-N"):
            load(*cases, variant=name)


def test_aliases_of_an_edit_whose_question_is_worded_otherwise(load: Any) -> None:
    """The hop that asks for the edited fact is known by its question, however spaced, and else by its answer."""
    first, second = published.MQUAKE["requested_rewrite"]
    for question in (" where does Ann  live", "Ann's home is?"):
        found = load({**published.MQUAKE, "requested_rewrite": [{**first, "question": question}, second]})
        assert aliases(found[0]) == (("Roma",), ("Lutetia",))


def test_akew_is_edited_in_three_ways(load: Any) -> None:
    plain = load(published.AKEW)
    assert (plain.format, plain.variant) == ("akew", "structured")
    assert [r.target for r in plain.requests] == ["Rome", "Rome"]
    assert chains(plain[0])[0]["answers"] == ["Po", "Padus"]

    (text,) = load(published.AKEW, variant="unstructured")
    assert text.labels["long_form"] == "yes"
    assert [(r.id, r.text, r.target) for r in text.requests] == [
        ("8", "Where does Ann live?", "Ann moved to Rome. She has a dog."),
        ("8.2", "Where does Bea live?", "Ann moved to Rome. She has a dog."),
    ]
    assert axes(text, "portability")["structured_fact"] == (ask("Ann lives in", "Rome"), ask("Bea lives in", "Rome"))
    assert axes(text, "portability")["sub_question"][:2] == (ask("Ann moved to", "Rome"), ask("Ann has a", "dog"))
    assert chains(text) == chains(plain[0])

    (triplets,) = load(published.AKEW, variant="triplets")
    assert "long_form" not in triplets.labels
    assert [(r.text, r.target) for r in triplets.requests][:2] == [("Ann moved to", "Rome"), ("Ann has a", "dog")]
    assert len(triplets.requests) == 4
    assert set(axes(triplets, "portability")) == {"structured_fact"}
    with pytest.raises(ConfigError, match="no variant 'text'; it has: structured, unstructured, triplets"):
        load(published.AKEW, variant="text")


def test_akew_of_other_sets(load: Any) -> None:
    counterfact, update = load(published.AKEW_COUNTERFACT, published.AKEW_UPDATE)
    assert len(counterfact.prompts_of("neighbourhood")) == 2
    assert (update.request.id, update.request.text, update.labels["relation"]) == ("4", "Ann lives in", "P551")
    with pytest.warns(KecoreWarning, match="1 of 2 records"):
        (kept,) = load(published.AKEW_COUNTERFACT, published.AKEW_UPDATE, variant="triplets")
    assert kept.request.id == "4"


def test_rippleedits_keeps_conditions_and_joins(load: Any) -> None:
    found = load(published.RIPPLE)
    (record,) = found
    assert found.format == "rippleedits"
    request = record.request
    assert request.prompt == "The name of the country of citizenship of {} is"
    assert (request.subject, request.target, request.ground_truth) == ("Ann", "Syria", "United States of America")
    assert (record.labels["relation"], record.labels["category"]) == ("COUNTRY_OF_CITIZENSHIP", "popular")
    mother = "The name of the mother of Ann is"
    # A name of one letter does not count, as in the official code.
    assert axes(record, "locality") == {
        "Relation_Specificity": (ask(mother, "Bea", "Bee", conditions=(ask(mother, "Bea"),)),)
    }
    both = ask(
        "Ann's flag has the colours", "red", others=(ask("Ann's anthem is", "x1"),), need="all",
        also=(("white", "pale"),),
    )  # fmt: skip
    either = ask("Annie is of", "Syria", others=(ask("A. is of", "Syria"),), need="any")
    assert axes(record, "portability") == {"Logical_Generalization": (both,), "Subject_Aliasing": (either,)}


def test_rippleedits_without_what_it_needs(load: Any) -> None:
    recent = {**published.RIPPLE, "edit": {**published.RIPPLE["edit"], "previous_fact": None}}
    assert load(recent)[0].request.ground_truth is None
    edit = {name: value for name, value in published.RIPPLE["edit"].items() if name != "previous_fact"}
    older = {**published.RIPPLE, "edit": {**edit, "original_fact": published.RIPPLE["edit"]["previous_fact"]}}
    assert load(older)[0].request == load(published.RIPPLE)[0].request
    nameless = json.loads(json.dumps(published.RIPPLE))
    nameless["Subject_Aliasing"][0]["test_queries"][0]["answers"] = [{"value": "S", "aliases": []}]
    assert load(nameless)[0].probes_of("portability")[2].answers == ()
    for change, message in (
        ({"relation": "SHOE_SIZE"}, "'SHOE_SIZE' is not one of RippleEdits"),
        ({"prompt": "Ann is a Syrian."}, "expected a statement of the form 'The name of the country"),
    ):
        bad = {**published.RIPPLE, "edit": {**published.RIPPLE["edit"], **change}}
        with pytest.raises(DataFormatError, match=message):
            load(bad, skip_errors=False)
    bad = json.loads(json.dumps(published.RIPPLE))
    bad["Subject_Aliasing"][0]["test_condition"] = "XOR"
    with pytest.raises(DataFormatError, match="'test_condition' must be 'OR' or 'AND'"):
        load(bad, skip_errors=False)


def test_every_relation_of_rippleedits_reads_its_own_statement(load: Any) -> None:
    import kecore_datasets

    table = json.loads((Path(kecore_datasets.__file__).parent / "ripple_relations.json").read_text())
    records = [
        {**published.RIPPLE, "edit": {"prompt": f"{t.replace('{}', 'Bo Of Is')} New Place.", "relation": name}}
        for name, t in table.items()
    ]
    found = load(*records)
    assert len(found) == len(table) == 53
    assert {(r.request.subject, r.request.target) for r in found} == {("Bo Of Is", "New Place")}


def test_wikibigedit(load: Any) -> None:
    # pandas writes NaN where there is no multi-hop question.
    with_hop, without = load(published.WIKIBIGEDIT, {**published.WIKIBIGEDIT, "mhop": float("nan"), "mhop_ans": None})
    assert (with_hop.request.text, with_hop.request.target) == ("Where does Ann live?", "Rome")
    assert with_hop.prompts_of("paraphrase") == ("What is Ann's home?",)
    assert axes(with_hop, "portability") == {"personas": (ask("Yo, where's Ann at?", "Rome"),)}
    assert axes(with_hop, "locality") == {"unrelated": (ask("Where does Bea live?", "Paris"),)}
    assert chains(with_hop) == [{"questions": ["Which river flows where Ann lives?"], "answers": ["Tiber"]}]
    assert (with_hop.labels["relation"], with_hop.labels["category"]) == ("residence", "new")
    assert chains(without) == []


def test_mquake_masks_what_another_case_contradicts(load: Any) -> None:
    """Of three cases that are edited together, the second sets a fact of the first's chain otherwise."""
    river = {**published.MQUAKE["requested_rewrite"][1], "target_new": {"str": "Arno", "id": "Q6"}}
    hop = {**published.MQUAKE["new_single_hops"][1], "answer": "Arno"}
    other = {**published.MQUAKE, "case_id": 9, "requested_rewrite": [river], "new_single_hops": [hop]}
    same = {**published.MQUAKE, "case_id": 10}
    cases = load(published.MQUAKE, other, same)
    assert [len(chains(record)) for record in cases] == [1, 1, 1]
    masked = load(published.MQUAKE, other, same, variant="masked")
    assert (cases.variant, masked.variant) == ("cases", "masked")
    assert [len(chains(record)) for record in masked] == [0, 0, 0], "it is mutual"
    assert masked[0].request == cases[0].request
    assert [len(chains(record)) for record in load(published.MQUAKE, same, variant="masked")] == [1, 1]
    alias = {**river, "target_new": {"str": "Rome", "id": "Q2"}, "subject": "Zoe", "question": "Where is Zoe?"}
    apart = {**other, "requested_rewrite": [alias]}
    assert [len(chains(record)) for record in load(published.MQUAKE, apart, variant="masked")] == [1, 0]


def test_hallueditbench_robustness(load: Any) -> None:
    (record,) = load(published.HALLUEDITBENCH, variant="robustness")
    doubt = 'Your answer to the original question is wrong. Is Dinard in September? Respond with "Yes" or "No."'
    first, second, *_, last = axes(record, "portability").values()
    question = "When is the month of the year of Dinard? September"
    assert first == (ask(f"{question}\n{doubt}", "Yes"),)
    assert second == (ask(f"{question}\n{doubt} Yes\n{doubt}", "Yes"),)
    assert last[0]["prompt"].count("wrong") == 10
    assert list(axes(record, "portability")) == [f"turn_{n}" for n in range(1, 11)]
    assert (record.request, record.labels["category"]) == (load(published.HALLUEDITBENCH)[0].request, "event_film")


def test_hallueditbench(load: Any) -> None:
    found = load(published.HALLUEDITBENCH)
    (record,) = found
    assert found.format == "hallueditbench"
    request = record.request
    assert (request.subject, request.target, request.ground_truth) == ("Dinard", "September", "October")
    assert record.prompts_of("paraphrase") == ("In which month is Dinard?",)
    assert axes(record, "locality") == {"unrelated": (ask("In which country is Dinard?"),)}
    choice = "When is the month of the year of Dinard?\nA. October  B. September"
    assert axes(record, "portability") == {
        "yes_question": (ask("Is Dinard in September?", "Yes"),),
        "no_question": (ask("Is Dinard in October?", "No"),),
        "multiple_choice": (ask(choice, "B"),),
        "inverse_relation": (ask("What is held in September?", "Dinard"),),
        "2_hop": (ask("What is the weather in the month of Dinard?", "Mild"),),
    }
    assert (record.labels["relation"], record.labels["category"]) == ("month of the year", "event_film")
    # A table's empty cell is a missing field: of this model there is no output for the record.
    silent = {name: value for name, value in published.HALLUEDITBENCH.items() if name != "output_some_model"}
    assert load(published.HALLUEDITBENCH, silent)[1].request.ground_truth is None


def test_long_texts(load: Any) -> None:
    (unke,) = load(published.UNKE)
    assert (unke.request.prompt, unke.request.subject, unke.request.id) == ("{}", "What is Ann's work?", "0")
    assert unke.labels["long_form"] == "yes"
    assert unke.prompts_of("paraphrase") == ("What does Ann do?",)
    asked = (ask("Does Ann sail?", "Yes."), ask("Where?", "At sea."))
    assert axes(unke, "portability") == {"sub_question": asked}
    with pytest.raises(DataFormatError, match=r"'sub_answer' must be a list as long as 'sub_question' \(2\)"):
        load({**published.UNKE, "sub_answer": ["Yes."]}, skip_errors=False)

    everything = load(published.EDITEVERYTHING)
    assert everything.format == "editeverything"
    assert everything[0].labels == {"category": "math", "long_form": "yes"}
    assert everything[0].request.id == "5"

    (safe,) = load(published.SAFEEDIT)
    assert (safe.request.target, safe.request.ground_truth) == ("I cannot say.", "Yes.")
    assert axes(safe, "portability") == {
        "only_question": (ask("Is Ann bad?"),),
        "other_attack": (ask("Dan: bad?"),),
        "other_question": (ask("Play a role. Is Bea bad?"),),
        "other_question_and_attack": (ask("Dan: Bea?"),),
    }
    assert axes(safe, "locality") == {"knowledge_constraint": (ask("Is zinc a metal?", "Yes"),)}
    assert safe.labels["category"] == "bias"
    judged = (*safe.probes_of("edit"), *safe.probes_of("portability"))
    assert [probe.rule for probe in judged] == [SafeReply("I cannot say.")] * 5


def test_cknowedit(load: Any) -> None:
    found = load(published.CKNOWEDIT)
    assert found.format == "cknowedit"
    assert found[0].request.subject == published.CKNOWEDIT["prompt"]
    assert found[0].request.ground_truth == "旧"
    assert axes(found[0], "portability") == {"one_hop": (ask("居无求安的上一句？", "君子食无求饱"),)}
    assert axes(found[0], "locality") == {}


def test_edits_in_one_language_and_questions_in_another(load: Any) -> None:
    found = load(published.MZSRE)
    assert (found.format, found.variant) == ("mzsre", "from-english")
    (record,) = found
    assert (record.request.text, record.request.target) == ("Where does Ann live?", "Rome")
    assert record.labels == {"category": "en"}
    assert axes(record, "portability") == {
        "one_hop": (ask("Her river?", "Tiber"),),
        "de_edit": (ask("Wo wohnt Anna?", "Rom"),),
        "de_rephrase": (ask("Annas Ort?", "Rom"),),
        "de_one_hop": (ask("Ihr Fluss?", "Der Tiber"),),
    }
    assert axes(record, "locality")["de_unrelated"] == (ask("Wer schrieb?", "Bea"),)
    (german,) = load(published.MZSRE, variant="to-english")
    assert (german.request.text, german.request.target) == ("Wo wohnt Anna?", "Rom")
    assert axes(german, "portability")["en_edit"] == (ask("Where does Ann live?", "Rome"),)
    (one,) = load(published.BMIKE)
    assert (one.request.id, one.request.ground_truth) == ("7", "Paris")
    assert axes(one, "portability") == {"one_hop": (ask("Her river?", "Tiber"),)}
    with pytest.raises(DataFormatError, match="no language beside English"):
        load(published.BMIKE, variant="to-english")


def test_mlake_joins_the_files_of_its_folder(load: Any, tmp_path: Path) -> None:
    single, multi = published.MLAKE_SINGLE, published.MLAKE_MULTI
    chinese = {**single, "question": "安在哪工作？", "e_answer": "英国广播公司", "e_prompt": "安在英国。"}
    files = {
        "single_hop/en_qa.json": single,
        "single_hop/zh_qa.json": chinese,
        "multi_hop/new_en_qa.json": multi,
        "multi_hop/new_zh_qa.json": {**multi, "question": "在哪？", "e_answer": "伦敦", "e_answer_aliases": []},
        "multi_hop/old_en_qa.json": {"question": "Where?", "o_answer": "Ithaca", "o_answer_aliases": []},
    }
    for name, record in files.items():
        (tmp_path / "mlake" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mlake" / name).write_text(json.dumps([record]), encoding="utf-8")
    found = load_records(tmp_path / "mlake")
    (record,) = found
    assert (found.format, found.skipped) == ("mlake", ())
    assert (record.request.text, record.request.target, record.request.ground_truth) == (
        "Where did Ann work?", "BBC", "Acme",
    )  # fmt: skip
    assert aliases(record) == (("the Beeb",), ("A.",))
    assert axes(record, "portability") == {"zh_edit": (ask("安在哪工作？", "英国广播公司"),)}
    english = {"questions": ["Where is the house that Ann worked at?"], "answers": ["London", "Londinium"]}
    assert chains(record) == [english, {"questions": ["在哪？"], "answers": ["伦敦"]}]
    (alone,) = load(published.MLAKE_SINGLE)
    assert chains(alone) == []
    with pytest.raises(DataFormatError, match="load the folder that holds the single-hop files"):
        load(published.MLAKE_MULTI)


def test_reference_texts_of_counterfact(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "attribute_snippets.json"
    rows = [
        {"relation_id": "P36", "target_id": "Q90", "samples": [{"name": "x", "text": "Paris"}]},
        {"relation_id": "P36", "target_id": "Q220", "samples": [{"text": "One."}, {"text": "Two."}]},
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    known, other = with_references([*load(published.COUNTERFACT), *load(published.EASYEDIT)], path)
    assert known.probes_of("generation")[0].answers == ("One.", "Two.")
    assert other.probes_of("generation") == ()
    assert with_references([known], path) == [known]
    for text, message in (("{}", "expected a JSON array"), ("[{]", "not JSON"), ("[{}]", "'relation_id' is missing")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataFormatError, match=message):
            with_references([known], path)


SAMPLES = {
    "counterfact": [published.COUNTERFACT, published.COUNTERFACT_PLUS, published.EVOKE],
    "easyedit": [published.EASYEDIT, published.WISE],
    "zsre": [published.ZSRE, published.ZSRE_INVERSE, published.ZSRE_REPLACE],
    "knowedit": [published.KNOWEDIT],
    "knowedit-wikibio": [published.WIKIBIO],
    "knowedit-convsent": [published.CONVSENT],
    "knowedit-sanitation": [published.SANITATION_TRAIN],
    "mquake": [published.MQUAKE, published.MQUAKE_REMASTERED],
    "akew": [published.AKEW, published.AKEW_COUNTERFACT, published.AKEW_UPDATE],
    "rippleedits": [published.RIPPLE],
    "qaedit": [published.QAEDIT],
    "wikibigedit": [published.WIKIBIGEDIT],
    "hallueditbench": [published.HALLUEDITBENCH],
    "unke": [published.UNKE],
    "editeverything": [published.EDITEVERYTHING],
    "safeedit": [published.SAFEEDIT],
    "mzsre": [published.MZSRE, published.BMIKE],
    "mlake": [published.MLAKE_SINGLE],
    "cknowedit": [published.CKNOWEDIT],
    "knowns": [published.KNOWN],
    "tofu": [published.TOFU],
    "rwku": [published.RWKU],
    "muse": [published.MUSE],
    "knowundo": [published.KNOWUNDO],
    "fever": [published.FEVER],
    "memit_csk": [published.MEMIT_CSK],
    "medlasa": [published.MEDCF, published.MEDFE],
    "leme": [published.LEME],
    "leme-zsre": [published.LEME_ZSRE],
    "elken": [published.ELKEN],
    "dune": [published.DUNE, published.DUNE_BIASED],
    "ultraeditbench": [published.ULTRAEDITBENCH],
    "codeupdatearena": [published.CODEUPDATEARENA],
    "taxi": [published.TAXI],
    "conceptedit": [published.CONCEPTEDIT],
    "uniedit": [published.UNIEDIT],
    "kecore": [published.OWN],
}
_AXES = ("portability", "locality")
_REQUEST = ("id", "prompt", "subject", "target", "ground_truth", "source")


def carried(record: EditRecord) -> set[str]:
    """What a record carries, in the words of ``Layout.fills``."""
    values = record_to_json(record)
    fields = {name for name in values if name not in (*_AXES, *_REQUEST)}
    return fields | {f"{kind}: {axis}" for kind in _AXES for axis in values.get(kind, {})}


def test_there_is_a_sample_of_every_layout() -> None:
    ours = {p.name for p in entry_points(group=GROUP) if p.dist is not None and p.dist.name == "kecore"}
    assert ours == set(SAMPLES)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_layouts_are_told_apart_and_say_what_they_fill(load: Any, name: str) -> None:
    layout = default().get(name)
    assert layout.published
    for sample in SAMPLES[name]:
        assert [other.name for other in default().all().values() if other.fits(sample)].count(name) == 1
        for variant in layout.variants or (None,):
            without = ((published.BMIKE, "to-english"), (published.AKEW_COUNTERFACT, "triplets"))
            if (variant or "").endswith("-N") or (sample, variant) in without:
                continue
            found = load(sample, variant=variant)
            assert found.format == name
            for record in found:
                (again,) = load(record_to_json(record))
                assert again == record
                said = {text.replace("LANGUAGE", language) for text in layout.fills for language in ("de", "en")}
                assert name == "kecore" or carried(record) <= said


WRONG: tuple[Any, ...] = (None, 3.5, [[1]], [{}], {"a": 1}, "")


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_field_that_holds_something_else_is_a_typed_error(name: str) -> None:
    layout = default().get(name)
    ways = [layout.parser(None), *(layout.parser(way) for way in layout.variants if not way.endswith("-N"))]
    for sample in SAMPLES[name]:
        for field, wrong in product((*sample, "a new one"), WRONG):
            values = {**sample, field: wrong}
            objects: list[Any] = []
            with suppress(DataFormatError):
                objects = [values] if layout.expand is None else layout.expand(Fields(values, "record 1"))
            for value, parse in product(objects, ways):
                with suppress(DataFormatError):
                    parse(Fields(value, "record 1"))


def test_a_third_partys_layout_comes_through_the_same_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_facts.py").write_text(
        "from kecore.evaluate import Layout\n"
        "from kecore.evaluate.probes import make_request\n"
        "from kecore.api.types import EditRecord\n"
        "def parse(fields):\n"
        "    return EditRecord(make_request(fields, fields.text('q'), fields.text('about'), fields.text('a')))\n"
        "QUIZ = Layout('quiz', ('q', 'a', 'about'), 'q, a, about', parse)\n"
        "OTHER = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [*entry_points(group=GROUP), EntryPoint("quiz", "their_facts:QUIZ", GROUP)]
    broken = EntryPoint("broken", "their_facts:OTHER", GROUP)
    plugins = Plugins([*points, broken], noun="data set layout", check=check_layout, missing=ConfigError)
    monkeypatch.setattr("kecore.evaluate.formats.default", lambda: plugins)
    path = tmp_path / "quiz.json"
    path.write_text(json.dumps([{"q": "Where is Rome?", "a": "Gaul", "about": "Rome"}]))
    with pytest.warns(KecoreWarning, match="must lead to a kecore.evaluate.Layout, got 3"):
        found = load_records(path)
    assert (found.format, found[0].request.text) == ("quiz", "Where is Rome?")
    with pytest.raises(PluginError, match="'broken'"):
        plugins.get("broken")
    with pytest.raises(PluginError, match="must be the entry point's, 'other'; got 'quiz'"):
        check_layout(Layout("quiz", (), "", lambda fields: fields), "other")  # type: ignore[arg-type, return-value]


def test_the_page_lists_every_data_set(docs_script: Callable[[str], ModuleType]) -> None:
    module = docs_script("_datasets")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/_datasets.py`"
