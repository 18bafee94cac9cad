"""What fine-tuning methods share: the loss on targets, and what is kept beside them."""

from __future__ import annotations

import pytest
import torch
from memory_setting import FACT, OTHER, logits, opened

from kecore import Editor
from kecore.batch import RequestBatch
from kecore.engine.texts import load_passages, prompts_about_others
from kecore.engine.tuning import PreservingConfig, Targets

LAYER = 2


def change(editor: Editor) -> torch.Tensor:
    """Of the value projection of a layer, large enough to move every answer."""
    weight = editor.view.layers[LAYER].site.linear.weight
    return 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_loss_is_that_of_the_targets_and_the_kl_of_what_is_kept(weight: float) -> None:
    """Against the model itself with the change in its weight, one prompt at a time in float64."""
    editor = opened()
    facts = [FACT, OTHER]
    config = PreservingConfig(others=3, others_weight=weight)
    kept = [text for fact in facts for text in prompts_about_others(fact, load_passages()[:3])]
    assert len(set(kept)) == 6
    before = [logits(editor, text)[0, -1].double().log_softmax(-1) for text in kept]
    delta = change(editor)
    with editor.view.frozen():
        items = RequestBatch.of(facts, editor.encoder).encodings
        targets = Targets(
            editor.view, editor.encoder, items, LAYER, "target_new", config.prompts_to_preserve(editor.encoder, facts)
        )
        assert float(targets.scores()[1]) == pytest.approx(0, abs=1e-6)  # nothing has moved yet
        found = float(targets.loss({LAYER: delta}))
        own = float(Targets(editor.view, editor.encoder, items, LAYER, "target_new").loss({LAYER: delta}))
    with torch.no_grad():
        editor.view.layers[LAYER].site.linear.weight.add_(delta)
    wanted = 0.0
    for item in items:
        with torch.no_grad():
            scores = editor.model(input_ids=torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
        each = [float(scores[j - 1, item.ids[j]]) for j in range(item.start, len(item.ids))]
        wanted -= sum(each) / len(each) / len(items)
    assert own == pytest.approx(wanted, rel=1e-4)
    for text, old in zip(kept, before, strict=True):
        now = logits(editor, text)[0, -1].double().log_softmax(-1)
        wanted += weight * float((now.exp() * (now - old)).sum()) / len(kept)
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", ["ft-m", "locft-bf", "lora", "dpo", "calinet"])
def test_others_are_kept_by_every_method_that_is_asked_to(method: str) -> None:
    """With a large weight their answers move far less than without, and the target is still learnt."""
    moved: list[float] = []
    gained: list[float] = []
    texts = prompts_about_others(FACT, load_passages()[:4])
    for weight in (0.0, 10.0):
        editor = opened()
        before = [logits(editor, text)[0, -1].log_softmax(-1) for text in texts]
        own = logits(editor, FACT.text)[0, -1].log_softmax(-1)
        target = editor.encoder.encode(FACT.text, FACT.target)
        editor.edit(FACT, method, others=4, others_weight=weight, steps=25)
        after = [logits(editor, text)[0, -1].log_softmax(-1) for text in texts]
        moved.append(sum(float((b.exp() * (b - a)).sum()) for a, b in zip(after, before, strict=True)))
        gained.append(float((logits(editor, FACT.text)[0, -1].log_softmax(-1) - own)[target.ids[target.start]]))
    assert moved[1] < 0.5 * moved[0]
    assert gained[1] > 0.2
