"""KN changes the values of the neurons that it found, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kecore import Editor, EditRequest, WeightEdit
from kecore.api.errors import NumericalError, UnsupportedModelError
from kecore.edit import LowRank
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_methods.locate.neurons import attribute

FACTS = [EditRequest("The capital of {}", "Italy", "Apple"), EditRequest("The company of {}", "Tim Cook", "French")]
FEW: dict[str, Any] = {"contexts": 2, "context_tokens": 3, "steps": 4}


@pytest.fixture
def editor() -> Editor:
    return Editor(tiny_model("llama"), tiny_tokenizer())


def planned(editor: Editor, *requests: EditRequest, **settings: Any) -> WeightEdit:
    edit = editor.edit(list(requests), "kn", **FEW, **settings)
    assert isinstance(edit, WeightEdit)
    return edit


def columns(edit: WeightEdit) -> dict[tuple[int, int], torch.Tensor]:
    """Each changed column of a value projection by layer and index."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for layer, update in zip(edit.notes["layers"], edit.updates.values(), strict=True):
        assert isinstance(update, LowRank)
        matrix = update.matrix()
        found |= {(layer, i): matrix[:, i] for i in matrix.any(0).nonzero().flatten().tolist()}
    return found


def test_update_takes_the_old_answer_out_and_puts_the_new_one_in(editor: Editor) -> None:
    """``v += ±(lambda2 t' - lambda1 t)`` with rows of the unembedding as they are (section 5.1 of the paper)."""
    request = EditRequest("The capital of {}", "Italy", "Apple", ground_truth="Danube")
    unembedding = editor.view.unembedding.weight.detach().clone()  # type: ignore[union-attr, operator]
    weights = [layer.site.linear.weight.clone() for layer in editor.view.layers]
    edit = planned(editor, request, old_weight=0.5, new_weight=3)
    neurons = edit.notes["neurons"][request.id]
    rows = [editor.encoder.encode(request.text, word) for word in ("Danube", "Apple")]
    old, new = (unembedding[row.ids[row.start]] for row in rows)
    got = columns(edit)
    assert {(layer, index) for layer, index, *_ in neurons} == set(got)
    for layer, index, _attribution, share, activation in neurons:
        length = weights[layer].norm(dim=0).mean() * (1 if activation > 0 else -1)
        assert torch.allclose(got[layer, index], length * (3 * new / new.norm() - 0.5 * old / old.norm()), atol=1e-6)
        assert share > 0


def test_erase_leaves_values_of_zero(editor: Editor) -> None:
    edit = planned(editor, FACTS[0], operation="erase")
    for layer, index in columns(edit):
        assert not editor.view.layers[layer].site.linear.weight[:, index].any()
    assert len(columns(edit)) >= 2


def test_the_old_answer_is_the_records_or_the_models_own(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def spied(view: Any, encoder: Any, prompts: list[str], answers: list[int], **options: Any) -> Any:
        asked.append(answers)
        return attribute(view, encoder, prompts, answers, **options)

    monkeypatch.setattr("kecore_methods.locate.kn.attribute", spied)
    ids = torch.tensor([editor.encoder.encode(FACTS[0].text).ids])
    own = int(editor.model(ids).logits[0, -1].argmax())
    given = editor.encoder.encode(FACTS[0].text, "Danube")
    planned(editor, FACTS[0])
    editor.revert()
    planned(editor, EditRequest(FACTS[0].prompt, FACTS[0].subject, FACTS[0].target, "Danube"))
    assert asked == [[own] * 3, [given.ids[given.start]] * 3]


def test_refuses_what_has_no_neurons(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kecore_methods.locate.kn.knowledge_neurons", lambda *_args, **_options: [])
    with pytest.raises(NumericalError, match="no activation makes the old answer more likely"):
        planned(editor, FACTS[0])


def test_refuses_an_unembedding_of_another_width() -> None:
    editor = Editor(tiny_model("opt", word_embed_proj_dim=16), tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match="does not read the residual stream of width 32"):
        planned(editor, FACTS[0])
