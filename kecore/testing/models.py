"""Tiny random causal language models and tokenizers, made in code: nothing is downloaded.

Every architecture of transformers' causal-language-model mapping is shrunk by one rule: its default
configuration is read, and each size in it that has a small value in a table is replaced. Architectures
whose sizes hang together in a way of their own add a few fields in a second table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["VOCABULARY", "architectures", "tiny_model"]

VOCABULARY = 512
"""Token ids of every tiny model."""

_HEADS = 4
_SIZES: dict[str, Any] = {
    # residual width
    **dict.fromkeys(
        ["hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim", "embedding_dim", "lru_width",
         "word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "attention_hidden_size"], 32,
    ),
    # attention
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
         "index_n_heads", "linear_num_heads", "swa_num_attention_heads"], _HEADS,
    ),
    **dict.fromkeys(
        ["head_dim", "d_head", "dim_head", "kv_channels", "attention_head_size", "qk_nope_head_dim", "v_head_dim",
         "index_head_dim", "linear_head_dim", "swa_head_dim", "linear_key_head_dim", "linear_value_head_dim"], 8,
    ),
    **dict.fromkeys(["rotary_dim", "qk_rope_head_dim"], 4),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input", "laurel_rank"], 16),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "window_size", "attention_window_size"], 16),
    # feed-forward block: not a multiple of the residual width, so that no two widths are confused
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dim_ff", "dff",
         "d_inner", "n_inner", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size"], 48,
    ),
    # experts
    **dict.fromkeys(
        ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4
    ),
    **dict.fromkeys(
        ["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
         "shared_experts_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"], 16,
    ),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    # vocabulary and positions
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
         "model_max_length", "max_target_positions"], 256,
    ),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # weights large enough that every part of the model has a say in the logits
    **dict.fromkeys(["initializer_range", "init_std"], 0.2),
    "is_decoder": True,
}  # fmt: skip
_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_blocks",
)  # fmt: skip
_OPTIONAL = ("n_inner",)  # sizes that default to None and are given a value all the same
_OVERRIDES: dict[str, dict[str, Any]] = {}


def architectures() -> dict[str, str]:
    """Every causal language model that the installed transformers knows: model type to class name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(architecture: str, *, seed: int = 0, layers: int = 4, **fields: Any) -> nn.Module:
    """A random model of a given architecture with a few ten thousand parameters, in evaluation mode.

    Args:
        architecture: a transformers model type, such as ``"llama"``; see :func:`architectures`.
        seed: seeds the weights; the global random state is left alone.
        layers: decoder layers.
        **fields: further fields of the configuration.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[architecture]
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = kind(**{**_shrunk(kind(), layers), **_OVERRIDES.get(architecture, {}), **fields})
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases are born as ones and zeros, behind which mistakes would hide.
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model


def _shrunk(config: Any, layers: int) -> dict[str, Any]:
    """Small values for the fields of a default configuration."""
    default = config.to_dict()
    small: dict[str, Any] = {}
    for name, value in default.items():
        if name in config.sub_configs and value is not None:
            small[name] = _shrunk(getattr(config, name), layers)
        elif name in _DEPTHS:
            small[name] = layers
        elif name in _SIZES and isinstance(value, (int, float) if name not in _OPTIONAL else object):
            small[name] = _SIZES[name]
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(default.get(name), int):
            every = default.get("num_attention_heads")
            small[name] = {every: _HEADS, 1: 1}.get(default[name], 2)
    return small


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' remarks on unusual configurations off the terminal."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
