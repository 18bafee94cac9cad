"""Finding and proving: known families by an independent table, and toy models that break one rule each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kecore.api.errors import NonFiniteError, UnsupportedModelError
from kecore.model import ModelView
from kecore.testing import tiny_model

WIDTH, INNER, VOCABULARY = 16, 40, 64

# Written by hand from the papers' code: layer path, value projection, whether [d_in, d_out], residual scale.
FAMILIES: dict[str, tuple[str, str, bool, float | None]] = {
    "gpt2": ("transformer.h", "mlp.c_proj", True, 1.0),
    "gptj": ("transformer.h", "mlp.fc_out", False, 1.0),
    "gpt_neo": ("transformer.h", "mlp.c_proj", False, 1.0),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h", False, 1.0),
    "opt": ("model.decoder.layers", "fc2", False, 1.0),
    "bloom": ("transformer.h", "mlp.dense_4h_to_h", False, 1.0),
    "falcon": ("transformer.h", "mlp.dense_4h_to_h", False, 1.0),
    "mpt": ("transformer.blocks", "ffn.down_proj", False, 1.0),
    "llama": ("model.layers", "mlp.down_proj", False, 1.0),
    "mistral": ("model.layers", "mlp.down_proj", False, 1.0),
    "qwen2": ("model.layers", "mlp.down_proj", False, 1.0),
    "qwen3": ("model.layers", "mlp.down_proj", False, 1.0),
    "phi": ("model.layers", "mlp.fc2", False, 1.0),
    "gemma": ("model.layers", "mlp.down_proj", False, 1.0),
    "gemma2": ("model.layers", "mlp.down_proj", False, None),
    "gemma3_text": ("model.layers", "mlp.down_proj", False, None),
    "olmo2": ("model.layers", "mlp.down_proj", False, None),
    "granite": ("model.layers", "mlp.down_proj", False, 0.5),
}


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_known_families(architecture: str, dtype: torch.dtype) -> None:
    stack, path, transposed, scale = FAMILIES[architecture]
    model = tiny_model(architecture).to(dtype)
    view = ModelView.of(model)
    assert [part.name for part in view.layers] == [f"{stack}.{i}" for i in range(4)]
    assert [part.index for part in view.layers] == list(range(4))
    for part in view.layers:
        projection = part.site.linear
        assert part.module is model.get_submodule(part.name)
        assert projection.module is model.get_submodule(f"{part.name}.{path}")
        assert projection.name == f"{part.name}.{path}.weight"
        assert projection.parameter is model.get_parameter(projection.name)
        assert projection.transposed is transposed
        assert projection.d_out == 32 < projection.d_in
        assert part.residual_scale == (None if scale is None else pytest.approx(scale, rel=1e-2))
    assert (view.width, view.dtype) == (32, dtype)
    assert view.unembedding is model.get_output_embeddings()


@pytest.mark.parametrize(
    ("architecture", "fields", "path", "transposed", "scale"),
    [
        ("llama", {"intermediate_size": 32}, "mlp.down_proj", False, 1.0),  # gate, up and down all [32, 32]
        ("llama", {"tie_word_embeddings": True}, "mlp.down_proj", False, 1.0),
        ("gpt2", {"n_inner": 32}, "mlp.c_proj", True, 1.0),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, "fc2", False, None),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "mlp.dense_4h_to_h", False, 1.0),
        ("falcon", {"alibi": True, "multi_query": False}, "mlp.dense_4h_to_h", False, 1.0),
        ("gpt_neox", {"use_parallel_residual": False}, "mlp.dense_4h_to_h", False, 1.0),
        ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}, "mlp.down_proj", False, 1.0),
        ("gemma4_text", {"hidden_size_per_layer_input": 0}, "mlp.down_proj", False, None),
    ],
)
def test_variants(architecture: str, fields: dict[str, Any], path: str, transposed: bool, scale: float | None) -> None:
    model = tiny_model(architecture, **fields)
    for part in ModelView.of(model).layers:
        assert part.site.linear.module is model.get_submodule(f"{part.name}.{path}")
        assert (part.site.linear.transposed, part.residual_scale) == (transposed, scale)


def test_a_norm_is_told_from_a_scale_even_where_the_projection_says_next_to_nothing() -> None:
    """Behind a norm, a vector of any length arrives with the same one."""
    model = tiny_model("olmo2", initializer_range=1e-3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
    view = ModelView.of(model)
    assert [part.residual_scale for part in view.layers] == [None] * 4


def test_layers_that_read_more_than_the_stream_below_are_not_skipped() -> None:
    fields = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    assert not ModelView.of(tiny_model("gemma4_text", **fields)).skips
    assert ModelView.of(tiny_model("gemma4_text")).skips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "left"), [("llama", True), ("bart", False), ("recurrent_gemma", False)])
def test_left_padding_is_told(architecture: str, left: bool, dtype: torch.dtype) -> None:
    assert ModelView.of(tiny_model(architecture).to(dtype)).left_padding is left


def test_positions_of_another_kind_are_left_to_the_model() -> None:
    assert not ModelView.of(tiny_model("roberta")).positions  # counts from the padding id on
    assert not ModelView.of(tiny_model("bloom")).positions  # takes none
    assert ModelView.of(tiny_model("gpt2")).positions


@pytest.mark.parametrize("fields", [{"is_decoder": False}, {"is_decoder": True}])
def test_only_causal_models_pass(fields: dict[str, bool]) -> None:
    if fields["is_decoder"]:
        assert len(ModelView.of(tiny_model("bert", **fields)).layers) == 4
    else:
        with pytest.raises(UnsupportedModelError, match="not causal: a later token changes an earlier one"):
            ModelView.of(tiny_model("bert", **fields))


class ToyLayer(nn.Module):
    """Mixes tokens causally, then ``x + down(relu(up(x)))``."""

    def __init__(self, inner: int = INNER) -> None:
        super().__init__()
        self.self_attn = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def mixed(self, x: Tensor) -> Tensor:
        return x + self.self_attn(x.cumsum(1)) / 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(x)
        return x + self.down(self.up(x).relu())


class Toy(nn.Module):
    """A causal language model with nothing in it that a test does not need."""

    def __init__(self, layer: type[nn.Module] = ToyLayer, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def stream(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.stream(input_ids)))


def test_toy_is_sound() -> None:
    """What the models below break is the only thing wrong with them."""
    view = ModelView.of(Toy())
    assert [p.site.linear.name for p in view.layers] == [f"layers.{i}.down.weight" for i in range(3)]
    assert all(part.residual_scale == 1.0 for part in view.layers)
    assert not view.left_padding  # the running sum does not ask the mask


class WritesInPlace(ToyLayer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(x)
        out = self.down(self.up(x).relu())
        out += x
        return out


def test_a_projection_whose_output_is_written_over_is_still_read_right() -> None:
    view = ModelView.of(Toy(WritesInPlace))
    assert [part.residual_scale for part in view.layers] == [1.0] * 3


class Leaks(ToyLayer):
    """The next token sees this one's value within the layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(x)
        values = self.down(self.up(x).relu())
        return x + values + 0.1 * torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], 1)


class Unused(ToyLayer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(x)
        self.down(self.up(x).relu())
        return x


class Stretched(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * super().forward(input)


class Unplain(ToyLayer):
    def __init__(self) -> None:
        super().__init__()
        self.down = Stretched(INNER, WIDTH)


class OnlyAttention(ToyLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


class RawWeights(ToyLayer):
    """Its feed-forward block is no module; the one map back to the stream is a small gate."""

    def __init__(self) -> None:
        super().__init__(inner=4)
        self.wide = nn.Parameter(torch.randn(WIDTH, 20 * WIDTH) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ self.wide).relu() @ self.wide.t()


class Experts(ToyLayer):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (Leaks, r"layers\.0\.down: .* at that token alone; it changed .* elsewhere"),
        (Unused, r"layers\.0\.down: .* must change the layer's output"),
        (Unplain, r"down \(Stretched\) is no linear map of its weight, plain or quantised"),
        (OnlyAttention, r"ran the linear maps self_attn \[16, 16\], and outside attention none leads back"),
        (RawWeights, r"down leads back .* but holds only \d% of the weights outside attention"),
        (Experts, r"mixture of experts does \(experts\)"),
    ],
)
def test_layers_that_cannot_be_edited_are_refused(layer: type[nn.Module], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        ModelView.of(Toy(layer))


class RunsTwice(Toy):
    def stream(self, input_ids: Tensor) -> Tensor:
        x = super().stream(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Jumps(Toy):
    """Each layer reads the embedding, not the layer before it."""

    def stream(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return sum((layer(x) for layer in self.layers), start=torch.zeros(()))


class Aside(Toy):
    """The largest stack serves something else than the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList(ToyLayer(inner=8) for _ in range(3))

    def stream(self, input_ids: Tensor) -> Tensor:
        super().stream(input_ids)
        x = self.embed(input_ids)
        for layer in self.small:
            x = layer(x)
        return x


class MixingHead(Toy):
    def stream(self, input_ids: Tensor) -> Tensor:
        return super().stream(input_ids).cumsum(1)


class HeadAsMatrix(Toy):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.stream(input_ids) @ self.head.weight.t())


class Shared(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].down = self.layers[0].down


class Headless(Toy):
    def get_output_embeddings(self) -> nn.Module | None:
        return None


class NoStack(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*self.layers)


class Noisy(Toy):
    def stream(self, input_ids: Tensor) -> Tensor:
        x = super().stream(input_ids)
        return x + torch.rand_like(x)


class NeedsImages(Toy):
    def stream(self, input_ids: Tensor) -> Tensor:
        raise ValueError("where is the image?")


class OnlyAlone(Toy):
    def stream(self, input_ids: Tensor) -> Tensor:
        if len(input_ids) > 1:
            raise NotImplementedError("one row at a time")
        return super().stream(input_ids)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (RunsTwice, r"each run once, found: layers \(3 modules, 6 calls\)"),
        (Jumps, r"layers is not the stack that the logits come from"),
        (Aside, r"layers is not the stack that the logits come from"),
        (MixingHead, r"layers is not the stack that the logits come from"),
        (HeadAsMatrix, r"Linear as output embedding does not give"),
        (Noisy, r"equal rows give other logits together"),
        (Shared, r"layers\.2\.down\.weight and layers\.0\.down\.weight are one parameter"),
        (Headless, r"has no output embedding"),
        (NoStack, r"found: none"),
        (NeedsImages, r"does not run on token ids alone \(ValueError: where is the image\?\)"),
        (OnlyAlone, r"cannot be run in pieces \(NotImplementedError: one row at a time\)"),
    ],
)
def test_models_that_cannot_be_read_are_refused(model: type[Toy], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        ModelView.of(model())


def test_compiled_models_are_refused() -> None:
    inside, in_place = Toy(), Toy()
    inside.layers[1].compile()
    in_place.compile()
    for model in (inside, in_place, torch.compile(Toy())):
        with pytest.raises(UnsupportedModelError, match=r"is compiled, .* compile it after the edit"):
            ModelView.of(model)  # type: ignore[arg-type]


def test_an_offloaded_model_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    parts = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(4)),
    )
    where = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=where, offload_folder=tmp_path / "disk")
    with pytest.raises(UnsupportedModelError, match=r"9 parameters that are not in memory, as model\.layers\.1\."):
        ModelView.of(model)


def test_nan_weights_are_told_from_an_unknown_structure() -> None:
    model = Toy()
    model.layers[1].up.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the unedited model returns NaN"):
        ModelView.of(model)


def test_a_named_projection_overrules_the_search_and_is_proved_all_the_same() -> None:
    view = ModelView.of(tiny_model("mixtral"), value_projection="self_attn.o_proj")
    assert {part.site.linear.module.__class__ for part in view.layers} == {nn.Linear}
    assert view.layers[2].site.linear.name == "model.layers.2.self_attn.o_proj.weight"
    with pytest.raises(UnsupportedModelError, match=r"'mlp\.nothing' is not among them"):
        ModelView.of(Toy(), value_projection="mlp.nothing")
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.v_proj: .* at that token alone"):
        ModelView.of(tiny_model("llama", num_key_value_heads=4), value_projection="self_attn.v_proj")


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_real_model_in_half_precision(smollm2: tuple[Any, Any], dtype: torch.dtype) -> None:
    """Its first token's activations are thousands of times larger than the others'."""
    from copy import deepcopy

    view = ModelView.of(deepcopy(smollm2[0]).to(dtype))
    assert [part.residual_scale for part in view.layers] == [1.0] * 30
    assert (view.skips, view.left_padding, view.positions) == (True, True, True)
