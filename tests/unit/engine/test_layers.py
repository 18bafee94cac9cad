"""Layers by depth."""

from __future__ import annotations

import pytest

from kecore.engine.layers import at_depth
from kecore.model import ModelView
from kecore.testing import tiny_model


@pytest.mark.parametrize(
    ("first", "last", "layers"),
    [(0.0, 0.0, (0,)), (0.0, 1.0, (0, 1, 2, 3)), (1.0, 1.0, (3,)), (0.3, 0.7, (1, 2)), (0.9, 0.2, (3,))],
)
def test_layers_at_a_depth(first: float, last: float, layers: tuple[int, ...]) -> None:
    assert at_depth(ModelView.of(tiny_model("llama")), first, last) == layers
