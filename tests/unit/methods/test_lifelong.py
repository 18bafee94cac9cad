"""UltraEdit and StableEdit: the update is the papers' ridge regression, and statistics go on over a session."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kecore import Editor, EditRequest, WeightEdit
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_methods.locate.lifelong import features

FACTS = [
    EditRequest("The company of {}", "Tim Cook", "French"),
    EditRequest("The capital of {}", "France", "Rome"),
    EditRequest("A river in {}:", "Italy", "Danube"),
]


@pytest.fixture(scope="module")
def editor() -> Editor:
    """A session whose tests take their edits off again."""
    return Editor(tiny_model("llama"), tiny_tokenizer())


def edited(editor: Editor, facts: list[EditRequest], method: str, **config: Any) -> WeightEdit:
    edit = editor.edit(facts, method, layers=[1], **config)
    assert isinstance(edit, WeightEdit)
    return edit


def test_ultraedit_is_ridge_regression_on_normalised_features(editor: Editor) -> None:
    """The absolute form, ``v = -eta |h^|^2 g^`` and ``(HᵀH + I)⁻¹HᵀV``, by the normal equations in float64."""
    with editor:
        with editor.view.frozen():
            texts = [editor.encoder.encode(fact.text, fact.target) for fact in FACTS]
            seen = features(editor.view, editor.encoder, texts, [1])[1]
        edit = edited(editor, FACTS, "ultraedit", learning_rate=1e-3, ridge_lambda=1.0)
    h, g = seen.keys.double(), seen.gradients.double()

    def normal(x: torch.Tensor) -> torch.Tensor:
        every = torch.cat([torch.zeros(1, x.shape[1]), x])
        return (x - every.mean(0)) / every.std(0, correction=0)

    v = -1e-3 * normal(h).square().sum(1, keepdim=True) * normal(g)
    expected = (torch.linalg.inv(h.t() @ h + torch.eye(h.shape[1])) @ h.t() @ v).t()
    (update,) = edit.updates.values()
    torch.testing.assert_close(update.matrix().double(), expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))


def test_stableedit_is_ultraedit_with_whitened_gradients(editor: Editor) -> None:
    """Cold, in the absolute form: ``g^ = (C + s mean(diag C) I)^(-1/2) (g - mu)``, the root by an SVD in float64."""
    with editor:
        with editor.view.frozen():
            texts = [editor.encoder.encode(fact.text, fact.target) for fact in FACTS]
            seen = features(editor.view, editor.encoder, texts, [1])[1]
        absolute = {"learning_rate": 1e-3, "ridge_lambda": 1.0}
        edit = edited(editor, FACTS, "stableedit", warm_up=0, shrinkage=0.2, **absolute)
    h, g = (torch.cat([torch.zeros(1, x.shape[1]), x]).double() for x in (seen.keys, seen.gradients))
    key = ((h - h.mean(0)) / h.std(0, correction=0))[1:]
    covariance = torch.cov(g.t(), correction=0)
    u, s, _ = torch.linalg.svd(covariance + 0.2 * covariance.diagonal().mean() * torch.eye(len(covariance)))
    white = (g - g.mean(0))[1:] @ (u / s.sqrt()) @ u.t()
    v = -1e-3 * key.square().sum(1, keepdim=True) * white
    expected = (torch.linalg.inv(h.t() @ h + torch.eye(h.shape[1])) @ h[1:].t() @ v).t()
    (update,) = edit.updates.values()
    torch.testing.assert_close(update.matrix().double(), expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["ultraedit", "stableedit"])
def test_statistics_go_on_over_a_session_and_come_off_with_the_edit(editor: Editor, method: str) -> None:
    def count(edit: WeightEdit) -> int:
        return int(edit.state["running/1/gradients/count"])

    with editor:
        first = edited(editor, FACTS[:1], method)
        second = edited(editor, FACTS[1:], method)
        editor.revert()
        again = edited(editor, FACTS[1:], method)
    assert count(second) == count(first) + second.notes["tokens"] == count(again)


def test_stableedit_warms_up_once(editor: Editor) -> None:
    with editor:
        warm = edited(editor, FACTS[:1], "stableedit", warm_up=3, warm_up_tokens=4)
        cold = edited(editor, FACTS[1:2], "stableedit", warm_up=3, warm_up_tokens=4)
    seen = int(warm.state["running/1/keys/count"]) - 1 - warm.notes["tokens"]
    assert seen >= 3 * 4
    assert int(cold.state["running/1/keys/count"]) == 1 + seen + warm.notes["tokens"] + cold.notes["tokens"]
    with editor:
        none = edited(editor, FACTS[:1], "stableedit", warm_up=0)
    assert int(none.state["running/1/keys/count"]) == 1 + none.notes["tokens"]
