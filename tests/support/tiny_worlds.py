"""Tiny models with five kinds of tokenizer, made in code: nothing is downloaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kecore.model import ModelView
from kecore.testing.models import tiny_model, tiny_tokenizer
from kecore.text import Encoder

TEXT = [
    "The capital of France is Paris and the capital of Italy is Rome.",
    "The mother tongue of Danielle Darrieux is French, that of Apollo is Greek.",
    "Vinson Massif is located in the continent of Antarctica, the Danube in Europe.",
    "Where does the Danube flow? It flows to the Black Sea, not to Berlin or Vienna!",
] * 4
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@dataclass(frozen=True)
class World:
    """A model in the two ways the package sees it."""

    view: ModelView
    encoder: Encoder


def _byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, no BOS, no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _sentence_piece(kind: str) -> PreTrainedTokenizerFast:
    """Llama's kind: spaces become a mark, a BOS opens every text; BPE or unigram."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def make_world(kind: str, dtype: torch.dtype = torch.float64) -> World:
    """A tiny random model; float64, so that equality with a slow reference can be asked to 1e-9."""
    torch.manual_seed(7)
    if kind in ("byte-bpe", "llama-like"):  # these two know Chinese
        model, tokenizer = tiny_model("llama", layers=2, seed=7), tiny_tokenizer(kind)
        return World(ModelView.of(model.to(dtype).eval()), Encoder(tokenizer))
    if kind == "byte-level":
        tokenizer = _byte_level()
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=4,
            initializer_range=0.4, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        tokenizer = _sentence_piece("bpe" if kind == "llama" else "unigram")
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            initializer_range=0.4, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    tokenizer.chat_template = CHAT
    model = model.to(dtype).eval()
    return World(ModelView.of(model), Encoder(tokenizer))


def edited(world: World) -> World:
    """The same world after something has happened to its weights."""
    model = copy.deepcopy(world.view.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.15 * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return World(ModelView.of(model), world.encoder)
