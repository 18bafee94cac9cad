"""Whole evaluations on tiny models: against the definition, and what is asked of which record."""

from __future__ import annotations

import json

import pytest
from make_records import ask, make_record
from slow_reference import Slow, counterfact, greedy, log_probs
from tiny_worlds import World, edited, make_world

from kecore.api.errors import ConfigError
from kecore.api.types import EditRecord, EditRequest
from kecore.evaluate import Evaluation, Protocol, RecordResult, compare, evaluate
from kecore.text import Encoder

QUIET = Protocol(max_new_tokens=0)
RECORDS = [
    make_record(
        EditRequest("The capital of {} is", "France", "Rome", "Paris", id="a"),
        rephrases=("France has its capital in", "Where is the capital of France? It is"),
        neighbourhood=("The capital of Gaul is", "Paris is the capital of", "Vienna is"),
    ),
    make_record(
        EditRequest("{} flows to", "The Danube", "Berlin", "the Black Sea", id="b"),
        rephrases=("The sea of the Danube is",),
        neighbourhood=("The Seine flows to", "The Rhine"),
    ),
    make_record(
        EditRequest("The mother tongue of {} is", "Apollo", "French", "Greek", id="c"),
        rephrases=("Apollo speaks",),
        neighbourhood=("Danielle Darrieux speaks",),
    ),
]
RICH = make_record(
    EditRequest("{} is in", "Vinson Massif", "Europe"),
    locality={"near": (ask("The Danube is in", "Europe"), ask("Rome is"))},
    portability={"one_hop": (ask("Vinson Massif and Berlin are in", "Europe", "Asia"),)},
)
FULL = make_record(
    EditRequest("The capital of {} is", "Italy", "Vienna", "Rome", id="full"),
    rephrases=("Italy has its capital in",),
    neighbourhood=("The capital of Gaul is", "Vienna is in"),
    target_aliases=("the Black Sea",),
    truth_aliases=("Europe",),
    locality={
        "near": (ask("The Danube flows to", "the Black Sea", "Europe"), ask("Vinson Massif is")),
        "far": (ask("Apollo is", "Greek"),),
    },
    portability={
        "reasoning": (
            ask("Italy and Berlin are in", "Europe"),
            ask("The mother tongue of Italy is", "French", others=(ask("Italy speaks", "Greek", "is"),)),
            ask("Rome is not", "Paris", others=(ask("Rome is", "Paris", "Rome"),), need="all"),
        ),
        "ripple": (
            ask("Italy flows to", "Berlin", conditions=(ask("Where does Apollo flow", "It", "Vienna"),)),
            ask("Rome flows to", "Paris", conditions=(ask("The Danube is", "<", "a"),)),
        ),
    },
    multi_hop=(
        {
            "questions": ("The capital of the continent is", "Where does it flow? It is"),
            "answers": ("Vienna", "Rome"),
            "hops": (ask("The capital of Italy is", "Vienna"), ask("Vienna is in", "Europe", "Austria")),
        },
    ),
    generation_prompts=("Italy is", "The mother tongue of Italy"),
)
CHINESE = make_record(
    EditRequest("{}的首都是", "法国", "东京", "巴黎", id="zh"),
    rephrases=("法国的首都位于",),
    neighbourhood=("日本的首都是", "The capital of 法国 is"),
    locality={"near": (ask("艾菲尔铁塔位于", "巴黎", "东京"), ask("日本"))},
    portability={"reasoning": (ask("法国在", "日本", others=(ask("法国位于", "东京", "巴黎"),)),)},
    multi_hop=(
        {"questions": ("法国的首都位于", "铁塔位于"), "answers": ("日本",), "hops": (ask("东京位于", "日本"),)},
    ),
    generation_prompts=("法国的首都",),
)


def both(world: World, protocol: Protocol, records: list[EditRecord]) -> tuple[World, Evaluation]:
    """An edited world, and its evaluation compared with the unedited one's."""
    after = edited(world)
    found = [evaluate(w.view, w.encoder, records, protocol, batch_tokens=200) for w in (world, after)]
    return after, compare(*found)


@pytest.mark.parametrize("family", ["byte-level", "llama", "unigram", "byte-bpe", "llama-like"])
def test_every_metric_equals_the_definition(family: str) -> None:
    world = make_world(family)
    knows_chinese = family in ("byte-bpe", "llama-like")
    records = [FULL, CHINESE if knows_chinese else RECORDS[0]]
    protocol = Protocol(max_new_tokens=6, extra=("kl", "fluency", "opinion"))
    after, found = both(world, protocol, records)
    slow = Slow(after.view.model, world.view.model, world.encoder.tokenizer, 6)
    wanted = slow.records(records)
    scores = {key: score.value for key, score in found.scores.items() if "." not in key}
    assert scores == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert 0 < scores["locality"] < 1
    assert scores["locality_kl"] > 1e-3
    assert [RecordResult.load(row.dump()) for row in found.rows] == list(found.rows)
    json.dumps(found.to_json(), allow_nan=False)


def test_equals_the_definition(world: World) -> None:
    found = evaluate(world.view, world.encoder, RECORDS, QUIET).scores
    wanted = counterfact(world.view.model, world.encoder.tokenizer, RECORDS)
    assert {key: found[key].value for key in wanted} == pytest.approx(wanted, abs=1e-9)
    assert set(found) == set(wanted)


def test_generated_text_is_the_models(world: World) -> None:
    found = evaluate(world.view, world.encoder, RECORDS, Protocol(max_new_tokens=5, stop_at_newline=False))
    tokenizer = world.encoder.tokenizer
    for row in found.rows:
        for probe in row.probes:
            if probe.kind == "neighbourhood":
                assert probe.text is None
                continue
            ids = greedy(world.view.model, tokenizer, probe.prompt, 5)
            assert probe.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert found.scores["free_generation"].records == 3
    assert found.scores["paraphrase_free_generation"].probes == 4


def test_an_instruction_asks_for_texts_only(world: World) -> None:
    said = "Answer this: {} .\n"
    limits = {"max_new_tokens": 5, "stop_at_newline": False}
    bare = evaluate(world.view, world.encoder, RECORDS, Protocol(**limits))
    found = evaluate(world.view, world.encoder, RECORDS, Protocol(**limits, instruction=said))
    tokenizer, texts = world.encoder.tokenizer, []
    for row, other in zip(found.rows, bare.rows, strict=True):
        for probe, same in zip(row.probes, other.probes, strict=True):
            assert (probe.prompt, probe.scores, probe.rival) == (same.prompt, same.scores, same.rival)
            if probe.text is not None:
                ids = greedy(world.view.model, tokenizer, said.replace("{}", probe.prompt), 5)
                assert probe.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
                texts.append((probe.text, same.text))
    assert any(one != two for one, two in texts)


def test_axes_and_probes_without_answers(small: World) -> None:
    before = evaluate(small.view, small.encoder, [RICH], Protocol(max_new_tokens=4))
    asked, own = before.rows[0].probes[1:3]
    assert asked.kind == own.kind == "locality"
    assert (asked.text, own.scores) == (None, ())
    assert own.text is not None
    (hop,) = [p for p in before.rows[0].probes if p.kind == "portability"]
    by_hand = [log_probs(small.view.model, small.encoder.tokenizer, hop.prompt, a)[1] for a in ("Europe", "Asia")]
    assert before.scores["portability.one_hop"].value == max(sum(c) / len(c) for c in by_hand)
    assert before.scores["locality_accuracy"].probes == 1
    assert "edit_success" not in before.scores
    assert before.skipped["edit_success"] == 1
    found = compare(before, before)
    assert found.scores["locality"].value == found.scores["locality.near"].value == 1
    assert found.scores["locality"].probes == 2
    json.dumps(found.to_json(), allow_nan=False)


def test_neighbours_without_old_answer_are_only_stable(small: World) -> None:
    record = make_record(EditRequest("{} is", "Rome", "Paris"), neighbourhood=("Vienna is",))
    found = evaluate(small.view, small.encoder, [record], Protocol(max_new_tokens=3))
    assert "neighbourhood_success" not in found.scores
    assert compare(found, found).scores["neighbourhood_stability"].value == 1


def test_chat_form_asks_through_the_template(small: World) -> None:
    chat = Encoder(small.encoder.tokenizer, chat=True)
    protocol = Protocol(form="chat", max_new_tokens=0)
    found = evaluate(small.view, chat, RECORDS[:1], protocol).rows[0].probes[0]
    text = chat.text(found.prompt)
    assert text == "<user>The capital of France is\n<assistant>"
    ids = chat.encode(found.prompt, "Rome").ids
    assert found.scores[0].ids == ids[len(chat.encode(found.prompt).ids) :]


@pytest.mark.parametrize("chat", [True, False])
def test_encoder_and_protocol_must_agree(small: World, chat: bool) -> None:
    encoder = Encoder(small.encoder.tokenizer, chat=chat)
    with pytest.raises(ConfigError, match=f"chat={not chat}"):
        evaluate(small.view, encoder, RECORDS, Protocol(form="plain" if chat else "chat"))


def test_no_records(small: World) -> None:
    with pytest.raises(ConfigError, match="no records"):
        evaluate(small.view, small.encoder, [])


def test_batch_size_does_not_change_the_result(world: World) -> None:
    whole = evaluate(world.view, world.encoder, RECORDS, Protocol(max_new_tokens=4))
    pieces = evaluate(world.view, world.encoder, RECORDS, Protocol(max_new_tokens=4), batch_tokens=30)
    assert {k: s.value for k, s in whole.scores.items()} == pytest.approx(
        {k: s.value for k, s in pieces.scores.items()}, abs=1e-9
    )


def test_stages_are_reported(small: World) -> None:
    stages: list[str] = []
    evaluate(small.view, small.encoder, RECORDS, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"score", "generate"}
