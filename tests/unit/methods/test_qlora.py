"""QLoRA's base is the published 4-bit one, adapters see it, and the model never does."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from kecore import Editor, EditRequest
from kecore.api.errors import MissingDependencyError
from kecore.batch import RequestBatch
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.testing.snapshot import Snapshot

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from kecore.engine.layers import linear_maps  # noqa: E402
from kecore_methods.finetune.adapter import AdapterConfig, AdapterTraining, adapted  # noqa: E402
from kecore_methods.finetune.qlora import QLoraConfig, quantised  # noqa: E402

FACTS = [EditRequest("The capital of {}", "Italy", "Apple"), EditRequest("The company of {}", "Tim Cook", "French")]
PROMPT = torch.tensor([[7, 33, 104, 21, 80]])
BLOCK = 64
WIDE: dict[str, dict[str, int]] = {  # rows of whole blocks
    "gpt2": {"n_embd": 64, "n_inner": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
}


def quantile(p: float) -> float:
    return float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(p, dtype=torch.float64)))


def normal_float() -> Tensor:
    """NF4: quantiles of a normal distribution, zero among them, in [-1, 1] (section 3; the offset of the release)."""
    offset = 0.9677083
    above = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = torch.tensor(sorted([*above, 0.0, *below]))
    return values / values.max()


def rounded(weight: Tensor) -> Tensor:
    """A weight with each block of 64 scaled to [-1, 1] and rounded to the nearest of the sixteen values."""
    flat = weight.reshape(-1, BLOCK)
    scale = flat.abs().max(1, keepdim=True).values
    code = normal_float()
    return (code[(flat / scale).unsqueeze(-1).sub(code).abs().argmin(-1)] * scale).reshape(weight.shape)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_base_has_the_published_values(architecture: str) -> None:
    model = tiny_model(architecture, **WIDE[architecture])
    view = ModelView.of(model)
    before = Snapshot(model)
    with view.frozen(), torch.no_grad(), quantised(view, double=False):
        got = model(PROMPT).logits
    assert not before.differences()
    with torch.no_grad():
        plain = model(PROMPT).logits
        for part in linear_maps(view, range(4)).values():
            new = rounded(part.weight.contiguous())
            part.parameter.data = new.t().contiguous() if part.transposed else new
        expected = model(PROMPT).logits
    assert float((expected - plain).norm()) > 0.01 * float(plain.norm())
    assert float((got - expected).norm()) < 1e-4 * float(expected.norm())


def test_the_adapter_stands_on_the_base() -> None:
    """With the adapter on it, the base gives what it gives with the adapter's factors added to its weights."""
    model = tiny_model("llama", **WIDE["llama"])
    view = ModelView.of(model)
    maps = linear_maps(view, range(4))
    before = Snapshot(model)
    with view.frozen(), torch.no_grad(), quantised(view, double=False):
        base = model(PROMPT).logits
        with adapted(view, AdapterTraining(AdapterConfig(rank=3, alpha=5)).peft_config(peft, 10), maps) as adapter:
            assert {type(adapter.layer(path)).__name__ for path in maps} == {"Linear4bit"}
            torch.manual_seed(0)
            for parameter in adapter.parameters():
                parameter.data = torch.randn_like(parameter) / 4
            got = model(PROMPT).logits
            updates = adapter.updates()
    assert not before.differences()
    with torch.no_grad():
        for part in maps.values():
            part.parameter.data = rounded(part.weight.contiguous()) + updates[part.name].matrix()
        expected = model(PROMPT).logits
    assert float((got - expected).norm()) < 1e-4 * float((expected - base).norm())


def test_double_quantisation_rounds_the_scales() -> None:
    model = tiny_model("llama", **WIDE["llama"])
    view = ModelView.of(model)
    found: list[Tensor] = []
    for double in (False, True):
        with view.frozen(), torch.no_grad(), quantised(view, double=double):
            found.append(model(PROMPT).logits)
    assert 0 < float((found[0] - found[1]).norm()) < 0.1 * float(found[0].norm())


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama", **WIDE["llama"])
    view = ModelView.of(model)
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt), view.frozen(), quantised(view):
        raise KeyboardInterrupt
    assert not before.differences()


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kecore\[qlora\]'"):
        editor.edit(FACTS, "qlora")


def test_only_whole_blocks_are_quantised() -> None:
    view = ModelView.of(tiny_model("llama"))  # 32 wide, and 80 in the feed-forward block
    before = {path: type(part.module) for path, part in linear_maps(view, range(4)).items()}
    with view.frozen(), quantised(view):
        assert {path: type(view.model.get_submodule(path)) for path in before} == before
    with view.frozen(), quantised(view, block=32):
        kinds = {path.rpartition(".")[2]: type(view.model.get_submodule(path)).__name__ for path in before}
    assert kinds.pop("down_proj") == "Linear"
    assert set(kinds.values()) == {"Linear4bit"}


def test_needs_count_the_base() -> None:
    editor = Editor(tiny_model("llama", **WIDE["llama"]), tiny_tokenizer())
    given = (editor.view, RequestBatch.of(FACTS, editor.encoder))
    plain, ours = AdapterConfig().needs(*given)[0], QLoraConfig().needs(*given)[0]
    weights = sum(part.d_in * part.d_out for part in linear_maps(editor.view, range(4)).values())
    assert ours.fixed - plain.fixed == weights // 2 + weights // 64
