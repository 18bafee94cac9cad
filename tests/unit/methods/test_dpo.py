"""DPO: the published loss in float64, the old answer's choice, and what training does to the odds."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from kecore import Editor, EditRequest
from kecore.api.errors import KecoreWarning
from kecore.inference import score_continuations
from kecore.testing import tiny_model, tiny_tokenizer

pytest.importorskip("peft")

from kecore_methods.finetune.dpo import Dpo, dpo_loss


def test_loss_is_the_papers() -> None:
    """Eq. 7 by its own words: a logistic of the difference of two log-ratios."""
    draw = torch.Generator().manual_seed(0)
    new, old, new_before, old_before = (-5 * torch.rand(4, 6, generator=draw, dtype=torch.float64)).unbind()
    expected = 0.0
    for w, l, w0, l0 in zip(new.exp(), old.exp(), new_before.exp(), old_before.exp(), strict=True):  # noqa: E741
        reward = 0.3 * math.log(w / w0) - 0.3 * math.log(l / l0)
        expected -= math.log(1 / (1 + math.exp(-reward))) / 6
    assert float(dpo_loss(new, old, new_before, old_before, 0.3).mean()) == pytest.approx(expected, rel=1e-12)
    assert dpo_loss(new, old, new, old, 0.3).tolist() == pytest.approx([math.log(2)] * 6)


def test_training_ends_when_every_fact_is_done() -> None:
    """Not when the mean of the facts is: the easier one would pay for the harder."""
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    facts = [
        EditRequest("The capital of {}", "Italy", "Apple", "Rome"),
        EditRequest("The river of {} is called", "France", "Danube", "the Black Sea"),
    ]
    pairs = [(fact.text, answer) for fact in facts for answer in (fact.target, fact.ground_truth or "")]

    def odds() -> list[float]:
        found = [score.total for score in score_continuations(editor.view, editor.encoder, pairs)]
        return [new - old for new, old in zip(found[::2], found[1::2], strict=True)]

    before = odds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        edit = editor.edit(facts, Dpo, steps=200, stop_loss=0.55)
    losses = [math.log1p(math.exp(-0.1 * (now - then))) for now, then in zip(odds(), before, strict=True)]
    assert len(edit.notes["loss"]) < 200
    assert max(losses) < 0.55 + 0.02  # taken before the last update
    # The mean was there in an earlier pass.
    assert edit.notes["loss"][-2] < 0.55


@pytest.mark.parametrize("truth", ["Rome", None])
def test_odds_turn_to_the_new_answer(truth: str | None) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    request = EditRequest("The capital of {}", "Italy", "Apple", truth)
    pairs = [(request.text, "Apple"), (request.text, "Rome")]

    def odds() -> float:
        new, old = score_continuations(editor.view, editor.encoder, pairs)
        return new.total - old.total

    before = odds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        edit = editor.edit(request, Dpo, steps=40)
    losses = edit.notes["loss"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    if truth is not None:
        # The loss of the last pass is taken before its update, so the odds are at least those that it implies.
        assert odds() - before > -math.log(math.expm1(losses[-1])) / 0.1 - 0.5
    assert losses[-1] < 0.55
