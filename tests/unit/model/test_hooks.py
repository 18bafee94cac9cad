from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore.model import ModelView, hooks
from kecore.testing import Snapshot, tiny_model


class Stop(Exception):
    pass


@pytest.fixture
def model() -> nn.Module:
    model = tiny_model("llama")
    model.train()
    model.get_submodule("model.layers.1").eval()
    next(model.parameters()).requires_grad_(False)
    return model


def blocks(model: nn.Module) -> dict[str, Callable[[], Any]]:
    view = ModelView.of(model)
    projection = view.layers[0].site.linear
    hidden = torch.zeros(1, 3, view.width)
    return {
        "frozen": view.frozen,
        "capture": lambda: hooks.capture([part.module for part in view.layers]),
        "substitute": lambda: hooks.substitute(projection.module, lambda x: x + 1),
        "resumed": lambda: hooks.resumed(view, 2, hidden),
        "stopped": lambda: hooks.stopped(view.layers[1].module),
        "overlay": lambda: view.overlay({projection.parameter: torch.ones_like(projection.parameter)}),
    }


@pytest.mark.parametrize("name", ["frozen", "capture", "substitute", "resumed", "stopped", "overlay"])
@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_restored(model: nn.Module, name: str, raises: bool) -> None:
    before = Snapshot(model)
    block = blocks(model)[name]
    ids = torch.tensor([[5, 6, 7]])

    def run() -> None:
        with block():
            if name != "stopped":  # a stop changes nothing but the pass
                assert before.differences() != []
            torch.rand(3) if name == "frozen" else None
            model(input_ids=ids)
            if raises:
                raise Stop

    state = torch.get_rng_state()
    if raises and name != "stopped":
        with pytest.raises(Stop):
            run()
    else:
        run()
    if name != "frozen":  # the model is in training mode, so its own pass may draw random numbers
        torch.set_rng_state(state)
    assert before.differences() == []


def test_frozen_model_draws_no_numbers_and_asks_for_no_gradients(model: nn.Module) -> None:
    with hooks.frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        inside = torch.rand(1)
    assert torch.equal(torch.rand(1), inside)


class Pair(nn.Module):
    """A layer that returns a tuple, is called by keyword, and writes into what it is given."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return hidden_states.add_(1), "rest"


def test_capture_keeps_the_order_of_the_modules_and_copies_what_is_overwritten() -> None:
    first, second = Pair(), Pair()
    with hooks.capture([second, first]) as outputs, hooks.capture([second], inputs=True) as inputs:
        x, _ = first(hidden_states=torch.zeros(2))
        second(hidden_states=x)
    assert [t.tolist() for t in outputs] == [[2.0, 2.0], [1.0, 1.0]]
    assert inputs[0].data_ptr() == x.data_ptr()


def test_substitute_changes_the_first_item_and_keeps_the_rest() -> None:
    module = Pair()
    with hooks.substitute(module, lambda x: 10 * x):
        output, rest = module(torch.zeros(2))
    assert (output.tolist(), rest) == ([10.0, 10.0], "rest")
    with hooks.substitute(module, lambda x: x + 5, inputs=True):
        assert module(torch.zeros(2))[0].tolist() == [6.0, 6.0]


def test_stopped_skips_what_follows_and_swallows_only_its_own_signal() -> None:
    ran: list[str] = []
    first, second = nn.Identity(), nn.Identity()
    second.register_forward_hook(lambda *_: ran.append("second"))
    with hooks.stopped(first):
        second(first(torch.zeros(1)))
    assert ran == []
    with pytest.raises(ValueError, match="other"), hooks.stopped(first):
        raise ValueError("other")


def test_resumed_puts_an_instance_forward_back() -> None:
    """Accelerate's hooks live in the instance's ``forward``."""
    model = tiny_model("llama")
    view = ModelView.of(model)
    own = view.layers[0].module.forward
    view.layers[0].module.forward = own
    with hooks.resumed(view, 1, torch.zeros(1, 3, view.width)):
        assert view.layers[0].module.forward is not own
    assert view.layers[0].module.__dict__["forward"] is own
    assert "forward" not in view.layers[1].module.__dict__


def test_overlay_leaves_storage_and_bits(model: nn.Module) -> None:
    parameter = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    pointer, bits = parameter.data_ptr(), parameter.detach().clone()
    other = torch.full_like(parameter, float("nan"))
    with hooks.overlaid({parameter: other}):
        assert parameter.data_ptr() == other.data_ptr()
        assert model.get_parameter("model.layers.0.mlp.down_proj.weight") is parameter
    assert parameter.data_ptr() == pointer
    assert torch.equal(parameter, bits)
