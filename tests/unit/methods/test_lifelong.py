"""UltraEdit and StableEdit: the update is the papers' ridge regression, and statistics go on over a session."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kecore import Editor, EditRecord, EditRequest, WeightEdit
from kecore.api.errors import ConfigError, RequestError
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_methods.locate.lifelong import Running, features, named_matrices, value_matrices

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
            (seen,) = features(editor.view, editor.encoder, texts, value_matrices(editor.view, [1]))
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
            (seen,) = features(editor.view, editor.encoder, texts, value_matrices(editor.view, [1]))
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


GATE_AND_UP = ["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "layers.2.mlp.gate_proj"]
PUBLISHED: dict[str, Any] = {
    "learning_rate": 1e-3, "ridge_lambda": 1.0, "start": "empty", "share_statistics": True, "matrices": GATE_AND_UP
}  # fmt: skip


def released(of_matrices: list[tuple[torch.Tensor, torch.Tensor]], whiten: bool) -> list[torch.Tensor]:
    """Return the updates ``[d_out, d_in]`` of matrices of one shape, by the released code's formulas in float64.

    Mean and sample spread are those of the keys and gradients of all matrices together. StableEdit whitens gradients
    once more of them were seen than they have coordinates, by ``scatter / (n - d - 1)``.
    """
    every_key = torch.cat([keys for keys, _ in of_matrices])
    every_gradient = torch.cat([gradients for _, gradients in of_matrices])
    n, d = every_gradient.shape
    updates: list[torch.Tensor] = []
    for keys, gradients in of_matrices:
        normal_keys = (keys - every_key.mean(0)) / every_key.std(0)
        normal = (gradients - every_gradient.mean(0)) / every_gradient.std(0)
        if whiten and n > d + 1:
            centred = every_gradient - every_gradient.mean(0)
            values, vectors = torch.linalg.eigh(centred.t() @ centred / (n - d - 1))
            root = vectors @ torch.diag(values.clamp(min=1e-6).rsqrt()) @ vectors.t()
            normal = (gradients - every_gradient.mean(0)) @ root
        steps = -1e-3 * normal_keys.square().sum(1, keepdim=True) * normal
        system = keys.t() @ keys + torch.eye(keys.shape[1], dtype=keys.dtype)
        updates.append(torch.linalg.solve(system, keys.t() @ steps).t())
    return updates


@pytest.mark.parametrize("method", ["ultraedit", "stableedit"])
@pytest.mark.parametrize("facts", [1, 60], ids=["fewer tokens than coordinates", "more"])
def test_the_published_form(editor: Editor, method: str, facts: int) -> None:
    """Gates and up-projections with statistics of their shape in common, which begin with nothing."""
    requests = [EditRequest(f"Number {i} of {{}} is", "Italy", f"Paris {i}") for i in range(facts)]
    with editor:
        with editor.view.frozen():
            texts = [editor.encoder.encode(fact.text, fact.target) for fact in requests]
            seen = features(editor.view, editor.encoder, texts, named_matrices(editor.view, GATE_AND_UP))
        extra: dict[str, Any] = {"warm_up": 0, "shrinkage": None} if method == "stableedit" else {}
        edit = editor.edit(requests, method, **PUBLISHED, **extra)
    assert isinstance(edit, WeightEdit)
    full = 3 * len(seen[0].keys) > seen[0].gradients.shape[1] + 1
    assert full == (facts > 1)
    wanted = released([(one.keys.double(), one.gradients.double()) for one in seen], method == "stableedit")
    for name, update in zip(GATE_AND_UP, wanted, strict=True):
        found = edit.updates[f"model.{name}.weight"].matrix().double()
        assert float((found - update).norm() / update.norm()) < 2e-3


def test_a_lone_token_is_refused_where_statistics_begin_with_nothing() -> None:
    running = Running({}, "x", zero=False)
    running.add(torch.ones(1, 3))
    with pytest.raises(RequestError, match="one token, which has no spread"):
        running.normalised(torch.ones(1, 3))


def test_a_matrix_that_is_not_there_is_named_with_those_that_are(editor: Editor) -> None:
    with pytest.raises(ConfigError, match=r"ends in 'mlp\.w1'; those of the first layer: .*mlp\.gate_proj"):
        editor.edit(FACTS, "ultraedit", matrices=["mlp.w1"])


def test_stableedit_warms_up_with_the_sessions_examples(editor: Editor) -> None:
    editor.examples = tuple(EditRecord(fact) for fact in FACTS[1:])
    try:
        with editor:
            edit = edited(editor, FACTS[:1], "stableedit", warm_up_facts=2000)
    finally:
        editor.examples = ()
    texts = [editor.encoder.encode(fact.text, fact.target) for fact in FACTS]
    tokens = sum(len(text.ids) - text.start for text in texts)
    assert int(edit.state["running/1/keys/count"]) == 1 + tokens
