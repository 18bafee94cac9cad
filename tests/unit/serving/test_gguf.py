"""GGUF exports: only edited matrices change, adapters name llama.cpp's tensors, what cannot be written is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kecore import WeightEdit, save_model
from kecore.api.errors import (
    ArtifactError,
    ArtifactMismatchError,
    ConfigError,
    KecoreError,
    MissingDependencyError,
    StorageError,
    UnsupportedCapabilityError,
)
from kecore.api.identity import Fingerprint
from kecore.edit import LowRank
from kecore.model import ModelView
from kecore.serving import export_edits
from kecore.serving.gguf_names import TensorNames, architecture_of, interleave
from kecore.serving.verify import need_program
from kecore.testing import tiny_model, tiny_tokenizer

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS = 4, 2
DOWN, QUERY, KEY = (
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.2.self_attn.k_proj.weight",
)


def a_model() -> nn.Module:
    return tiny_model("llama", intermediate_size=96, num_key_value_heads=KV_HEADS)


def an_edit(model: nn.Module, *names: str, rank: int = 2) -> WeightEdit:
    """Random updates of parameters."""
    draw = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name in names}
    updates = {
        name: LowRank(*(torch.randn(width, rank, generator=draw) / 8 for width in shape))
        for name, shape in shapes.items()
    }
    view = ModelView.of(model)
    return WeightEdit(updates=updates, base=Fingerprint.of(view.identity(), view.dtype), method="random")


def write_base(model: nn.Module, path: Path, *, architecture: str = "llama", down: str = "Q8_0") -> Path:
    """Write a model as llama.cpp's converter would, with metadata of several kinds and an alignment of its own."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_custom_alignment(64)
    writer.add_string("general.name", "tiny — été")
    writer.add_block_count(4)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_float32("llama.rope.freq_base", 1234.5)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "été", "日本", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0, 3.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for name, parameter in model.named_parameters():
        data: Tensor = parameter.data
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
        kind = gguf.GGMLQuantizationType[down if "down_proj" in name else "F32"]
        packed = gguf.quantize(interleave(data, heads).contiguous().numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Path]:
    """A model, its checkpoint and its GGUF file."""
    folder = tmp_path_factory.mktemp("base")
    model = a_model()
    tokenizer: Any = tiny_tokenizer("llama-like")
    return model, save_model(model, tokenizer, folder / "model"), write_base(model, folder / "base.gguf")  # type: ignore[arg-type]


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    values = {field.name: field.contents() for field in reader.fields.values()}
    return values, {tensor.name: tensor for tensor in reader.tensors}


def test_only_edited_matrices_are_rewritten(base: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    model, checkpoint, file = base
    edit = an_edit(model, DOWN, QUERY, KEY)
    exported = export_edits([edit], tmp_path / "out", "gguf", model=str(checkpoint), base_gguf=file)
    assert exported.files == ("model.gguf",)
    assert exported.types == {
        "blk.1.ffn_down.weight": "f16", "blk.2.attn_q.weight": "f32", "blk.2.attn_k.weight": "f32",
    }  # fmt: skip
    values, tensors = contents(tmp_path / "out" / "model.gguf")
    base_values, base_tensors = contents(file)
    assert values == base_values
    assert list(tensors) == list(base_tensors)
    for name, tensor in tensors.items():
        if name not in exported.types:
            assert tensor.tensor_type == base_tensors[name].tensor_type
            assert np.array_equal(tensor.data, base_tensors[name].data)
    parameters = dict(model.named_parameters())
    heads = {DOWN: 0, QUERY: HEADS, KEY: KV_HEADS}
    names = TensorNames("llama", edit.updates)
    for name, update in edit.updates.items():
        tensor = tensors[names.of(name)]
        stored = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        expected = interleave(parameters[name].data + update.matrix(), heads[name])
        torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-4)
    assert 0 < exported.rounding < 0.01
    assert exported.commands == (f"llama-server -m {tmp_path / 'out' / 'model.gguf'}",)


def test_a_type_of_few_bits_is_written_and_warned_of(base: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    model, checkpoint, file = base
    edit = an_edit(model, DOWN, rank=1)
    faint = replace(edit, updates={DOWN: LowRank(edit.updates[DOWN].U / 20, edit.updates[DOWN].V)})  # type: ignore[union-attr]
    options: dict[str, Any] = {"model": str(checkpoint), "base_gguf": file, "tensor_type": "q4_0"}
    exported = export_edits([faint], tmp_path / "out", "gguf", **options)
    assert exported.types == {"blk.1.ffn_down.weight": "q4_0"}
    assert "q4_0 rounds the edited matrices" in exported.warnings[0]


def test_an_adapter_names_the_tensors_of_llama_cpp(base: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    model, checkpoint, file = base
    edit = an_edit(model, DOWN, QUERY)
    exported = export_edits([edit], tmp_path / "out", "gguf-lora", model=str(checkpoint), base_gguf=file)
    assert exported.commands == (f"llama-server -m {file} --lora {tmp_path / 'out' / 'adapter.gguf'}",)
    values, tensors = contents(tmp_path / "out" / "adapter.gguf")
    assert values["general.type"] == "adapter"
    assert values["general.architecture"] == "llama"
    assert (values["adapter.type"], values["adapter.lora.alpha"]) == ("lora", 2.0)
    for name, tensor, heads in ((DOWN, "blk.1.ffn_down.weight", 0), (QUERY, "blk.2.attn_q.weight", HEADS)):
        a, b = tensors[f"{tensor}.lora_a"].data, tensors[f"{tensor}.lora_b"].data
        assert (a.shape[0], b.shape[1]) == (2, 2)
        expected = interleave(edit.updates[name].matrix(), heads)
        torch.testing.assert_close(torch.from_numpy(b @ a), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_needs_no_gguf_file_where_rows_stand_as_they_are(
    base: tuple[nn.Module, Path, Path], tmp_path: Path
) -> None:
    model, checkpoint, _ = base
    exported = export_edits([an_edit(model, DOWN)], tmp_path / "out", "gguf-lora", model=str(checkpoint))
    assert "llama-server -m BASE.gguf --lora" in exported.commands[0]
    with pytest.raises(ArtifactError, match=r"rows llama.cpp orders in its own way.*--base-gguf FILE"):
        export_edits([an_edit(model, QUERY)], tmp_path / "queries", "gguf-lora", model=str(checkpoint))


def test_ollama_gets_a_modelfile(base: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    model, checkpoint, file = base
    options: dict[str, Any] = {"model": str(checkpoint), "base_gguf": file}
    whole = export_edits([an_edit(model, DOWN)], tmp_path / "My Facts", "ollama", **options)
    assert whole.files == ("Modelfile", "model.gguf")
    assert (tmp_path / "My Facts" / "Modelfile").read_text() == "FROM ./model.gguf\n"
    assert whole.commands[0] == f"ollama create my-facts -f '{tmp_path / 'My Facts' / 'Modelfile'}'"
    adapter = export_edits([an_edit(model, DOWN)], tmp_path / "small", "ollama", rank=4, **options)
    assert (adapter.files, adapter.rank) == (("Modelfile", "adapter.gguf"), 2)
    assert (tmp_path / "small" / "Modelfile").read_text() == f"FROM {file}\nADAPTER ./adapter.gguf\n"


def other_weights(model: nn.Module, folder: Path) -> dict[str, Any]:
    return {"base_gguf": write_base(tiny_model("llama", seed=1, intermediate_size=96), folder / "other.gguf")}


def truncated(model: nn.Module, folder: Path) -> dict[str, Any]:
    (folder / "cut.gguf").write_bytes(write_base(model, folder / "whole.gguf").read_bytes()[:3000])
    return {"base_gguf": folder / "cut.gguf"}


def of_unknown_architecture(model: nn.Module, folder: Path) -> dict[str, Any]:
    return {"base_gguf": write_base(model, folder / "odd.gguf", architecture="neverheard")}


Options = dict[str, Any] | Callable[[nn.Module, Path], dict[str, Any]]


@pytest.mark.parametrize(
    ("to", "options", "error", "message"),
    [
        ("onnx", {}, ConfigError, "unknown target 'onnx'; expected one of peft, merged, gguf-lora, gguf, ollama"),
        ("gguf-lora", {"rank": 0}, ConfigError, "at least 1, got 0"),
        ("gguf", {"rank": 3}, ConfigError, "whole matrices, which have no rank"),
        ("merged", {"rank": 3}, ConfigError, "whole matrices, which have no rank"),
        ("peft", {"tensor_type": "f16"}, ConfigError, "--type is the type of rewritten matrices"),
        ("gguf", {"tensor_type": "q3_k"}, ConfigError, r"unknown GGUF type 'q3_k'; expected one of f32, f16"),
        ("gguf", {"base_gguf": None}, ArtifactError, r"convert_hf_to_gguf.py .*--base-gguf base.gguf"),
        ("gguf", {"model": ""}, ArtifactError, "name it by --model MODEL"),
        ("gguf", {"base_gguf": "/nowhere.gguf"}, ArtifactError, "/nowhere.gguf: no such file"),
        ("gguf", other_weights, ArtifactMismatchError, "holds other weights"),
        ("gguf", truncated, ArtifactError, "truncated or no GGUF file"),
        ("gguf", of_unknown_architecture, UnsupportedCapabilityError, "does not know the architecture 'neverheard'"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(
    base: tuple[nn.Module, Path, Path],
    tmp_path: Path,
    to: str,
    options: Options,
    error: type[KecoreError],
    message: str,
) -> None:
    model, checkpoint, file = base
    chosen = options if isinstance(options, dict) else options(model, tmp_path)
    arguments: dict[str, Any] = {"model": str(checkpoint), "base_gguf": file, **chosen}
    (tmp_path / "place").mkdir()
    with pytest.raises(error, match=message):
        export_edits([an_edit(model, DOWN)], tmp_path / "place" / "out", to, **arguments)
    assert not list((tmp_path / "place").iterdir())


def test_rows_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", num_key_value_heads=KV_HEADS)  # keys are 80 wide
    tokenizer: Any = tiny_tokenizer("llama-like")
    checkpoint = save_model(model, tokenizer, tmp_path / "model")  # type: ignore[arg-type]
    file = write_base(model, tmp_path / "base.gguf", down="F32")
    options: dict[str, Any] = {"model": str(checkpoint), "base_gguf": file, "tensor_type": "q8_0"}
    with pytest.raises(ConfigError, match="q8_0 packs 32 numbers together, which does not divide rows of 80"):
        export_edits([an_edit(model, DOWN)], tmp_path / "out", "gguf", **options)


def test_unknown_model_types_and_tensors_are_refused() -> None:
    assert architecture_of("gpt_neox") == "gptneox"
    with pytest.raises(UnsupportedCapabilityError, match=r"no architecture called 'neverheard'.*--base-gguf"):
        architecture_of("neverheard")
    names = TensorNames("llama", [DOWN])
    with pytest.raises(UnsupportedCapabilityError, match="has no tensor of its own for model"):
        names.of("model.layers.1.adapter.weight")


def test_a_full_disk_leaves_nothing(
    base: tuple[nn.Module, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, checkpoint, file = base

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", refuse)
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        export_edits([an_edit(model, DOWN)], tmp_path / "out", "gguf", model=str(checkpoint), base_gguf=file)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_left_alone_unless_forced(base: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    model, checkpoint, _ = base
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "adapter.gguf").write_text("old")
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        export_edits([an_edit(model, DOWN)], tmp_path, "gguf-lora", model=str(checkpoint))
    assert (tmp_path / "adapter.gguf").read_text() == "old"
    export_edits([an_edit(model, DOWN)], tmp_path, "gguf-lora", model=str(checkpoint), force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "adapter.gguf"}


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kecore.serving.verify.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"xllamacpp, which is missing: pip install 'kecore\[llama\]'"):
        need_program("llama.cpp")
