"""Aggregation, uncertainty, comparison and merging."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import stdev

import pytest
from hand_scores import probe, score

from kecore.errors import ConfigError
from kecore.evaluate import Evaluation, Protocol, RecordResult, compare, merge

QUIET = Protocol(max_new_tokens=0)
GOOD, BAD = score(0.8), score(0.2)


def row(id: str, edit: bool, paraphrase: bool | None = None, neighbour: bool | None = None) -> RecordResult:
    probes = []
    for kind, won in (("edit", edit), ("paraphrase", paraphrase), ("neighbourhood", neighbour)):
        if won is not None:
            probes.append(probe(kind, GOOD if won else BAD, rival=BAD if won else GOOD))
    return RecordResult(id, "", tuple(probes))


def test_means_over_records_by_hand() -> None:
    rows = (row("a", True, True, True), row("b", True, False, True), row("c", True, True, False))
    found = Evaluation(QUIET, (*rows, row("d", False, True, False))).scores
    assert found["edit_success"].value == 0.75
    assert found["paraphrase_success"].value == 0.75
    assert found["neighbourhood_success"].value == 0.5
    assert found["score"].value == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5))
    assert found["edit_magnitude"].value == pytest.approx((0.6 * 3 - 0.6) / 4)
    assert found["edit_success"].records == found["edit_success"].probes == 4
    assert found["score"].probes == 12


def test_half_width_is_the_normal_one() -> None:
    found = Evaluation(QUIET, tuple(row(str(i), i < 7) for i in range(10))).scores["edit_success"]
    assert found.half_width == pytest.approx(1.959964 * stdev([1] * 7 + [0] * 3) / math.sqrt(10))
    assert Evaluation(QUIET, (row("a", True),)).scores["edit_success"].half_width is None


def test_half_width_of_the_score() -> None:
    # Where the three parts are one and the same quantity, so is their harmonic mean.
    rows = tuple(row(str(i), i < 7, i < 7, i < 7) for i in range(10))
    found = Evaluation(QUIET, rows).scores
    assert found["score"].value == pytest.approx(0.7)
    assert found["score"].half_width == pytest.approx(found["edit_success"].half_width)


def test_missing_probes_are_absent_and_counted() -> None:
    found = Evaluation(QUIET, (row("a", True, True), row("b", True)))
    assert found.scores["paraphrase_success"].records == 1
    assert found.skipped["paraphrase_success"] == 1
    assert "neighbourhood_success" not in found.scores
    assert "score" not in found.scores
    assert found.skipped["neighbourhood_success"] == 2
    assert "edit_success" not in found.skipped
    assert "locality" not in found.skipped
    assert "free_generation" not in found.skipped


def test_a_score_of_zero_is_shown() -> None:
    found = Evaluation(QUIET, (row("a", False, False, True), row("b", False, False, True))).scores
    assert found["score"].value == 0
    assert found["score"].half_width is None


def test_json_is_strict_and_complete() -> None:
    value = Evaluation(QUIET, (row("a", True, True, True), row("b", False, True, True))).to_json()
    again = json.loads(json.dumps(value, allow_nan=False))
    assert again == value
    assert again["protocol_hash"] == QUIET.hash()
    assert again["records"] == 2
    assert again["rows"][1]["values"]["edit_success"] == 0
    assert again["scores"]["edit_success"] == {
        "value": 0.5, "half_width": pytest.approx(0.98, abs=0.01), "records": 2, "probes": 2
    }  # fmt: skip


def _local(id: str, wrong: tuple[int, ...]) -> RecordResult:
    near = probe("neighbourhood", score(0.5, 0.5), rival=BAD)
    return RecordResult(id, "", (probe("locality", score(0.5, 0.5, wrong=wrong), axis="x"), near))


def test_compare_adds_stability() -> None:
    before = Evaluation(QUIET, (_local("a", (0,)), _local("b", ())))
    after = Evaluation(QUIET, (_local("a", (0, 1)), _local("b", ())))
    found = compare(before, after)
    assert "locality" not in after.scores
    assert found.compared
    assert found.scores["locality"].value == found.scores["locality.x"].value == 0.75
    assert found.scores["neighbourhood_stability"].value == 1
    assert found.scores["locality_accuracy"].value == after.scores["locality_accuracy"].value == 0.5
    assert found.protocol == QUIET


def test_compare_refuses_other_protocols_and_records() -> None:
    one = Evaluation(QUIET, (_local("a", ()),))
    with pytest.raises(ConfigError, match="different protocols"):
        compare(Evaluation(Protocol(form="chat", max_new_tokens=0), one.rows), one)
    with pytest.raises(ConfigError, match="'a' before, 'b' after"):
        compare(one, Evaluation(QUIET, (_local("b", ()),)))
    with pytest.raises(ConfigError, match="different records"):
        compare(one, Evaluation(QUIET, (*one.rows, _local("b", ()))))


def test_merge() -> None:
    parts = [Evaluation(QUIET, (row(str(i), i < 3),)) for i in range(4)]
    assert merge(parts).scores["edit_success"].value == 0.75
    with pytest.raises(ConfigError, match="different protocols"):
        merge([parts[0], Evaluation(Protocol(), parts[1].rows)])
    with pytest.raises(ConfigError, match="one or more"):
        merge([])


def test_rows_keep_every_bit_on_their_way_through_text() -> None:
    third = score(1 / 3, 0.1, wrong=(1,))
    broken = replace(third, log_probs=(-math.inf, -0.1))
    one = RecordResult("a", "x", (replace(probe("edit", third, rival=broken), text="ein \u00fc\n", stable=0.5),))
    again = RecordResult.load(one.dump())
    assert again == one
    assert again.probes[0].rival == broken
