"""Hyper-parameter files of EasyEdit and of the MEMIT family: their keys and values, written out, and what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kecore import read_hparams
from kecore.api import registry
from kecore.api.errors import ConfigError, DataFormatError

MODULES = {
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp", "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm", "lm_head_module": "lm_head",
}  # fmt: skip
MOMENT = {"mom2_dataset": "wikipedia", "mom2_n_samples": 100000, "mom2_dtype": "float32"}
LOCATE = {**MODULES, **MOMENT, "fact_token": "subject_last", "kl_factor": 0.0625, "mom2_adjustment": True}
SPREAD = {**LOCATE, "layer_selection": "all", "mom2_update_weight": 15000}
FIVE = [4, 5, 6, 7, 8]
CONTEXTS = {"context_template_length_params": [[5, 10], [10, 10]]}
MACHINE = {"device": 0, "model_name": "./hugging_cache/a-model", "model_parallel": False}


def values(**numbers: Any) -> dict[str, Any]:
    """Return the keys of the value stage that all files have."""
    names = {"layers": "layers", "steps": "v_num_grad_steps", "rate": "v_lr", "decay": "v_weight_decay"}
    named = {key: numbers[name] for name, key in names.items() if name in numbers}
    return {**named, "clamp_norm_factor": numbers["clamp"], "v_loss_layer": 31}


TWENTY = {"steps": 20, "rate": 0.5, "decay": 0.5}
EASY = {"steps": 25, "rate": 0.5, "decay": 1e-3, "clamp": 4}

FILES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("rome", "gpt2-xl", "ROME", {**LOCATE, **CONTEXTS, **values(layers=[17], clamp=4, **TWENTY)}),
    ("rome", "gpt-j", "ROME", {**LOCATE, **CONTEXTS, **values(layers=[5], clamp=4, **TWENTY)}),
    ("rome", "llama-2-7b", "ROME", {
        **LOCATE, **CONTEXTS, **MACHINE, "alg_name": "ROME", "mom2_adjustment": False, "fp16": True,
        "stats_dir": "./data/stats", **values(layers=[5], **EASY),
    }),
    ("memit", "gpt2-xl", "MEMIT", {
        **SPREAD, "mom2_update_weight": 20000, **values(layers=[13, 14, 15, 16, 17], clamp=0.75, **TWENTY)
    }),
    ("memit", "gpt-j", "MEMIT", {
        **SPREAD, **values(layers=[3, 4, 5, 6, 7, 8], steps=25, rate=0.5, decay=0.5, clamp=0.75)
    }),
    ("memit", "llama-2-7b", "MEMIT", {**SPREAD, **MACHINE, "alg_name": "MEMIT", **values(layers=FIVE, **EASY)}),
    ("memit", "llama-3-8b", "MEMIT", {**SPREAD, **values(layers=FIVE, steps=25, rate=0.1, decay=0.5, clamp=0.75)}),
    ("alphaedit", "llama-3-8b", "AlphaEdit", {
        **SPREAD, **values(layers=FIVE, steps=25, rate=0.1, decay=0.5, clamp=0.75),
        "model_name": "Llama3-8B", "nullspace_threshold": 2e-2, "L2": 10,
    }),
    ("alphaedit", "qwen2.5-7b", "AlphaEdit", {
        **SPREAD, **MACHINE, "alg_name": "AlphaEdit", "P_loc": "./null_space_project.pt", **values(layers=FIVE, **EASY),
        "nullspace_threshold": 2e-2, "L2": 1,
    }),
    ("emmet", "llama-2-7b-easyedit", "EMMET", {
        **SPREAD, **MACHINE, "alg_name": "EMMET", **values(layers=[5], **EASY), "mom2_update_weight": 100000,
        "update_norm_lambda": 0, "emmet_lambda": 0.1,
    }),
    ("encore", "llama-3-8b", "ENCORE", {
        **SPREAD, **values(layers=FIVE, steps=25, rate=0.5, decay=0.5, clamp=0.75), "calculate_objective_value": False,
        "add_prev_edits": True, "update_norm_lambda": 20, "emmet_lambda": 0.1, "prob_cutoff": -2, "norm_control": 0,
        "dynamic_multiplier": 5, "random_vector_preservation": False,
    }),
    ("pmet", "llama-2-7b", "PMET", {
        **SPREAD, **MACHINE, "alg_name": "PMET", **values(layers=FIVE, clamp=1, **TWENTY), "nll_loss_factor": 1,
        "rewrite_module_tmps": ["model.layers.{}.mlp.down_proj"],
    }),
    ("ft-l", "llama-2-7b", "FT", {
        **MODULES, **MACHINE, "alg_name": "FT", "layers": [21], "num_steps": 25, "batch_size": 1, "max_length": 40,
        "lr": 5e-4, "weight_decay": 0, "kl_factor": 0, "norm_constraint": False,
        "objective_optimization": "prompt_last",
    }),
    ("ft-m", "llama-2-7b", "FT", {
        **MODULES, **MACHINE, "alg_name": "FT", "layers": [21], "num_steps": 25, "batch_size": 1, "max_length": 40,
        "lr": 5e-4, "weight_decay": 0, "kl_factor": 0, "norm_constraint": False,
        "objective_optimization": "target_new",
    }),
    ("adalora", "llama-2-7b", "LoRA", {
        **MACHINE, "alg_name": "LoRA", "lora_type": "adalora", "layers": [], "num_steps": 70, "batch_size": 1,
        "max_length": 30, "lr": 5e-3, "weight_decay": 0, "kl_factor": 0, "rank": 8, "lora_alpha": 32,
        "lora_dropout": 0.1, "norm_constraint": False, "target_modules": ["q_proj", "v_proj"],
    }),
    ("dpo", "llama-3-8b", "DPO", {
        **MACHINE, "alg_name": "DPO", "lora_type": "adalora", "layers": [], "num_steps": 7, "batch_size": 1,
        "max_length": 30, "lr": 5e-5, "weight_decay": 0, "kl_factor": 0, "rank": 8, "lora_alpha": 32,
        "lora_dropout": 0.1, "norm_constraint": False, "target_modules": ["q_proj", "v_proj"], "alpha": 0.99,
        "beta": 0.1,
    }),
    ("grace", "llama-2-7b", "GRACE", {
        **MACHINE, "alg_name": "GRACE", "inner_params": ["model.layers[27].mlp.down_proj.weight"], "edit_lr": 1.0,
        "n_iter": 50, "eps": 1.0, "dist_fn": "euc", "val_init": "cold", "val_train": "sgd", "val_reg": "None",
        "reg": "early_stop", "replacement": "replace_last", "eps_expand": "coverage", "num_pert": 8, "dropout": 0.0,
    }),
    ("wise", "llama-2-7b", "WISE", {
        **MACHINE, "alg_name": "WISE", "mask_ratio": 0.2, "edit_lr": 1.0, "n_iter": 70, "norm_constraint": 1.0,
        "act_margin": [5.0, 20.0, 10.0], "act_ratio": 0.88, "save_freq": 500, "merge_freq": 1000, "merge_alg": "ties",
        "objective_optimization": "only_label", "inner_params": ["model.layers[27].mlp.down_proj.weight"],
        "densities": 0.53, "weights": 1.0, "retrieve": True, "replay": False,
    }),
    ("ultraedit", "llama-3-8b", "ULTRAEDIT", {
        **MACHINE, "alg_name": "ULTRAEDIT", "dropout": 0.0, "no_grad_layers": None, "lr": 1e-6, "token": "mask",
        "batch_size": 100, "batch_size_once": 10, "editor_batch_size": 1024, "half": True,
        "inner_params": [f"model.layers.{i}.mlp.gate_proj" for i in range(11, 16)]
        + [f"model.layers.{i}.mlp.up_proj" for i in range(18, 25)],
    }),
    ("qlora", "llama-3-8b", "QLoRA", {
        **MACHINE, "alg_name": "QLoRA", "quantization_bit": 4, "double_quant": True, "quant_type": "nf4",
        "lora_type": "lora", "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"], "num_steps": 1, "batch_size": 1, "max_length": 30, "lr": 5e-3,
        "weight_decay": 0.0,
    }),
]  # fmt: skip
IDS = [f"{method}-{preset}" for method, preset, _, _ in FILES]


def written(folder: Path, algorithm: str, content: dict[str, Any], *, as_yaml: bool) -> Path:
    """Write a file as its tool has it: numbers such as ``5e-4`` are texts for YAML 1.1."""
    home = folder / "hparams" / algorithm
    home.mkdir(parents=True)
    if not as_yaml:
        path = home / "a-model.json"
        path.write_text(json.dumps(content))
        return path
    lines: list[str] = []
    for key, value in content.items():
        text = f"{value:.0e}" if isinstance(value, float) and value < 0.01 else json.dumps(value)
        lines.append(f"{key}: {text}  # a remark")
    path = home / "a-model.yaml"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(("method", "preset", "algorithm", "content"), FILES, ids=IDS)
def test_a_published_file_gives_the_preset(
    tmp_path: Path, method: str, preset: str, algorithm: str, content: dict[str, Any]
) -> None:
    """A preset was written by hand from the same file: both have to configure the same method alike."""
    path = written(tmp_path, algorithm, content, as_yaml="alg_name" in content)
    hparams = read_hparams(path)
    assert (hparams.method, hparams.algorithm) == (method, algorithm)
    config = registry.default_registry().get(method).Config
    assert config.make(hparams.fields).to_json() == config.make(config.preset(preset)).to_json()
    assert not hparams.with_outcome("unknown")
    assert [row.key for row in hparams.rows] == list(content)
    assert {"device": "elsewhere", "model_name": "elsewhere"}.items() <= {
        "device": "elsewhere", "model_name": "elsewhere", **{row.key: row.outcome for row in hparams.rows}
    }.items()  # fmt: skip


def test_what_differs_is_said(tmp_path: Path) -> None:
    content = {**SPREAD, **values(layers=FIVE, **EASY), "fact_token": "last", "layer_selection": "random", "my_own": 3}
    hparams = read_hparams(written(tmp_path, "MEMIT", content, as_yaml=False))
    outcomes = {row.key: row.outcome for row in hparams.rows}
    assert [row.key for row in hparams.with_outcome("differs")] == ["fact_token", "layer_selection"]
    assert outcomes["my_own"] == "unknown"
    assert outcomes["mom2_dataset"] == "elsewhere"
    assert outcomes["rewrite_module_tmp"] == "same"
    assert "my_own: 3  unknown" in repr(hparams)
    assert hparams.to_json()["fields"]["preservation_lambda"] == 15000


def test_two_algorithms_of_one_method_and_contexts_of_one_length(tmp_path: Path) -> None:
    content = {**LOCATE, **values(layers=[5], **EASY), "alg_name": "R-ROME", "context_template_length_params": [[7, 3]]}
    fields = read_hparams(written(tmp_path, "x", content, as_yaml=True)).fields
    assert (fields["consistent_key"], fields["contexts"], fields["context_tokens"]) == (True, 3, 7)


def test_a_method_can_be_named(tmp_path: Path) -> None:
    content = {**SPREAD, **values(layers=FIVE, **EASY)}
    path = written(tmp_path, "x", content, as_yaml=False)
    with pytest.raises(DataFormatError, match=r"does not say for which algorithm it is .*name the method"):
        read_hparams(path)
    assert read_hparams(path, "memit + blue").method == "memit + blue"
    other = written(tmp_path, "y", {**content, "alg_name": "MEMIT"}, as_yaml=True)
    with pytest.raises(ConfigError, match="is for 'MEMIT', which is memit, not for 'alphaedit'"):
        read_hparams(other, "alphaedit")
    with pytest.raises(DataFormatError, match="'mello' reads no files of other tools"):
        read_hparams(path, "mello")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"- 1\n- 2\n", "holds no names with values"),
        ("a.json", b"{", "is not a hyper-parameter file"),
        ("a.yaml", b"a: [", "is not a hyper-parameter file"),
        ("a.yaml", b"\xff\xfe\x00", "is not a hyper-parameter file"),
        ("a.yaml", b"", "holds no names with values"),
        ("a.yaml", b"alg_name: InstructEdit\n", "is for 'InstructEdit', whose files no method here reads"),
        ("a.yaml", b"alg_name: ROME\nlayers: [5]\ncontext_template_length_params: 7\n", "which no such file has"),
        ("a.yaml", b"alg_name: GRACE\ninner_params: [lm_head.weight]\n", "has to name weights of layers"),
        ("a.yaml", b"alg_name: MEMIT\nlayers: all\n", "read are layers as layers"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((DataFormatError, ConfigError), match=message):
        read_hparams(path)
    with pytest.raises(DataFormatError, match="there is no file"):
        read_hparams(tmp_path / "nothing.yaml")
