"""Aggregation, uncertainty, comparison and merging."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hand_scores import probe, score

from kecore.api.errors import ConfigError, PluginError
from kecore.evaluate import Evaluation, Metric, Protocol, RecordResult, compare, merge
from kecore.evaluate.intervals import Z, interval

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


def test_ends_are_those_of_the_bounds() -> None:
    found = Evaluation(QUIET, tuple(row(str(i), i < 7) for i in range(10))).scores
    assert found["edit_success"].ends == pytest.approx((0.39678, 0.89221), abs=1e-5)  # Wilson's
    assert found["edit_magnitude"].ends == interval(0.24, 0.36 * 10 - 0.24**2 * 10, 10, (-1.0, 1.0))
    assert Evaluation(QUIET, (row("a", True),)).scores["edit_success"].ends is None


def test_ends_of_the_score() -> None:
    # Where the three parts are one and the same quantity, so is their harmonic mean.
    rows = tuple(row(str(i), i < 7, i < 7, i < 7) for i in range(10))
    found = Evaluation(QUIET, rows).scores
    assert found["score"].value == pytest.approx(0.7)
    assert found["score"].ends == pytest.approx(found["edit_success"].ends)
    perfect = Evaluation(QUIET, (row("a", True, True, True), row("b", True, True, True))).scores["score"]
    assert perfect.ends == pytest.approx((2 / (2 + Z**2), 1.0))


def test_values_outside_the_bounds_of_their_metric_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Metric("wrong", "edit", lambda probe, protocol: 1.5, bounds=(0.0, 1.0))
    monkeypatch.setattr("kecore.evaluate.result.metrics_of", lambda protocol: (wrong,))
    monkeypatch.setattr("kecore.evaluate.measuring.metrics_of", lambda protocol: (wrong,))
    with pytest.raises(PluginError, match=r"'wrong' gave values from 1\.5 to 1\.5, but declares"):
        _ = Evaluation(QUIET, (row("a", True),)).scores


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


def test_what_is_missing_is_listed_with_its_reason() -> None:
    bare = probe("paraphrase", GOOD)
    unmet = replace(probe("locality", GOOD), holds=False)
    rows = (row("a", True, True), RecordResult("b", "", (probe("edit", GOOD, rival=BAD), bare, unmet)), row("c", True))
    missing = Evaluation(QUIET, rows).missing
    assert missing["paraphrase_success"] == {"b": "no old answer to compare with", "c": "no paraphrase probe"}
    assert missing["locality_accuracy"]["b"] == "conditions that do not hold before the edit"
    assert missing["locality_accuracy"]["a"] == "no locality probe"
    assert "edit_success" not in missing


def test_a_score_of_zero_is_shown() -> None:
    found = Evaluation(QUIET, (row("a", False, False, True), row("b", False, False, True))).scores
    assert found["score"].value == 0
    assert found["score"].ends is None


def test_json_is_strict_and_complete() -> None:
    value = Evaluation(QUIET, (row("a", True, True, True), row("b", False, True, True))).to_json()
    again = json.loads(json.dumps(value, allow_nan=False))
    assert again == value
    assert again["protocol_hash"] == QUIET.hash()
    assert again["records"] == 2
    assert again["rows"][1]["values"]["edit_success"] == 0
    assert again["scores"]["edit_success"] == {
        "value": 0.5, "low": pytest.approx(0.0945, abs=1e-4), "high": pytest.approx(0.9055, abs=1e-4),
        "records": 2, "probes": 2,
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
