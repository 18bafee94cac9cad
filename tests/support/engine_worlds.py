"""Tiny models with their tokenizers, as the package sees them."""

from __future__ import annotations

from typing import NamedTuple

from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder


class World(NamedTuple):
    """A model and its tokenizer."""

    view: ModelView
    encoder: Encoder


def make_world(architecture: str) -> World:
    """A model with the kind of tokenizer that belongs to it."""
    kind = "byte-bpe" if architecture in {"gpt2", "bart"} else "llama-like"
    return World(ModelView.of(tiny_model(architecture)), Encoder(tiny_tokenizer(kind)))
