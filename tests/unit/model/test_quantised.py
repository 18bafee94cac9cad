"""Models whose matrices are packed in fewer bits: read by their own code, edited beside their matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from kecore.api.errors import UnsupportedModelError
from kecore.api.types import EditRequest
from kecore.edit import WeightEdit
from kecore.editor import Editor
from kecore.inference.scoring import score_continuations
from kecore.model import ModelView
from kecore.testing import Snapshot, tiny_model, tiny_tokenizer

FACT = EditRequest("The company of {}", "Tim Cook", "French")
SHORT = {"steps": 8, "contexts": 2, "context_tokens": 3}
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of 64


class Integers(nn.Module):
    """A layout without a parameter, as GPTQ and AWQ have it: whole numbers and scales in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scale).round().to(torch.int8).t().contiguous())
        self.register_buffer("scales", scale.t().contiguous())
        self.qweight: Tensor
        self.scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales)


def four_bits(linear: nn.Linear) -> nn.Module:
    packed = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.float32,
        quant_type="nf4",
    )
    packed.load_state_dict(linear.state_dict())
    return packed.to("cpu")


def eight_bits(linear: nn.Linear) -> nn.Module:
    packed = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    packed.load_state_dict(linear.state_dict())
    return packed.to("cpu")


def quantised(pack: Any) -> nn.Module:
    model: Any = tiny_model("llama", **SIZES)
    for layer in model.model.layers:
        for path, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, name = path.rpartition(".")
                setattr(layer.get_submodule(parent), name, pack(module))
    return model.eval()


def plain(view: ModelView) -> nn.Module:
    """The same model with each matrix unpacked."""
    model: Any = tiny_model("llama", **SIZES)
    packed: Any = view.model
    with torch.no_grad():
        for layer, from_layer in zip(model.model.layers, packed.model.layers, strict=True):
            for path, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    units = torch.eye(module.in_features)
                    module.weight.copy_(from_layer.get_submodule(path).forward(units).t())
    return model


@pytest.fixture(params=[four_bits, eight_bits, Integers], ids=["nf4", "int8", "buffers"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return quantised(request.param)


def likelihood(editor: Editor) -> float:
    return score_continuations(editor.view, editor.encoder, [(FACT.text, FACT.target)])[0].mean


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[30, 210, 77, 401, 5]])).logits


def test_packed_matrices_are_read(model: nn.Module) -> None:
    view = ModelView.of(model)
    for layer in view.layers:
        linear = layer.site.linear
        assert linear.packed is not None
        assert (linear.d_out, linear.d_in, linear.dtype) == (64, 128, torch.float32)
        original = tiny_model("llama", **SIZES).get_submodule(linear.name.removesuffix(".weight")).weight.detach()
        assert float((linear.weight - original).norm() / original.norm()) < 0.15
        with pytest.raises(UnsupportedModelError, match=r"mlp\.down_proj\.weight is quantised"):
            _ = linear.parameter


def test_update_acts_beside_its_packed_matrix(model: nn.Module, tmp_path: Path) -> None:
    before, unedited = Snapshot(model), logits(model)
    editor = Editor(model, tiny_tokenizer("llama-like"), statistics=None)
    first = likelihood(editor)
    edit = editor.edit(FACT, "rome", second_moment=False, **SHORT)
    assert isinstance(edit, WeightEdit)
    assert likelihood(editor) > first + 1
    for name, update in edit.updates.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(module(x) - module.forward(x), x @ update.matrix().t(), rtol=1e-3, atol=1e-4)
    edited = logits(model)
    if not any(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules()):  # which rounds its input too
        # The oracle: the same update added to the same matrix, unpacked.
        dense = plain(editor.view)
        for name, update in edit.updates.items():
            dense.get_parameter(name).data += update.matrix()
        torch.testing.assert_close(edited, logits(dense), rtol=1e-3, atol=1e-3)
    saved = WeightEdit.load(edit.save(tmp_path / "edit"))
    editor.revert()
    assert torch.equal(logits(model), unedited)
    saved.attach(model)
    assert torch.equal(logits(model), edited)
    saved.revert(model)
    assert torch.equal(logits(model), unedited)
    assert [name for name in before.differences() if "random state" not in name] == []


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
@pytest.mark.parametrize(("method", "config"), [("grace", {"steps": 25}), ("ft-m", {"steps": 12})])
def test_other_methods_edit_a_packed_model(method: str, config: dict[str, Any]) -> None:
    model = quantised(four_bits)
    unedited = logits(model)
    editor = Editor(model, tiny_tokenizer("llama-like"), statistics=None)
    first = likelihood(editor)
    editor.edit(FACT, method, **config)
    assert likelihood(editor) > first + 0.5
    editor.revert()
    assert torch.equal(logits(model), unedited)


def test_a_side_update_stays_below_a_side_module_and_goes_with_the_weights() -> None:
    model = quantised(four_bits)
    unedited = logits(model)
    editor = Editor(model, tiny_tokenizer("llama-like"), statistics=None)
    editor.edit(FACT, "rome", second_moment=False, **SHORT)
    with_update = logits(model)
    editor.edit(EditRequest("A river in {}:", "France", "Paris"), "grace", steps=10)
    from kecore.edit import suspended
    from kecore.edit.effect import without_edits

    with suspended(model):
        assert torch.equal(logits(model), with_update)
    with without_edits(model):
        assert torch.equal(logits(model), unedited)
    editor.revert(2)
    assert torch.equal(logits(model), unedited)
