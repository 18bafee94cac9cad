"""Files of memories, learned editors and demonstrations: GRACE, WISE, MELO, DEFER, SERAC, MEND, MALMEN, KE and IKE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kecore.api.hparams import HparamsRow
from kecore_methods.hparams.table import (
    HparamsTable,
    Reader,
    differs,
    elsewhere,
    fits,
    missing,
    modules,
    same,
    takes,
    unused,
)

__all__ = ["DEFER", "GRACE", "IKE", "KE", "MALMEN", "MELO", "MEND", "SERAC", "WISE"]

_ONE = "the value projection of one layer is edited"
_DOWN = "the layers' value projections are edited, no other matrix of theirs"
_TRAINING = "`kecore train` has schedules of its own"


def _replacement(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read which tokens' outputs a codebook's value replaces."""
    known = {"replace_last": "last", "replace_all": "all", "replace_prompt": "prompt"}
    if value in known:
        return HparamsRow(key, value, "taken", {"replace": known[value]})
    return HparamsRow(key, value, "differs", remark=f"one of {', '.join(known)}")


GRACE = HparamsTable(
    algorithms=("GRACE",),
    keys={
        "inner_params": modules("layer", remark=_ONE),
        "edit_lr": takes("learning_rate"),
        "n_iter": takes("steps"),
        "eps": takes("radius"),
        "dist_fn": fits("euc", "distances are Euclidean"),
        "val_init": takes("value_init"),
        "val_train": fits("sgd", "values are trained by gradients alone", "by Adam, as released"),
        "val_reg": fits(None, "values have no regulariser"),
        "reg": fits("early_stop", "training ends early", "at a loss of stop_loss"),
        "replacement": _replacement,
        "eps_expand": fits("coverage", "radii grow until they cover the key"),
        "num_pert": unused("only with val_train: pert"),
        "dropout": fits(0.0, "no dropout"),
    },
)


def _margins(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read WISE's alpha, beta and gamma, numbers beside activations that kecore measures in units of outputs."""
    remark = "margins are relative here; absolute_margins makes them numbers"
    alpha, beta, gamma = (float(margin) for margin in value)
    fields = {"alpha": alpha, "beta": beta, "gamma": gamma, "absolute_margins": True, "margin_weight": 1.0}
    return HparamsRow(key, value, "taken", fields, remark)


def _shards(key: str, value: Any, values: Mapping[str, Any]) -> HparamsRow:
    """Read after how many edits shards are merged."""
    per_shard = values.get("save_freq") or value
    return HparamsRow(key, value, "taken", {"shards": max(1, round(value / per_shard))}, "by save_freq")


WISE = HparamsTable(
    algorithms=("WISE",),
    keys={
        "inner_params": modules("layer", remark=_ONE),
        "mask_ratio": takes("mask_ratio"),
        "edit_lr": takes("learning_rate", remark="of SGD"),
        "n_iter": takes("steps"),
        "norm_constraint": takes("norm_constraint"),
        "act_margin": _margins,
        "act_ratio": takes("threshold_ratio"),
        "save_freq": takes("shard_edits"),
        "merge_freq": _shards,
        "merge_alg": fits("ties", "shards are merged by TIES"),
        "objective_optimization": fits("only_label", "the target's tokens alone count"),
        "densities": takes("density"),
        "weights": fits(1.0, "shards count alike"),
        "retrieve": takes("mode", lambda retrieve: "retrieve" if retrieve else "merge"),
        "replay": fits(False, "earlier edits are not trained again"),
    },
    implied={"optimizer": "sgd", "contexts": 10, "context_tokens": 10},
)
DEFER = HparamsTable(
    algorithms=("DEFER",),
    keys={
        "inner_params": modules("layer", remark=_ONE),
        "edit_lr": takes("learning_rate"),
        "n_iter": takes("steps"),
        "threshold": takes("threshold"),
    },
)
MELO = HparamsTable(
    algorithms=("MELO",),
    keys={
        "max_length": elsewhere("texts are not cut"),
        "task": unused(),
        "lora_task_type": unused(),
        "check_dir": unused(),
        "grace.name": same("the method"),
        "grace.num_iter": takes("steps"),
        "grace.init_radius": takes("radius"),
        "grace.dist_fn": fits("euc", "distances are Euclidean"),
        "grace.val_init": unused(),
        "grace.val_train": unused(),
        "grace.val_reg": unused(),
        "grace.reg": fits("early_stop", "training ends early", "at a loss of stop_loss"),
        "grace.replacement": differs("a block acts on all tokens of a text in its cluster"),
        "grace.expand_mode": differs("radii and centres do not move"),
        "grace.num_pert": unused(),
        "grace.key_id": takes("key", lambda token: "prompt" if token == -1 else "subject"),
        "grace.num_edit_per_block": takes("block_edits"),
        "grace.num_block": same("blocks are made as they are needed"),
        "grace.num_rank_per_block": takes("rank"),
        "grace.metric_period": unused(),
        "grace.edit_lr": takes("learning_rate"),
        "model.name": elsewhere("MODEL"),
        "model.class_name": elsewhere("found by structure"),
        "model.tokenizer_class": elsewhere("found by structure"),
        "model.tokenizer_name": elsewhere("comes with MODEL"),
        "model.fan_in_fan_out": elsewhere("found by structure"),
        "model.target_modules": modules("layers", many=True, remark=_DOWN),
        "model.pt": unused(),
        "model.grace_layer": modules("layer", value=("down_proj", "c_proj", "fc_out", "c_fc"), remark=_ONE),
        **{
            f"lora.{name}": unused()
            for name in (
                "cls_name", "cls_class", "supervised", "cos", "freeze", "square", "bound_embeds", "use_all_negatives",
                "freeze_lora", "dist_heads", "cross_attend", "soft_weighting", "checkpoint_grad",
            )
        },
        "lora.lora_r": same("rank a block times blocks"),
        "lora.lora_alpha": differs("blocks have no scale"),
        "lora.lora_dropout": fits(0.0, "no dropout"),
    },
)  # fmt: skip

_LEARNED: dict[str, Reader] = {
    "archive": elsewhere("--trained"),
    "inner_params": modules("layers", many=True, remark=_DOWN),
    "cedit": takes("edit_weight"),
    "cloc": fits(1.0, "locality counts 1"),
    "dropout": fits(0.0, "no dropout"),
    "grad_clip": takes("clip"),
    "edit_lr": differs("the first step is relative: edit_rate"),
    "no_grad_layers": fits(None, "none"),
    "train_base": fits(False, "the model itself is not trained"),
    **{
        name: unused(_TRAINING)
        for name in (
            "max_iters", "log_interval", "eval_log_interval", "final_eval", "val_interval", "early_stop_patience",
            "early_stop_key", "eval_only", "save", "val_batch_size", "accumulate_bs", "val_steps", "opt", "batch_size",
            "model_save_pt", "cbase", "lr_scale", "log_errors", "max_grad_norm", "n_edits", "n_toks", "counterfact",
            "zsre", "mini",
        )
    },
}  # fmt: skip
MEND = HparamsTable(
    algorithms=("MEND",),
    keys={
        **_LEARNED,
        "lr": takes("learning_rate"),
        "lr_lr": takes("rate_learning_rate"),
        "one_sided": fits(False, "both sides are changed"),
        "n_hidden": fits(1, "one hidden layer"),
        "hidden_dim": fits(None, "as wide as its input"),
        "init": fits("id", "it starts as the identity"),
        "norm": fits(True, "inputs are normalised"),
        "combine": fits(True, "both sides together"),
        "x_only": fits(False, "both sides together"),
        "delta_only": fits(False, "both sides together"),
        "act": fits("relu", "ReLU"),
        "rank": takes("rank"),
        "mlp_class": fits("IDMLP", "it starts as the identity"),
        "shared": fits(True, "matrices of one shape share a network"),
    },
)
MALMEN = HparamsTable(
    algorithms=("MALMEN",),
    keys={
        **_LEARNED,
        "rank": takes("rank"),
        "n_blocks": differs("MEND's network, of one block"),
        "lr": differs("the first step is relative: edit_rate"),
        "meta_lr": takes("learning_rate"),
        "loc_coef": fits(1, "locality counts 1; change edit_weight instead"),
        "token": fits("mask", "all tokens of a text count"),
        "editor_batch_size": elsewhere("--memory"),
    },
)
KE = HparamsTable(
    algorithms=("KE",),
    keys={**_LEARNED, "lr": takes("learning_rate"), "lr_lr": missing("no step of its own")},
)
SERAC = HparamsTable(
    algorithms=("SERAC",),
    keys={
        **_LEARNED,
        "lr": takes("learning_rate"),
        "lr_lr": unused(),
        "inner_params": unused(),
        "edit_lr": unused(),
        "cedit": missing("scope and answers are one loss"),
        "cloc": missing("scope and answers are one loss"),
        "cls_name": missing("the scope is told by a head on the model's own states"),
        "cls_class": missing("the scope is told by a head on the model's own states"),
        "small_name": missing("no counterfactual model: answers are pointed at"),
        **{
            name: unused("of the classifier that is not here")
            for name in (
                "supervised", "cos", "freeze", "square", "bound_embeds", "use_all_negatives", "freeze_cntr",
                "dist_heads", "lora", "soft_weighting", "checkpoint_grad", "cross_attend", "edit_bs", "unlikelihood",
            )
        },
    },
)  # fmt: skip
IKE = HparamsTable(
    algorithms=("IKE",),
    keys={"sentence_model_name": differs("encoder names a directory here"), "k": takes("demonstrations")},
    implied={},
)
