"""Adapters trained by peft: their factors are the adapter, and the model is left as it was."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch

from kecore import Editor, EditRequest, WeightEdit
from kecore.api.errors import ConfigError, KecoreWarning, MissingDependencyError
from kecore.api.method import MethodContext
from kecore.batch import RequestBatch
from kecore.inference import score_continuations
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.testing.snapshot import Snapshot

peft = pytest.importorskip("peft")

from kecore.engine.layers import linear_maps  # noqa: E402
from kecore.engine.tuning import Targets, in_contexts  # noqa: E402
from kecore_methods.finetune.adapter import AdapterConfig, AdapterTraining, adapted, plan_adapter  # noqa: E402
from kecore_methods.finetune.lora import Lora, non_orthogonality  # noqa: E402

FACTS = [EditRequest("The capital of {}", "Italy", "Apple"), EditRequest("The company of {}", "Tim Cook", "French")]
PROMPT = torch.tensor([[7, 33, 104, 21, 80]])
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: AdapterTraining(AdapterConfig(rank=3, alpha=5)).peft_config(peft, 10),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=10, tinit=1, tfinal=1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_factors_are_the_adapter(architecture: str, kind: str) -> None:
    """The model with the adapter on it is the model with ``U Vᵀ`` added to its weights, in float64 and everywhere."""
    model = tiny_model(architecture).double()
    view = ModelView.of(model)
    maps = linear_maps(view, range(4))
    before = Snapshot(model)
    with view.frozen(), torch.no_grad(), adapted(view, KINDS[kind](), maps) as adapter:
        torch.manual_seed(0)
        for parameter in adapter.parameters():
            parameter.data = torch.randn_like(parameter, dtype=torch.float64) / 4
        expected = model(PROMPT).logits
        updates = adapter.updates()
        published = {path: adapter.layer(path).get_delta_weight("kecore") for path in maps}
    assert not before.differences()
    with torch.no_grad():
        plain = model(PROMPT).logits
        for path, part in maps.items():
            delta = updates[part.name].matrix().double()
            stored = delta.t() if part.transposed else delta
            assert torch.allclose(stored, published[path], rtol=1e-5, atol=1e-6)
            part.parameter.data = part.parameter.data + stored
        got = model(PROMPT).logits
    assert float((got - expected).norm()) < 1e-5 * float((expected - plain).norm())


def test_pruned_triplets_are_left_out() -> None:
    view = ModelView.of(tiny_model("llama"))
    config = AdapterConfig()
    with view.frozen(), adapted(view, KINDS["adalora"](), config.adapted_maps(view)) as adapter, torch.no_grad():
        first, second, *_ = (adapter.layer(path).lora_E["kecore"] for path in adapter.maps)
        first.copy_(torch.tensor([[0.0], [2.0], [0.0]]))
        second.fill_(1)
        ranks = [update.rank for update in adapter.updates().values()]
    assert ranks == [1, 3]


def test_regulariser_is_the_published_one() -> None:
    view = ModelView.of(tiny_model("llama"))
    with view.frozen(), adapted(view, KINDS["adalora"](), AdapterConfig(layers=(1,)).adapted_maps(view)) as adapter:
        (path,) = adapter.maps
        layer = adapter.layer(path)
        p, q = (part["kecore"].detach().double() for part in (layer.lora_B, layer.lora_A))
        expected = sum((float(m[i] @ m[j]) - (i == j)) ** 2 for m in (p.t(), q) for i in range(3) for j in range(3))
        assert float(non_orthogonality(adapter).detach()) == pytest.approx(expected, rel=1e-5)


def test_first_step_of_adam_is_known() -> None:
    """B starts at zero and its first step is the learning rate, so the first update's entries are known."""
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        edit = editor.edit(FACTS[0], "lora", steps=1, learning_rate=0.01, rank=2, alpha=6, layers=[1])
    assert isinstance(edit, WeightEdit)
    (update,) = edit.updates.values()
    assert update.U.abs().mean() == pytest.approx(3 * 0.01, rel=1e-3)  # pyright: ignore
    assert float(update.V.abs().max()) <= 1 / math.sqrt(update.V.shape[0]) + 0.011  # pyright: ignore


def test_training_leaves_the_random_states() -> None:
    editor = Editor(tiny_model("gpt2"), tiny_tokenizer())
    torch.manual_seed(3)
    random.seed(3)
    before = Snapshot(editor.model)
    plain = editor.view
    from kecore_methods.finetune.lora import AdaLora

    context = MethodContext(AdaLora.Config(steps=10, dropout=0.1), editor.encoder)  # pyright: ignore
    AdaLora().plan(plain, RequestBatch.of(FACTS, editor.encoder), context)
    assert not before.differences()


def test_layers_below_the_adapter_run_once_and_change_nothing() -> None:
    """The factors are those of training through the whole model, and only the first pass sees the lower layers."""
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    view = editor.view
    calls = [0] * len(view.layers)

    def count(index: int) -> Callable[..., None]:
        def seen(*_: Any) -> None:
            calls[index] += 1

        return seen

    handles = [part.site.linear.module.register_forward_hook(count(part.index)) for part in view.layers]
    config = Lora.Config(steps=3, layers=(2,), contexts=0, stop_loss=0)  # pyright: ignore
    context, batch = MethodContext(config, editor.encoder), RequestBatch.of(FACTS, editor.encoder)
    edit = Lora().plan(view, batch, context)
    for handle in handles:
        handle.remove()
    assert calls == [1, 1, 3, 3]

    class Whole(AdapterTraining):
        def make_batch(self, view: ModelView, encoder: Any, wordings: Any, layer: int, preserved: Any) -> Targets:
            return super().make_batch(view, encoder, wordings, 0, preserved)

    slow = plan_adapter(view, batch, context, "lora", Whole(config))
    (got,), (expected,) = edit.updates.values(), slow.updates.values()
    assert torch.allclose(got.matrix(), expected.matrix(), rtol=1e-3, atol=1e-6)
    assert edit.notes["loss"] == pytest.approx(slow.notes["loss"], abs=1e-4)


def test_prompts_are_trained_behind_prefixes_too() -> None:
    """Two facts in three wordings are six rows; the losses of the bare prompts alone are others."""
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    losses: list[float] = []
    for contexts in (0, 2):
        context = MethodContext(Lora.Config(steps=1, contexts=contexts), editor.encoder)  # pyright: ignore
        batch = RequestBatch.of(FACTS, editor.encoder)
        facts = [[w.request for w in fact] for fact in in_contexts(editor.view, context, batch, contexts, 10)]
        assert [fact[0] for fact in facts] == FACTS
        assert all(len(set(fact)) == contexts + 1 and fact[-1].text.endswith(fact[0].text) for fact in facts)
        pairs = [(request.text, request.target) for fact in facts for request in fact]
        expected = -fmean(score.mean for score in score_continuations(editor.view, editor.encoder, pairs))
        losses += Lora().plan(editor.view, batch, context).notes["loss"]
        assert losses[-1] == pytest.approx(expected, abs=1e-4)
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)


def test_published_set_up_is_a_preset() -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    edit = editor.edit(FACTS, "adalora", preset="llama-2-7b", steps=1)
    assert isinstance(edit, WeightEdit)
    assert {name.split(".")[-2] for name in edit.updates} == {"q_proj", "v_proj"}
    assert len(edit.updates) == 2 * len(editor.view.layers)


def test_unknown_targets_are_named() -> None:
    view = ModelView.of(tiny_model("llama"))
    assert len(AdapterConfig(targets="all").adapted_maps(view)) == 4 * 7
    assert len(AdapterConfig(targets=("q_proj", "v_proj"), layers=(0, 2)).adapted_maps(view)) == 4
    with pytest.raises(ConfigError, match=r"no linear map ends in query; known: down_proj, gate_proj"):
        AdapterConfig(targets=("query",)).adapted_maps(view)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("kecore.inference.score_continuations", lambda *_a, **_o: pytest.fail("the model ran"))
    with pytest.raises(MissingDependencyError, match=r"pip install 'kecore\[lora\]'"):
        editor.edit(FACTS, "lora")
