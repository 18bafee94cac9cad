"""A key-value cache goes into a pass and comes out of it by whichever name transformers has for it."""

from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kecore.model import ModelView
from kecore.model.caches import cache_keyword, given_cache, kept_cache
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder


class Old(nn.Module):
    """As models were before transformers 5.24, and others still are."""

    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any:
        return input_ids, past_key_values


class New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> Any:
        return input_ids, cache, kwargs


def test_either_name() -> None:
    assert (cache_keyword(Old()), cache_keyword(New())) == ("past_key_values", "cache")
    assert given_cache({"past_key_values": 1}) == given_cache({"cache": 1, "past_key_values": None}) == 1
    assert given_cache({}) is None
    assert kept_cache(SimpleNamespace(past_key_values=1)) == kept_cache(SimpleNamespace(cache=1)) == 1
    assert kept_cache(SimpleNamespace(logits=1)) is None


def test_a_pass_with_a_cache_uses_no_name_that_is_going_away(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, encoder = ModelView.of(tiny_model("llama")), Encoder(tiny_tokenizer())
    rows = encoder.rows([[5, 6, 7]])
    step = encoder.rows([[8]])
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with view.frozen(), torch.no_grad(), warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        cache = view.run(rows, use_cache=True).cache
        view.run(step, past=(cache, torch.ones(1, 4, dtype=torch.long)))
    assert "deprecated" not in caplog.text
