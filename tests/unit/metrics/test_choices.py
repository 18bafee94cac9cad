"""Multiple choice and the truth ratio, by hand and on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hand_scores import probe, score
from make_records import make_record
from tiny_worlds import make_world

from kecore.api.types import EditRequest, Probe
from kecore.evaluate import Protocol, evaluate
from kecore_metrics.choices import choice, truth_ratio

PROTOCOL = Protocol()


def test_a_choice_is_right_where_no_rival_is_as_likely() -> None:
    likely, unlikely, long = score(0.5), score(0.2), score(0.5, 0.5)
    asked = replace(probe("portability", unlikely, likely), rival_scores=(score(0.3), score(0.4)))
    assert choice(asked, PROTOCOL) == 1.0
    assert choice(replace(asked, rival_scores=(score(0.3), score(0.6))), PROTOCOL) == 0.0
    assert choice(replace(asked, rival_scores=(score(0.5),)), PROTOCOL) == 0.0, "a tie is no choice"
    assert choice(replace(asked, scores=(long,), rival_scores=(score(0.3),)), PROTOCOL) == 1.0
    assert choice(replace(asked, scores=(long,), rival_scores=(score(0.3),)), Protocol(probability="sum")) == 0.0
    assert choice(probe("portability", likely), PROTOCOL) is None
    assert choice(replace(probe("portability"), rival_scores=(likely,)), PROTOCOL) is None


def test_the_truth_ratio_is_that_of_probabilities_per_token() -> None:
    true_answer, wrong, longer = score(0.5), score(0.1), score(0.4, 0.1)
    asked = replace(probe("portability"), rival_scores=(true_answer, wrong, longer))
    assert truth_ratio(asked, PROTOCOL) == pytest.approx((0.1 + math.sqrt(0.04)) / 2 / 0.5)
    assert truth_ratio(asked, Protocol(probability="sum")) == truth_ratio(asked, PROTOCOL)
    assert truth_ratio(replace(asked, rival_scores=(true_answer,)), PROTOCOL) is None
    assert truth_ratio(replace(asked, probe=replace(asked.probe, answers=("a",))), PROTOCOL) is None
    broken = replace(true_answer, log_probs=(-math.inf,))
    assert truth_ratio(replace(asked, rival_scores=(broken, wrong)), PROTOCOL) is None
    assert truth_ratio(replace(asked, rival_scores=(true_answer, broken)), PROTOCOL) == 0.0


def test_both_are_taken_where_the_protocol_names_them() -> None:
    world = make_world("byte-level")
    record = make_record(EditRequest("The capital of {} is", "France", "Rome", "Paris"))
    asked = (
        Probe("portability", "The capital of France is", rivals=("Paris", "Berlin", "Vienna"), axis="truth_ratio"),
        Probe("portability", "France is in", ("Europe",), ("Asia", "Greek"), axis="property"),
        Probe("locality", "The Danube is in", ("Europe",), ("Rome",), axis="property"),
    )
    record = replace(record, probes=(*record.probes, *asked))
    protocol = Protocol(max_new_tokens=0, extra=("choice", "truth-ratio"))
    scores = evaluate(world.view, world.encoder, [record], protocol).scores
    assert {"portability_choice.property", "locality_choice.property", "truth_ratio.truth_ratio"} <= scores.keys()
    assert scores["truth_ratio"].value > 0
    assert "portability_choice.truth_ratio" not in scores
