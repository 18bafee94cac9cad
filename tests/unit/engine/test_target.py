"""The target stage: several of them act one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kecore.engine import ClosedForm, ValueSettings
from kecore.engine.closed_form import unsolved
from kecore.engine.target import as_found

FORM = ClosedForm(layers=(0,), contexts=0, context_tokens=0, values=ValueSettings(), solve=unsolved)


def doubled(_layer: int, _outputs: Callable[[], Tensor], delta: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["seen"] = delta
    return 2 * delta


def shortened(_layer: int, outputs: Callable[[], Tensor], delta: Tensor, _state: dict[str, Tensor]) -> Tensor:
    return delta - outputs()


def test_targets_act_in_turn() -> None:
    state: dict[str, Tensor] = {}
    both = FORM.with_target(doubled).with_target(shortened).target
    assert torch.equal(both(1, lambda: torch.ones(2, 3), torch.full((2, 3), 5.0), state), torch.full((2, 3), 9.0))
    assert torch.equal(state["seen"], torch.full((2, 3), 5.0))


def test_a_form_changes_nothing_unless_a_stage_does() -> None:
    assert FORM.target is as_found
    assert FORM.with_target(doubled).target is doubled
    assert replace(FORM.with_target(doubled), target=as_found) == FORM
