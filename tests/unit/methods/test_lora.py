"""Adapters trained by peft: their factors are the adapter, and the model is left as it was."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kecore import Editor, EditRequest, WeightEdit
from kecore.errors import ConfigError, KecoreWarning, MissingDependencyError
from kecore.model_view import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.testing.snapshot import Snapshot

peft = pytest.importorskip("peft")

from kecore_methods.finetune.adapter import AdapterConfig, adapted, linear_maps  # noqa: E402
from kecore_methods.finetune.lora import lora_kind, non_orthogonality  # noqa: E402

FACTS = [EditRequest("The capital of {}", "Italy", "Apple"), EditRequest("The company of {}", "Tim Cook", "French")]
PROMPT = torch.tensor([[7, 33, 104, 21, 80]])
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lora_kind(AdapterConfig(rank=3, alpha=5), peft),
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
    from kecore.method import MethodContext
    from kecore_methods.finetune.lora import AdaLora

    context = MethodContext(AdaLora.Config(steps=10, dropout=0.1), editor.encoder)  # pyright: ignore
    AdaLora().plan(plain, FACTS, context)
    assert not before.differences()


def test_unknown_targets_are_named() -> None:
    view = ModelView.of(tiny_model("llama"))
    assert len(AdapterConfig(targets="all").adapted_maps(view)) == 4 * 7
    assert len(AdapterConfig(targets=("q_proj", "v_proj"), layers=(0, 2)).adapted_maps(view)) == 4
    with pytest.raises(ConfigError, match=r"no linear map ends in query; known: down_proj, gate_proj"):
        AdapterConfig(targets=("query",)).adapted_maps(view)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install kecore\[lora\]"):
        editor.edit(FACTS, "lora")
