"""Two tiny models, and facts to write into them."""

from __future__ import annotations

import pytest
from engine_worlds import World, make_world

from kecore.api.types import EditRequest


@pytest.fixture(params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest) -> World:
    """A gated model with a metaspace tokenizer and BOS, and one with Conv1D and byte-level BPE."""
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
