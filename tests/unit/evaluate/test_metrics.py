"""Metrics on cases worked out by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

import pytest
import torch
from hand_scores import probe, score

from kecore.api.errors import ConfigError, PluginError
from kecore.api.plugins import Plugins
from kecore.evaluate import AnsweredProbe, Evaluation, RecordResult, compare, metrics
from kecore.evaluate.measuring import measure
from kecore.evaluate.metrics import (
    GROUP,
    STANDARD,
    Metric,
    divergence,
    family,
    free_generation,
    metrics_of,
    stability,
    strict_accuracy,
)
from kecore.evaluate.protocol import Protocol
from kecore.inference.scoring import ContinuationScore
from kecore_metrics.standard import magnitude, opinion, perplexity, success, token_accuracy

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


def test_perplexity_of_the_target_by_hand() -> None:
    # Of 1/2 and 1/8 the mean log-probability is ln 1/4.
    p = probe("edit", score(0.5, 0.125), score(0.9), rival=score(0.1))
    assert perplexity(p, PLAIN) == pytest.approx(4)
    assert perplexity(probe("edit"), PLAIN) is None
    lost = ContinuationScore((-math.inf, -1.0), (1, 2), (1, 2))
    assert perplexity(probe("edit", lost), PLAIN) is None
    assert perplexity(probe("edit", ContinuationScore((-800.0,), (1,), (1,))), PLAIN) is None
    wordings = [probe("paraphrase", score(0.5)), probe("paraphrase", score(0.125))]
    assert measure(wordings, PLAIN, compared=False)["paraphrase_perplexity"] == (pytest.approx(5), 2)


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


def test_probe_json_is_finite_for_a_broken_model() -> None:
    broken = ContinuationScore((-math.inf,), (1,), (-1,))
    assert probe("edit", broken).to_json()["probability"] == [0.0]


def test_everything_that_must_be_named() -> None:
    both = {"answers": ("Rome", "Roma"), "also": (("Paris",),)}
    named = probe("edit", score(0.5), text="in Paris, and before that in Roma", **both)
    assert free_generation(named, PLAIN) == 1
    assert free_generation(probe("edit", score(0.5), text="Rome", **both), PLAIN) == 0
    assert strict_accuracy(named, PLAIN) is None
    assert token_accuracy(named, PLAIN) is None


def test_divergence_by_hand() -> None:
    p, q = (torch.tensor(values).log() for values in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert divergence(p, p) == 0
    assert divergence(p, torch.full((3,), math.nan)) is None


QUIET = Protocol(max_new_tokens=0)


def test_an_opinion_by_hand() -> None:
    new, old = (score(0.5, 0.5), score(0.125)), (score(0.25), score(0.25))
    before, after = (replace(probe("paraphrase", *new), rival_scores=old) for _ in range(2))
    # Per token, over all replies: new (1/2 * 1/2 * 1/8)^(1/3) = 2^(-5/3), old 1/4; z_topic is 1 where nothing changed.
    unchanged = 2 ** (-5 / 3) / (2 ** (-5 / 3) + 1 / 4)
    assert opinion(before, after) == pytest.approx(unchanged)
    likelier = replace(before, scores=(score(0.25, 0.25),))
    assert opinion(likelier, after) == pytest.approx(unchanged)
    once = replace(before, scores=(score(0.75),))
    assert opinion(once, after) == pytest.approx(unchanged * 2 ** (-5 / 3) / 0.75)
    assert opinion(probe("paraphrase", *new), probe("paraphrase", *new)) is None
    broken = replace(after, scores=(ContinuationScore((-math.inf,), (1,), (-1,)),))
    assert opinion(before, broken) is None
    far = ContinuationScore((-1e6,), (1,), (1,))
    assert opinion(before, replace(after, scores=(far,))) == 0


def test_a_test_of_several_prompts_counts_once() -> None:
    right, wrong = score(0.5), score(0.5, wrong=(0,))
    hops = [probe("hop", s, test="0", need="all") for s in (right, right, wrong)]
    asked = [probe("multi_hop", s, test=test) for s, test in ((wrong, "0"), (right, "0"), (wrong, "1"))]
    found = measure([*hops, *asked], QUIET, compared=False)
    assert found["hop_strict_accuracy"] == (0, 3)
    assert found["multi_hop_strict_accuracy"] == (0.5, 3)


def test_probes_whose_conditions_do_not_hold_are_left_out() -> None:
    right, wrong = score(0.5), score(0.5, wrong=(0,))
    probes = [probe("portability", right, holds=True), probe("portability", wrong, holds=False)]
    assert measure(probes, QUIET, compared=False)["portability"] == (1, 1)
    assert "portability" not in measure(probes[1:], QUIET, compared=False)


def test_conditions_are_those_of_the_model_before() -> None:
    rows = [
        Evaluation(QUIET, (RecordResult("a", "", (probe("portability", score(0.5), holds=holds),)),))
        for holds in (False, True)
    ]
    found = compare(*rows)
    assert "portability" not in found.scores
    assert found.skipped["portability"] == 1


def test_texts_are_written_for_kinds_that_need_them() -> None:
    keys = {m.key for m in metrics_of(PLAIN) if m.applies(PLAIN, compared=False)}
    assert {"free_generation", "portability_free_generation", "multi_hop", "hop_accuracy"} <= keys
    assert not {"locality_free_generation", "locality", "neighbourhood_stability"} & keys
    quiet = {m.key for m in metrics_of(QUIET) if m.applies(QUIET, compared=True)}
    assert {"locality", "multi_hop_strict_accuracy"} <= quiet
    assert not {"free_generation", "multi_hop"} & quiet


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A stranger's module ``their_metrics``, whose NAMEs stand in the group as ``name``, beside kecore's own."""
    module = ModuleType("their_metrics")
    monkeypatch.setitem(sys.modules, "their_metrics", module)
    names = ("length", "clash", "broken", "missing", "double")
    theirs = [EntryPoint(name, f"their_metrics:{name.upper()}", GROUP) for name in names]
    found = Plugins([*entry_points(group=GROUP), *theirs], noun="metric family", check=metrics._check,
                    missing=ConfigError)  # fmt: skip
    monkeypatch.setattr(metrics, "_plugins", lambda: found)
    metrics._taken.cache_clear()
    yield module
    metrics._taken.cache_clear()


def test_a_strangers_metrics_are_taken_where_asked_for(offered: ModuleType) -> None:
    def length(probe: AnsweredProbe, protocol: Protocol) -> float:
        return float(len(probe.prompt))

    def closer(before: AnsweredProbe, after: AnsweredProbe) -> float:
        return after.scores[0].mean - before.scores[0].mean

    offered.LENGTH = (Metric("length", "edit", length), Metric("closer", "edit", pair=closer))
    rows = [
        Evaluation(Protocol(max_new_tokens=0, extra=("length",)), (RecordResult("a", "", (probe("edit", s),)),))
        for s in (score(0.25), score(0.5))
    ]
    assert rows[0].scores["length"].value == 1
    assert "closer" not in rows[0].scores
    assert compare(*rows).scores["closer"].value == pytest.approx(math.log(2))
    assert "length" not in Evaluation(QUIET, rows[0].rows).scores


def test_families_that_cannot_be_used(offered: ModuleType) -> None:
    offered.CLASH = Metric("edit_success", "edit", success)
    offered.BROKEN = "no metric"
    offered.DOUBLE = Metric("twice", "edit", success, pair=stability)
    with pytest.raises(ConfigError, match="'success' and 'clash' both have a 'edit_success'"):
        metrics_of(Protocol(extra=("clash",)))
    with pytest.raises(PluginError, match="must lead to a Metric"):
        family("broken")
    with pytest.raises(PluginError, match="exactly one"):
        family("double")
    with pytest.raises(PluginError, match="cannot be imported"):
        family("missing")
    with pytest.raises(ConfigError, match="did you mean 'fluency'"):
        metrics_of(Protocol(extra=("fluencyy",)))


def test_our_own_families_stand_in_the_same_group() -> None:
    names = {point.name for point in entry_points(group=GROUP) if point.dist and point.dist.name == "kecore"}
    assert {*STANDARD, "kl", "fluency", "consistency", "rouge", "bertscore", "judge"} <= names
    every = [metric.key for name in names for metric in family(name)]
    assert len(set(every)) == len(every)
