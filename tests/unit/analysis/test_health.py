"""Side effects: perplexity, drift, paired intervals and matrices, each against its definition."""

from __future__ import annotations

import json
import math
import sys
from statistics import stdev

import pytest
import torch
from slow_reference import Slow, logits_of
from tiny_worlds import World, edited

from kecore import Editor
from kecore.api.errors import ConfigError, DataFormatError, EditStateError, MissingDependencyError
from kecore.api.types import EditRequest
from kecore.evaluate.cost import added_latency, edit_bytes
from kecore_analysis.health import Checkup, Perplexity, changes, checkup, paired, perplexity, weight_health
from kecore_analysis.tasks import TaskResult, make_task_set

TEXT = [
    "The capital of France is Paris.",
    "Where does the Danube flow? It flows to the Black Sea, not to Berlin or Vienna!",
    "Vinson Massif is located in the continent of Antarctica, the Danube in Europe. The Danube flows.",
]


def _loss(world: World, text: str, window: int) -> tuple[float, int]:
    ids = world.encoder.tokenizer(text)["input_ids"][:window]
    logits = torch.log_softmax(logits_of(world.view.model, ids), -1)
    return -sum(float(logits[i - 1, ids[i]]) for i in range(1, len(ids))), len(ids) - 1


@pytest.mark.parametrize("window", [10, 256])
def test_perplexity_is_its_definition(world: World, window: int) -> None:
    found = perplexity(world.view, world.encoder, TEXT, window=window, batch_tokens=64)
    wanted = [_loss(world, text, window) for text in TEXT]
    assert found.losses == pytest.approx([loss for loss, _ in wanted], abs=1e-9)
    assert found.tokens == tuple(n for _, n in wanted)
    assert found.value == pytest.approx(math.exp(sum(loss for loss, _ in wanted) / sum(n for _, n in wanted)))


def test_perplexity_by_hand() -> None:
    found = Perplexity((math.log(2) * 3, math.log(8)), (3, 1))
    assert found.value == pytest.approx(2 ** (6 / 4))
    assert Perplexity((math.inf,), (1,)).value == math.inf


def test_perplexity_needs_text(small: World) -> None:
    with pytest.raises(DataFormatError, match="two tokens"):
        perplexity(small.view, small.encoder, ["", "."])
    with pytest.raises(ConfigError, match="window"):
        perplexity(small.view, small.encoder, TEXT, window=1)


def test_paired_by_hand() -> None:
    found = paired([1, 0, 1, 0], [1, 1, 1, 1])
    assert (found.before, found.after, found.difference, found.items) == (0.5, 1, 0.5, 4)
    assert found.half_width == pytest.approx(1.959964 * stdev([0, 1, 0, 1]) / 2)
    assert paired([1], [0]).half_width is None
    json.dumps(found.to_json(), allow_nan=False)
    for pair in (([1], [1, 0]), ([], [])):
        with pytest.raises(ConfigError, match="same items"):
            paired(*pair)


def test_an_interval_is_paired_and_not_pooled() -> None:
    # All items lose the same: the difference is certain, however much they differ among themselves.
    assert paired([0.1, 0.5, 0.9], [0.0, 0.4, 0.8]).half_width == pytest.approx(0, abs=1e-12)


def test_perplexity_interval_has_its_coverage() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        tokens = torch.randint(5, 50, (60,), generator=generator)
        base = tokens * 3.0
        gaps = tokens * 0.1 + torch.randn(60, generator=generator) * tokens.sqrt()
        before = Perplexity(tuple(base.tolist()), tuple(tokens.tolist()))
        after = Perplexity(tuple((base + gaps).tolist()), tuple(tokens.tolist()))
        found = changes(Checkup(before), Checkup(after))["perplexity"]
        truth = before.value * (math.exp(0.1) - 1)
        assert found.half_width is not None
        covered += abs(found.difference - truth) < found.half_width
    assert 0.90 < covered / 300 < 0.98


def test_checkup_and_changes(small: World) -> None:
    after = edited(small)
    tasks = [make_task_set("cola", [{"sentence": text[:20], "label": 1} for text in TEXT])]
    looks = [checkup(w.view, w.encoder, passages=TEXT, tasks=tasks, prompts=TEXT[:2]) for w in (small, after)]
    found = changes(*looks)
    assert [*found] == ["perplexity", "drift", "agreement", "cola"]
    assert found["perplexity"].before == perplexity(small.view, small.encoder, TEXT).value
    slow = Slow(after.view.model, small.view.model, small.encoder.tokenizer, 1)
    drifts = [slow.probe("", text, ["Rome"], stable=True)["kl"] for text in TEXT[:2]]
    assert found["drift"].difference == pytest.approx(sum(drifts) / 2, abs=1e-9)
    same = changes(looks[0], looks[0])
    assert all(change.difference == change.half_width == 0 for change in same.values())


def test_agreement_and_drift_by_hand() -> None:
    old = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]]
    new = [[0.5, 0.4, 0.1], [0.7, 0.2, 0.1], [math.nan] * 3]
    looks = [Checkup(distributions=tuple(torch.tensor(rows).double().log())) for rows in (old, new)]
    found = changes(*looks)
    assert (found["agreement"].before, found["agreement"].after, found["agreement"].items) == (1, 1 / 3, 3)
    assert found["agreement"].half_width == pytest.approx(1.959964 * stdev([0, 1, 1]) / math.sqrt(3))
    gaps = [sum(p * math.log(p / q) for p, q in zip(*pair, strict=True)) for pair in zip(old[:2], new[:2], strict=True)]
    assert found["drift"].items == 2
    assert found["drift"].after == pytest.approx(sum(gaps) / 2)


def test_what_is_not_finite_is_null() -> None:
    values = changes(Checkup(Perplexity((1.0, 2.0), (1, 1))), Checkup(Perplexity((1.0, math.inf), (1, 1))))
    assert values["perplexity"].to_json() == {
        "before": pytest.approx(math.exp(1.5)), "after": None, "difference": None, "half_width": None, "items": 2
    }  # fmt: skip


def test_checkups_of_other_things_are_refused(small: World) -> None:
    text = perplexity(small.view, small.encoder, TEXT)
    result = TaskResult("cola", (1.0,), (0,), (0,))
    cases = [
        (Checkup(text), Checkup(), "different things"),
        (Checkup(text), Checkup(Perplexity(text.losses, (1, 2, 3))), "different passages"),
        (Checkup(tasks={"cola": result}), Checkup(), "different tasks"),
        (Checkup(harness={"a.acc": {"0": 1}}), Checkup(harness={"a.acc": {"1": 1}}), "other documents"),
    ]
    for before, after, message in cases:
        with pytest.raises(ConfigError, match=message):
            changes(before, after)


def test_harness_scores_are_compared_document_by_document() -> None:
    looks = [Checkup(harness={"t.acc": dict(zip("abc", values, strict=True))}) for values in ((1, 0, 0), (0, 0, 1))]
    assert changes(*looks)["t.acc"].difference == 0
    assert changes(*looks)["t.acc"].half_width == pytest.approx(1.959964 / math.sqrt(3))


def test_harness_is_an_extra(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):  # another test may have imported them
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"kecore\[eval\]"):
        checkup(small.view, small.encoder, harness=["boolq"])


@pytest.fixture
def session() -> Editor:
    from kecore.testing.models import tiny_model, tiny_tokenizer

    return Editor(tiny_model("llama", layers=2), tiny_tokenizer())


def test_edited_matrices_and_cost(session: Editor) -> None:
    assert weight_health(session.model) == []
    with pytest.raises(EditStateError, match="no edit"):
        added_latency(session.view, session.encoder, ["The capital"])
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    edit = session.edit(EditRequest("The capital of {} is", "France", "Rome"), "ft-m")
    found = weight_health(session.model)
    now = dict(session.model.named_parameters())
    assert {health.name for health in found} == {n for n, p in now.items() if not torch.equal(p, before[n])}
    for health in found:
        for i, matrix in enumerate((before[health.name].double(), now[health.name].detach().double())):
            assert health.norm[i] == pytest.approx(float(matrix.square().sum().sqrt()))
            assert health.spectral[i] == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)))
            assert health.condition[i] == pytest.approx(float(torch.linalg.cond(matrix)), rel=1e-6)
            assert health.stable_rank[i] == pytest.approx((health.norm[i] / health.spectral[i]) ** 2)
        assert health.change > 0
        json.dumps(health.to_json(), allow_nan=False)
    assert edit_bytes(edit) == edit.inspect()["bytes"] > 0
    latency = added_latency(session.view, session.encoder, ["The capital", "法国"], tokens=3, rounds=1)
    assert latency.base > 0
    assert latency.added == latency.edited - latency.base
    with pytest.raises(ConfigError, match="one prompt"):
        added_latency(session.view, session.encoder, [])
