"""Tiny models with their tokenizers, as the package sees them, and facts to write into them."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from kecore.model_view import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder
from kecore.types import EditRequest


class World(NamedTuple):
    """A model and its tokenizer."""

    view: ModelView
    encoder: Encoder


def make_world(architecture: str) -> World:
    """A model with the kind of tokenizer that belongs to it."""
    kind = "byte-bpe" if architecture in {"gpt2", "bart"} else "llama-like"
    return World(ModelView.of(tiny_model(architecture)), Encoder(tiny_tokenizer(kind)))


@pytest.fixture(params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest) -> World:
    """A gated model with a metaspace tokenizer and BOS, and one with Conv1D and byte-level BPE."""
    return make_world(request.param)


@pytest.fixture(params=["llama", "gpt2", "granite", "gemma2", "bart"])
def any_world(request: pytest.FixtureRequest) -> World:
    """Also one with a scaled residual, one with a norm behind its blocks, and one without left padding."""
    return make_world(request.param)


@pytest.fixture
def facts() -> list[EditRequest]:
    """Two facts about one subject, and two about others."""
    return [
        EditRequest("The capital of {} is", "France", "Rome"),
        EditRequest("{} is located in the continent of", "Vinson Massif", "Europe"),
        EditRequest("In {} people speak", "France", "Greek and Italian"),
        EditRequest("{}的首都是", "日本", "巴黎"),
    ]
