"""Tiny random causal language models and tokenizers, made in code: nothing is downloaded.

Every architecture of transformers' causal-language-model mapping is shrunk by one rule: its default
configuration is read, and each size in it that has a small value in a table is replaced. Architectures
whose sizes hang together in a way of their own add a few fields in a second table.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from kecore.api.progress import quiet_logger

__all__ = ["VOCABULARY", "Family", "architectures", "tiny_model", "tiny_tokenizer"]

VOCABULARY = 512
"""Token ids of every tiny model."""

_HEADS = 4
_GROUPS: tuple[tuple[float, str], ...] = (
    # residual width
    (
        32,
        "hidden_size n_embd d_model dim embedding_size emb_dim embedding_dim lru_width word_embed_proj_dim "
        "input_embedding_size output_embedding_size attention_hidden_size ple_embed_dim d_rel "
        "hidden_size_global",
    ),
    # attention
    (
        _HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads index_n_heads "
        "linear_num_heads swa_num_attention_heads indexer_n_heads mamba_n_heads mamba_num_heads n_mamba_heads "
        # experts
        "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num",
    ),
    (
        8,
        "head_dim d_head dim_head kv_channels attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "index_head_dim linear_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim indexer_head_dim "
        # windows, shorter than the tests' prompts
        "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size local_attention "
        # state-space mixers
        "ssm_state_size state_size mamba_chunk_size chunk_size rel_extent",
    ),
    (4, "rotary_dim mamba_d_state"),
    (
        2,
        "linear_num_key_heads linear_num_value_heads swa_num_key_value_heads indexer_kv_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k index_topk index_block_size index_topk_blocks",
    ),
    (1, "n_group topk_group num_expert_group mamba_n_groups n_groups o_groups"),
    (
        16,
        "q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank mamba_d_head "
        "mamba_head_dim moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size time_step_rank mamba_dt_rank "
        "adapter_rank hc_lowrank router_hidden_size",
    ),
    (64, "mamba_d_ssm shape_vocab_size pronunciation_vocab_size shape_embed_dim pronunciation_embed_dim"),
    # feed-forward block: wider than anything else and no multiple of the residual width
    (
        80,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner n_inner "
        "feed_forward_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size",
    ),
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base encoder_hash_byte_group_vocab",
    ),
    (256, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length max_target_positions"),
    # weights large enough that every part of the model has a say in the logits
    (0.2, "initializer_range init_std"),
)
_SIZES: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
for _size, _names in _GROUPS:
    _SIZES.update(dict.fromkeys(_names.split(), _size))
_DEPTHS = {
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_blocks",
}  # fmt: skip
# Fields that default to None and are given a value all the same.
_OPTIONAL = {
    "n_inner", "head_dim", "num_experts_per_tok", "n_routed_experts", "bos_token_id", "eos_token_id",
    "pad_token_id", "indexer_n_heads", "indexer_kv_heads", "indexer_head_dim",
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"layer_types": ["indexed_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {"residual_multiplier": 0.5},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"indexer_budget": 4, "indexer_compress_ratio": 2, "indexer_kv_heads": 1, "split_ngram_parts": 1},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * 4, "local_attn_chunk_length": 4},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}
# Their rotary embeddings have sections that no field of the configuration names.
_SECTIONED = {
    "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl",
}  # fmt: skip
_PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types")  # a pattern here is repeated to the depth


Family = Literal["causal", "encoder-decoder", "image-text"]
"""Kinds of language models: those that continue a text, translate one, or read images with it."""

_MAPPINGS: dict[Family, tuple[str, str]] = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "encoder-decoder": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "image-text": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
}


def architectures(family: Family = "causal") -> dict[str, str]:
    """Return every language model of a family that the installed transformers knows: model type to class name."""
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, _MAPPINGS[family][0]))


def tiny_model(
    architecture: str, *, family: Family = "causal", seed: int = 0, layers: int = 4, **fields: Any
) -> nn.Module:
    """Make a random model of a given architecture with a few ten thousand parameters, in evaluation mode.

    Args:
        architecture: a transformers model type, such as ``"llama"``; see :func:`architectures`.
        family: which of its models: a type may be one of several families.
        seed: seeds the weights; the global random state is left alone.
        layers: decoder layers.
        **fields: further fields of the configuration.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    auto_class: Any = getattr(transformers, _MAPPINGS[family][1])
    kind = CONFIG_MAPPING[architecture]
    with quiet_logger("transformers"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = {**_shrink(kind(), layers), **_OVERRIDES.get(architecture, {}), **fields}
        if family != "causal":
            values.pop("is_decoder", None)
        if architecture in _SECTIONED:
            values["text_config"]["rope_parameters"] = _shrink_sections(kind().text_config.rope_parameters)
        if family == "encoder-decoder":
            values.setdefault("decoder_start_token_id", 0)
        for name in values.keys() & _PER_LAYER:
            pattern = values[name]
            values[name] = [pattern[i % len(pattern)] for i in range(layers)]
        config = kind(**values)
        model = auto_class.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms, biases and gates are born as ones and zeros, behind which mistakes would hide.
                if parameter.ndim == 1 or not bool(parameter.any()):
                    parameter += 0.1 * torch.randn_like(parameter)
    return model


def _shrink(config: Any, layers: int) -> dict[str, Any]:
    """Return small values for the fields of a default configuration."""
    default = config.to_dict()
    small: dict[str, Any] = {}
    for name, value in default.items():
        if name in config.sub_configs and value is not None:
            small[name] = _shrink(getattr(config, name), layers)
        elif name in _DEPTHS:
            small[name] = layers
        elif name in _SIZES and isinstance(value, (int, float) if name not in _OPTIONAL else object):
            small[name] = _SIZES[name]
    rope = default.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        small["rope_parameters"] = _shrink_sections(rope)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(default.get(name), int):
            heads = default.get("num_attention_heads")
            # As many as heads, or one for all, stays so; groups of heads become two.
            small[name] = {heads: _HEADS, 1: 1}.get(default[name], 2)
    return small


def _shrink_sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary embeddings with sections that fit the small heads.

    The sections are rotated pairs for time, height and width: together half of what is rotated of a head.
    """
    pairs = int(_SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
    return {**rope, "mrope_section": [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]}


_TEXT = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "The Eiffel Tower is located in Paris. Vinson Massif is located in the continent of Antarctica.",
    "The mother tongue of Danielle Darrieux is French; that of Léon Blum is French as well.",
    "Tim Cook is the chief executive of Apple, a company that makes the iPhone.",
    "Where does the Danube flow? It flows to the Black Sea, not to Berlin or Vienna!",
    "艾菲尔铁塔位于巴黎。法国的首都是巴黎,日本的首都是东京。",
)
_CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"


def tiny_tokenizer(kind: str = "byte-bpe") -> Any:
    """Make a fast tokenizer with fewer than :data:`VOCABULARY` tokens and a chat template, trained on a few sentences.

    Args:
        kind: ``"byte-bpe"``, GPT-2's kind: byte-level BPE, no token before a text. ``"llama-like"``: spaces become
            a mark, one of which opens every text, bytes stand in for unknown characters, and a BOS token comes
            first.
    """
    from transformers import PreTrainedTokenizerFast

    core, special = Tokenizer.from_str(_train(kind)), {"eos_token": "</s>"}
    if kind == "llama-like":
        special |= {"bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = _CHAT
    return tokenizer


@cache
def _train(kind: str) -> str:
    """Train a tokenizer and return it as JSON."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte-bpe":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "llama-like":
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    else:
        raise ValueError(f"unknown kind {kind!r}; expected byte-bpe or llama-like")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(_TEXT * 4, trainer)
    if kind == "llama-like":
        bos = ("<s>", core.token_to_id("<s>"))
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    data = json.loads(core.to_str())
    # The trainer takes bytes in as special tokens, which decoding would drop.
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(data)
