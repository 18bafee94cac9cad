"""Files of fine-tuning and adapters: FT, LoRA, QLoRA and DPO of EasyEdit, FT of ROME's release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kecore.api.hparams import HparamsRow
from kecore_methods.hparams.table import HparamsTable, Reader, differs, fits, same, takes

__all__ = ["ADALORA", "DPO", "FT_L", "FT_M", "LORA", "QLORA"]

_BY_STRUCTURE = same("found by the model's structure")
_STOP = 1e-2  # the released loops end below this loss


def _one_layer(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read the layer of fine-tuning."""
    if len(value) == 1:
        return HparamsRow(key, value, "taken", {"layer": value[0]})
    return HparamsRow(key, value, "differs", {"layer": value[-1]}, "one layer is tuned, the last of these")


def _bound(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read the largest change of a weight; false is no bound."""
    return HparamsRow(key, value, "taken", {"norm_constraint": value or None})


def _layers(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read the layers of an adapter; none means all of them."""
    if not value:
        return HparamsRow(key, value, "taken", {"depth_first": 0.0, "depth_last": 1.0}, "all layers")
    return HparamsRow(key, value, "taken", {"layers": value})


def _is_value_projection(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read which matrix is tuned."""
    last = str(value).removesuffix(".weight").rpartition(".")[2]
    if last in ("down_proj", "c_proj", "fc_out", "dense_4h_to_h") and "attn" not in str(value):
        return HparamsRow(key, value, "same", remark="found by the model's structure")
    return HparamsRow(key, value, "differs", remark="the feed-forward block's value projection is tuned")


_SHARED: dict[str, Reader] = {
    "num_steps": takes("steps"),
    "batch_size": takes("batch_size"),
    "lr": takes("learning_rate"),
    "weight_decay": fits(0, "no weight decay"),
    "kl_factor": fits(0, "prompts are preserved by 'preserve' and 'others'"),
}

_TUNED: dict[str, Reader] = {
    **_SHARED,
    "layers": _one_layer,
    "norm_constraint": _bound,
    "wd_power_law": differs("no weight decay"),
    "objective_optimization": same("the method"),
    "rewrite_module_tmp": _is_value_projection,
    "layer_module_tmp": _BY_STRUCTURE,
    "mlp_module_tmp": _BY_STRUCTURE,
    "attn_module_tmp": _BY_STRUCTURE,
    "ln_f_module": _BY_STRUCTURE,
    "lm_head_module": _BY_STRUCTURE,
}
FT_L = HparamsTable(
    algorithms=("FT", "FT-L"),
    keys=_TUNED,
    implied={"stop_loss": _STOP, "batch_size": 1},
    applies=lambda values: values.get("objective_optimization", "prompt_last") == "prompt_last",
)
FT_M = HparamsTable(
    algorithms=("FT", "FT-M"),
    keys=_TUNED,
    implied={"stop_loss": _STOP, "batch_size": 1},
    applies=lambda values: values.get("objective_optimization") == "target_new",
)

_ADAPTER: dict[str, Reader] = {
    **_SHARED,
    "lora_type": same("the method"),
    "layers": _layers,
    "rank": takes("rank"),
    "lora_r": takes("rank"),
    "lora_alpha": takes("alpha"),
    "lora_dropout": takes("dropout"),
    "norm_constraint": fits(False, "changes have no bound"),
    "target_modules": takes("targets"),
}
_ALL_LAYERS = {"depth_first": 0.0, "depth_last": 1.0, "contexts": 0, "stop_loss": _STOP}
LORA = HparamsTable(
    algorithms=("LoRA",),
    keys=_ADAPTER,
    implied=_ALL_LAYERS,
    applies=lambda values: values.get("lora_type", "lora") == "lora",
)
ADALORA = HparamsTable(
    algorithms=("LoRA", "AdaLoRA"),
    keys=_ADAPTER,
    implied={"depth_first": 0.0, "depth_last": 1.0, "contexts": 0},
    applies=lambda values: values.get("lora_type", "adalora") == "adalora",
)
QLORA = HparamsTable(
    algorithms=("QLoRA",),
    keys={
        **_ADAPTER,
        "quantization_bit": fits(4, "weights have 4 bits"),
        "double_quant": takes("double_quantisation"),
        "quant_type": takes("code"),
    },
    implied=_ALL_LAYERS,
)


def _likelihood(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read the share of the likelihood in the loss, ``alpha NLL + (1 - alpha) DPO``."""
    if value >= 1:
        return HparamsRow(key, value, "differs", remark="without a preference it is LoRA")
    weight = round(value / (1 - value), 6)
    return HparamsRow(key, value, "taken", {"likelihood": weight}, "beside a preference of weight 1")


DPO = HparamsTable(
    algorithms=("DPO",),
    keys={
        **_ADAPTER,
        "lora_type": fits("lora", "the adapter is LoRA's"),
        "alpha": _likelihood,
        "beta": takes("beta"),
    },
    implied=_ALL_LAYERS,
)
