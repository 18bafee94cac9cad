"""The attention's output is found by what it does, whatever it is called."""

from __future__ import annotations

import pytest
import torch

from kecore.api.errors import UnsupportedModelError
from kecore.model import ModelView
from kecore.model.mixer import mixer
from kecore.testing import Snapshot, tiny_model


@pytest.mark.parametrize(
    ("architecture", "path"),
    [
        ("gpt2", "attn"),
        ("llama", "self_attn"),
        ("gptj", "attn"),  # parallel to the feed-forward block
        ("gemma2", "post_attention_layernorm"),  # a norm stands behind the attention
        ("granite", "self_attn"),  # scaled on its way into the residual stream
        ("gpt_neox", "post_attention_dropout"),
    ],
)
def test_found(architecture: str, path: str) -> None:
    view = ModelView.of(tiny_model(architecture))
    before = Snapshot(view.model)
    found = mixer(view, 1)
    assert found is view.layers[1].module.get_submodule(path)
    assert before.differences() == []


def test_in_half_precision() -> None:
    view = ModelView.of(tiny_model("llama").to(torch.bfloat16))
    assert mixer(view, 2) is view.layers[2].module.get_submodule("self_attn")


@pytest.mark.parametrize("architecture", ["bart", "mamba2"])
def test_refused(architecture: str) -> None:
    """A norm behind the sum; no second block."""
    with pytest.raises(UnsupportedModelError, match=r"layer 1 of .* memit"):
        mixer(ModelView.of(tiny_model(architecture)), 1)
