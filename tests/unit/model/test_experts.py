"""What is read of a mixture of experts, against a rewrite as loops over ordinary matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore import Editor, EditRequest
from kecore.api.errors import LayerError, UnsupportedModelError
from kecore.model import Key, MatrixName, ModelView, Output, Routed, Routing, SiteId, Value
from kecore.testing import Snapshot, tiny_model, tiny_tokenizer
from kecore.text import Rows
from tests.support.dense_rewrite import rewritten

IDS = torch.tensor([[30, 210, 77, 401, 5, 99], [8, 450, 63, 17, 280, 300]])
ROWS = Rows(IDS, torch.ones_like(IDS), torch.zeros(2, dtype=torch.long))
LAYER = 2


@pytest.fixture(params=["mixtral", "olmoe", "gpt_oss"])
def view(request: pytest.FixtureRequest) -> ModelView:
    return ModelView.of(tiny_model(request.param))


def run(view: ModelView, layer: int = LAYER) -> tuple[Routing, Tensor]:
    """Return the routing of all tokens at a layer, and the output of its block ``[tokens, d_model]``."""
    taps = [Routed(layer, "states"), Routed(layer, "experts"), Routed(layer, "weights")]
    with view.frozen(), torch.no_grad():
        out = view.run(ROWS, taps=[*taps, Value(layer)])
    return Routing(*(out[tap].flatten(0, 1) for tap in taps)), out[Value(layer)].flatten(0, 1)


def test_keys_and_outputs_equal_the_rewrite(view: ModelView) -> None:
    routing, output = run(view)
    keys = view.experts(LAYER).keys(routing)
    tokens = rewritten(view.layers[LAYER].module, routing.states)
    assert len(tokens) == IDS.numel()
    for token, expected in enumerate(tokens):
        torch.testing.assert_close(output[token], expected.output, rtol=1e-4, atol=1e-5)
        assert routing.experts[token].sort().values.tolist() == sorted(expected.keys)
        for slot, expert in enumerate(routing.experts[token].tolist()):
            torch.testing.assert_close(keys[token, slot], expected.keys[expert], rtol=1e-4, atol=1e-6)


def test_each_expert_is_a_site_whose_matrix_is_a_slice(view: ModelView) -> None:
    layer = view.layers[LAYER]
    assert [site.id for site in layer.sites] == [SiteId(LAYER, expert) for expert in range(4)]
    site = view.site(SiteId(LAYER, 3))
    assert site.linear.name == f"model.layers.{LAYER}.mlp.experts.down_proj[3]"
    assert site.linear.weight.shape == (view.width, site.linear.d_in)
    with torch.no_grad():
        site.linear.weight[0, 1] = 7.0
    stored = dict(view.model.named_parameters())[f"model.layers.{LAYER}.mlp.experts.down_proj"][3]
    assert float((stored[1, 0] if site.linear.transposed else stored[0, 1]).detach()) == 7.0
    with pytest.raises(UnsupportedModelError, match=r"layers\.2 maps keys to values in 4 places.* such as memit"):
        _ = layer.site


def test_a_change_of_an_expert_changes_the_block_by_its_weighted_key(view: ModelView) -> None:
    routing, before = run(view)
    keys, site = view.experts(LAYER).keys(routing), view.site(SiteId(LAYER, 1))
    delta = torch.randn(view.width, site.linear.d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        site.linear.weight.add_(delta)
    _, after = run(view)
    expected = torch.zeros_like(before)
    token, slot = (routing.experts == 1).nonzero(as_tuple=True)
    expected[token] = keys[token, slot] @ delta.t()
    assert 0 < len(token) < len(before)
    torch.testing.assert_close(after - before, expected, rtol=1e-3, atol=1e-4)


def test_reading_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt_oss")
    before = Snapshot(model)
    view = ModelView.of(model)
    routing, _ = run(view)
    view.experts(LAYER).keys(routing)
    assert before.differences() == []


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_run_experts_gives_the_same_keys(implementation: str) -> None:
    model: Any = tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    view = ModelView.of(model)
    routing, _ = run(view)
    tokens = rewritten(view.layers[LAYER].module, routing.states)
    for token, keys in enumerate(view.experts(LAYER).keys(routing)):
        for slot, expert in enumerate(routing.experts[token].tolist()):
            torch.testing.assert_close(keys[slot], tokens[token].keys[expert], rtol=1e-4, atol=1e-6)
    assert model.config._experts_implementation == implementation


def test_keys_wider_than_the_stream_are_read_in_several_parts() -> None:
    view = ModelView.of(tiny_model("mixtral", intermediate_size=76))  # 32 wide
    routing, _ = run(view)
    keys = view.experts(LAYER).keys(routing)
    assert keys.shape[-1] == 76
    expected = rewritten(view.layers[LAYER].module, routing.states)[4]
    for slot, expert in enumerate(routing.experts[4].tolist()):
        torch.testing.assert_close(keys[4, slot], expected.keys[expert], rtol=1e-4, atol=1e-6)


def test_dense_layers_stay_dense_beside_layers_with_experts() -> None:
    view = ModelView.of(tiny_model("deepseek_v3"))
    assert [len(layer.sites) for layer in view.layers] == [1, 1, 1, 4]
    assert view.layers[0].site.linear.name == "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(LayerError, match="layer 0 of DeepseekV3ForCausalLM has no experts"):
        view.experts(0)


def test_a_named_part_is_read_as_a_dense_layer() -> None:
    view = ModelView.of(tiny_model("qwen2_moe"), value_projection="mlp.shared_expert.down_proj")
    assert [len(layer.sites) for layer in view.layers] == [1, 1, 1, 1]
    assert view.layers[0].experts is None


def test_experts_behind_a_norm_are_no_sites_but_the_block_can_be_changed() -> None:
    """AXK1 has a norm between the experts and the block's output."""
    view = ModelView.of(tiny_model("axk1"))
    layer = view.layers[1]
    assert (layer.sites, layer.experts, layer.block.name) == ((), None, "model.layers.1.mlp")
    with pytest.raises(UnsupportedModelError, match=r"norm stands between.*changes no weights"):
        layer.check_sites()
    with view.frozen(), torch.no_grad():
        out = view.run(ROWS, taps=[Key(1), Value(1), Output(1)])
    assert out[Value(1)].shape == out[Key(1)].shape == (2, 6, view.width)


def test_names_of_matrices_are_read_as_they_are_written() -> None:
    for name in (MatrixName("a.b.weight"), MatrixName("a.experts.down_proj", 12)):
        assert MatrixName.parse(str(name)) == name
    assert str(MatrixName("a", 3)) == "a[3]"
    stacked = nn.Parameter(torch.arange(12.0).reshape(3, 2, 2))
    assert MatrixName("a", 2).of(stacked).tolist() == [[8.0, 9.0], [10.0, 11.0]]


def test_a_model_whose_layers_cannot_be_read_can_be_asked() -> None:
    """DBRX keeps all experts in one flat matrix. What the model reads can be changed; its layers are refused."""
    model = tiny_model("dbrx")
    with pytest.raises(UnsupportedModelError, match="found no value projection"):
        ModelView.of(model)
    editor = Editor(model, tiny_tokenizer("llama-like"))
    assert editor.view.layers == ()
    request = EditRequest("The capital of {} is", subject="France", target="Rome")
    before = Snapshot(model)
    plain = editor.ask(request.text, max_new_tokens=3)
    editor.edit([request], "ice")
    assert editor.ask(request.text, max_new_tokens=3) != plain
    for method in ("memit", "grace"):
        with pytest.raises(UnsupportedModelError, match=r"found no value projection.* such as ice"):
            editor.edit([request], method)
    editor.revert()
    assert before.differences() == []


def test_methods_that_change_weights_are_refused_early_where_none_can_be() -> None:
    editor = Editor(tiny_model("llama4"), tiny_tokenizer("llama-like"))
    with pytest.raises(UnsupportedModelError, match=r"keeps its values in several matrices .* changes no weights"):
        editor.edit([EditRequest("The capital of {} is", subject="France", target="Rome")], "memit")
