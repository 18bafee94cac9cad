"""Metrics on cases worked out by hand."""

from __future__ import annotations

import math

import pytest
from hand_scores import probe, score

from kecore.evaluate.metrics import (
    METRICS,
    free_generation,
    magnitude,
    measure,
    stability,
    strict_accuracy,
    success,
    token_accuracy,
)
from kecore.evaluate.protocol import Protocol
from kecore.evaluate.scoring import ContinuationScore

PLAIN = Protocol()


def test_a_score_by_hand() -> None:
    s = score(0.5, 0.125, wrong=(1,))
    assert s.total == pytest.approx(math.log(0.0625))
    assert math.exp(s.mean) == pytest.approx(0.25)
    assert s.correct == (True, False)
    assert s.accuracy == 0.5
    assert not s.exact


def test_success_is_per_token_by_default() -> None:
    # Two tokens of 0.5 each: mean 0.5 beats 0.4, the product 0.25 does not.
    p = probe("edit", score(0.5, 0.5), rival=score(0.4))
    assert success(p, PLAIN) == 1
    assert success(p, Protocol(probability="sum")) == 0
    assert magnitude(p, PLAIN) == pytest.approx(0.1)
    assert magnitude(p, Protocol(probability="sum")) == pytest.approx(0.25 - 0.4)


def test_a_tie_is_no_success() -> None:
    assert success(probe("edit", score(0.5), rival=score(0.5)), PLAIN) == 0


def test_without_rival_there_is_no_success() -> None:
    assert success(probe("edit", score(0.5)), PLAIN) is None
    assert magnitude(probe("edit", score(0.5)), PLAIN) is None


def test_accuracies_take_the_best_answer() -> None:
    p = probe("portability", score(0.5, 0.5, 0.5, wrong=(0,)), score(0.5, 0.5, wrong=(0, 1)))
    assert token_accuracy(p, PLAIN) == pytest.approx(2 / 3)
    assert strict_accuracy(p, PLAIN) == 0
    p = probe("portability", score(0.5, wrong=(0,)), score(0.5, 0.5))
    assert token_accuracy(p, PLAIN) == strict_accuracy(p, PLAIN) == 1
    assert token_accuracy(probe("locality"), PLAIN) is None
    assert strict_accuracy(probe("locality"), PLAIN) is None


def test_free_generation_follows_the_protocol() -> None:
    p = probe("edit", score(0.5), answers=("Rome",), text="It is Rome")
    assert free_generation(p, PLAIN) == 0
    assert free_generation(p, Protocol(match="contains")) == 1
    assert free_generation(p, Protocol(match="exact")) == 0
    assert free_generation(probe("edit", score(0.5)), PLAIN) is None


def test_stability_counts_equal_argmax_and_not_correctness() -> None:
    # EasyEdit's example: two of three tokens the same is 2/3, right or wrong.
    before = probe("locality", score(0.5, 0.5, 0.5, wrong=(0,)))
    after = probe("locality", score(0.9, 0.9, 0.9, wrong=(0, 2)))
    assert stability(before, after) == pytest.approx(2 / 3)
    assert stability(before, before) == 1


def test_stability_of_the_models_own_answer() -> None:
    assert stability(probe("locality", text="a"), probe("locality", text="a")) == 1
    assert stability(probe("locality", text="a"), probe("locality", text="b")) == 0
    assert stability(probe("locality"), probe("locality")) is None


def test_a_record_is_the_mean_of_its_probes_and_axes_weigh_the_same() -> None:
    right, wrong = score(0.5), score(0.5, wrong=(0,))
    found = measure(
        [
            probe("paraphrase", right, rival=score(0.1)),
            probe("paraphrase", wrong, rival=score(0.9)),
            probe("portability", right, axis="a"),
            probe("portability", right, axis="b"),
            probe("portability", wrong, axis="b"),
            probe("portability", wrong, axis="b"),
        ],
        Protocol(max_new_tokens=0),
        compared=False,
    )
    assert found["paraphrase_success"] == (0.5, 2)
    assert found["paraphrase_strict_accuracy"] == (0.5, 2)
    assert found["portability.a"] == (1, 1)
    assert found["portability.b"] == (pytest.approx(1 / 3), 3)
    assert found["portability"] == (pytest.approx(2 / 3), 4)
    assert "edit_success" not in found
    assert "locality" not in found


def test_metric_keys_differ() -> None:
    keys = [metric.key for metric in METRICS]
    assert len(set(keys)) == len(keys)


def test_probe_json_is_finite_for_a_broken_model() -> None:
    broken = ContinuationScore((-math.inf,), (1,), (-1,))
    assert probe("edit", broken).to_json()["probability"] == [0.0]
