"""Files of the locate-then-edit methods: ROME's, MEMIT's, AlphaEdit's and their relatives', and EasyEdit's of them."""

from __future__ import annotations

import re
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
    same,
    takes,
    unused,
)

__all__ = [
    "ALPHAEDIT",
    "EAMET",
    "EMMET",
    "ENCORE",
    "KN",
    "MEMIT",
    "MEMIT_FE",
    "PMET",
    "ROME",
    "SIMIE",
    "SPHERE",
    "ULTRAEDIT",
]

_VALUES: dict[str, Any] = {
    "optimizer": "adam",
    "stop_loss": 0.05,
    "kl_position": "subject",
    "merge_subjects": False,
    "noise": 0,
    "length_penalty": 0,
    "gain": 1,
    "statistics_ridge": 0,
}
"""The value stage of the released ``compute_v`` and ``compute_z``, which no file names."""

_BATCH: dict[str, Any] = {
    **_VALUES,
    "each_context": False,
    "bare_weight": 0.5,
    "contexts": 5,
    "context_tokens": 10,
    "residual": "bare",
}
_ROME: dict[str, Any] = {
    **_VALUES,
    "relative_to": "projection",
    "contexts": 20,
    "context_tokens": 10,
    "bare_weight": None,
    "consistent_key": False,
}

_LIST_OF_LAYERS = re.compile(r"^.*?(\w+\.\d+\.)")

_BY_STRUCTURE = same("found by the model's structure")
_STATISTICS = elsewhere("--stats, or --text and --tokens")


def _number_of_contexts(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read ``[[5, 10], [10, 10]]``, lengths and how many contexts have each."""
    lengths = [int(length) for length, _ in value]
    counts = [int(count) for _, count in value]
    if len(set(counts)) == 1:
        tokens = lengths[0] if len(lengths) == 1 else lengths
        return HparamsRow(key, value, "taken", {"contexts": sum(counts), "context_tokens": tokens})
    fields = {"contexts": sum(counts), "context_tokens": max(lengths)}
    return HparamsRow(key, value, "differs", fields, "lengths that contexts share unequally; all have the longest")


def _consistent(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read the algorithm's name: R-ROME has the key averaged over contexts on both sides."""
    if value == "R-ROME":
        return HparamsRow(key, value, "taken", {"consistent_key": True})
    return HparamsRow(key, value, "same", remark="the method")


def _cutoff(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read ENCORE's ``prob_cutoff``: 0 is no early stop, -n stops at the nth hit."""
    if value == 0:
        return HparamsRow(key, value, "taken", {"stop_most_probable": False})
    if value < 0:
        fields = {"stop_most_probable": True, "stop_hits": int(-value), "stop_bare": False}
        return HparamsRow(key, value, "taken", fields)
    return HparamsRow(key, value, "differs", remark="a value stops at hits, or at a loss, and at no probability")


def _softening(key: str, value: Any, values: Mapping[str, Any]) -> HparamsRow:
    """Read EMMET's ``emmet_lambda``, which counts beside statistics that are weighted by mom2_update_weight."""
    weight = values.get("mom2_update_weight", 1)
    return HparamsRow(key, value, "taken", {"ridge_lambda": value * weight}, "times mom2_update_weight")


def _norm(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read ENCORE's ``update_norm_lambda``; 0 is no such term."""
    if value == 0:
        return HparamsRow(key, value, "taken", {"norm_weight": 0})
    return HparamsRow(key, value, "taken", {"norm_lambda": value})


def _weights(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read EAMET's ``mom2_update_weight``, a number a layer."""
    weights = value if isinstance(value, list) else [value]
    fields = {"preservation_lambda": weights[0]}
    if len(set(weights)) > 1:
        return HparamsRow(key, value, "differs", fields, "all layers have the first one's")
    return HparamsRow(key, value, "taken", fields)


_SHARED: dict[str, Reader] = {
    "layers": takes("layers"),
    "layer_selection": fits("all", "all layers that are named are edited"),
    "fact_token": fits("subject_last", "keys are read where the subject ends", "where the subject ends"),
    "v_num_grad_steps": takes("steps"),
    "v_lr": takes("learning_rate"),
    "v_loss_layer": same("the loss is read behind the last layer"),
    "v_weight_decay": takes("weight_decay"),
    "clamp_norm_factor": takes("clamp"),
    "kl_factor": takes("kl_weight"),
    "mom2_adjustment": fits(True, "keys are weighed against natural ones all the same"),
    "mom2_dataset": _STATISTICS,
    "mom2_n_samples": _STATISTICS,
    "mom2_dtype": elsewhere("statistics are float32"),
    "stats_dir": _STATISTICS,
    "P_loc": same("worked out from the statistics"),
    "rewrite_module_tmp": _BY_STRUCTURE,
    "rewrite_module_tmps": _BY_STRUCTURE,
    "layer_module_tmp": _BY_STRUCTURE,
    "mlp_module_tmp": _BY_STRUCTURE,
    "attn_module_tmp": _BY_STRUCTURE,
    "ln_f_module": _BY_STRUCTURE,
    "lm_head_module": _BY_STRUCTURE,
    "calculate_objective_value": unused("a diagnostic"),
    "norm_control": fits(0, "values are not scaled"),
    "dynamic_multiplier": differs("a hit is all tokens of the target, whatever its length"),
    "random_vector_preservation": fits(False, "preserved keys are natural ones"),
    "prob_cutoff": _cutoff,
}

_LEAST_SQUARES: dict[str, Reader] = {
    **_SHARED,
    "mom2_update_weight": takes("preservation_lambda"),
    "update_norm_lambda": _norm,
    "emmet_lambda": unused("EMMET's"),
    "add_prev_edits": takes("accumulate"),
}

ROME = HparamsTable(
    algorithms=("ROME", "R-ROME"),
    keys={
        **_SHARED,
        "alg_name": _consistent,
        "mom2_adjustment": takes("second_moment"),
        "context_template_length_params": _number_of_contexts,
        "bias_update": fits(False, "a bias is not edited"),
        "dynamic": fits(False, "the layer is the one that is named"),
        "dynamic_multiplier": unused("only with 'dynamic'"),
    },
    implied=_ROME,
)

MEMIT = HparamsTable(algorithms=("MEMIT",), keys=_LEAST_SQUARES, implied=_BATCH)
ENCORE = HparamsTable(algorithms=("ENCORE",), keys=_LEAST_SQUARES, implied=_BATCH)
PMET = HparamsTable(
    algorithms=("PMET",),
    keys={**_LEAST_SQUARES, "nll_loss_factor": fits(1, "the likelihood counts 1; change kl_weight instead")},
    implied=_BATCH,
)
MEMIT_FE = HparamsTable(
    algorithms=("MEMIT-FE",),
    keys=_LEAST_SQUARES,
    implied={key: value for key, value in _BATCH.items() if key != "residual"},
)
EMMET = HparamsTable(
    algorithms=("EMMET",),
    keys={
        **_SHARED,
        "mom2_update_weight": same("a factor of emmet_lambda"),
        "emmet_lambda": _softening,
        "update_norm_lambda": fits(0, "the update's norm has no weight of its own"),
        "add_prev_edits": fits(False, "keys of earlier edits are not kept"),
    },
    implied=_BATCH,
)
_NULL_SPACE: dict[str, Reader] = {
    **_SHARED,
    "mom2_update_weight": unused("the released code projects instead"),
    "nullspace_threshold": takes("eigenvalue_threshold"),
    "L2": takes("l2_lambda"),
}
ALPHAEDIT = HparamsTable(algorithms=("AlphaEdit",), keys=_NULL_SPACE, implied=_BATCH)
SPHERE = HparamsTable(
    algorithms=("SPHERE",),
    keys={
        **_NULL_SPACE,
        "cumulative_ratio": takes("sphere_ratio"),
        "suppression_strength": takes("sphere_suppression"),
    },
    implied=_BATCH,
)
EAMET = HparamsTable(
    algorithms=("EAMET",),
    keys={
        **_LEAST_SQUARES,
        "mom2_update_weight": _weights,
        "cs_factor": takes("align_divergence"),
        "mse_factor": takes("align_squares"),
        "tau": takes("align_temperature"),
        "ks_bs": differs("all keys are compared at once"),
        "clamp_ks_factor": missing("keys are not optimised"),
        "norm_factor": differs("the decay is v_weight_decay's alone"),
        "delta_init": differs("values start at zero"),
        "weight_decay_method": fits("norm", "the decay is of the norm"),
    },
    implied={**_BATCH, "align_form": "released"},
)
SIMIE = HparamsTable(
    algorithms=("SimIE",),
    keys={
        "base_method": fits("ROME", "the base is ROME"),
        "lamHyper": missing("lambda is relative to the first keys: simie_ridge"),
        "init_model": same("the unedited model is at hand"),
        "solver": same("solved in float64"),
        "fast": fits(False, "no shortcut"),
    },
    implied=_ROME,
)
KN = HparamsTable(
    algorithms=("KN",),
    keys={
        "lr_scale": unused(),
        "n_toks": differs("contexts and their length are contexts and context_tokens"),
        "refine": fits(False, "neurons are refined by 'share' alone"),
        "batch_size": elsewhere("--memory"),
        "steps": takes("steps"),
        "adaptive_threshold": takes("threshold"),
        "p": takes("share"),
    },
)


def _matrices(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
    """Read the names of UltraEdit's matrices, from the list that holds the layers on."""
    names = [_LIST_OF_LAYERS.sub(r"\1", path.removesuffix(".weight")) for path in value]
    return HparamsRow(key, value, "taken", {"matrices": names}, "by the ends of their names")


ULTRAEDIT = HparamsTable(
    algorithms=("ULTRAEDIT", "UltraEdit"),
    keys={
        "inner_params": _matrices,
        "edit_modules": _matrices,
        "lr": takes("learning_rate"),
        "token": fits("ans", "the target's tokens alone count"),
        "dropout": fits(0.0, "no dropout"),
        "no_grad_layers": fits(None, "none"),
        "batch_size": elsewhere("the number of facts of an edit"),
        "batch_size_once": elsewhere("--memory"),
        "editor_batch_size": elsewhere("--memory"),
    },
    implied={"ridge_lambda": 1, "start": "empty", "share_statistics": True},
)
