"""The one object that knows what is on a model: of each model its own, gone with it, never in a copy."""

from __future__ import annotations

import copy
import gc
from weakref import ref

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from kecore.api.errors import EditStateError
from kecore.model.attachment import Attachment


class AddOne:
    """Acts beside a linear map: adds one to its output."""

    stands_for_weights = False

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        def add_one(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
            return output + 1

        return [model.register_forward_hook(add_one)]


@pytest.fixture
def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_of_a_model_there_is_one(model: nn.Linear) -> None:
    assert Attachment.of(model) is Attachment.of(model)
    assert Attachment.of(model).model is model


def test_a_copy_of_an_edited_model_is_a_model_without_edits(model: nn.Linear) -> None:
    Attachment.of(model).write_weights({"weight": torch.ones(2, 3)})
    clone = copy.deepcopy(model)
    assert Attachment.of(clone).unedited_data == {}
    assert Attachment.of(clone) is not Attachment.of(model)
    Attachment.of(model).write_weights({})
    assert bool((clone.weight == 1).all())


def test_a_model_that_is_gone_takes_its_attachment_with_it(model: nn.Linear) -> None:
    mine = nn.Linear(3, 2)
    attachment = Attachment.of(mine)
    attachment.write_weights({"weight": torch.ones(2, 3)})
    attachment.set_beside([AddOne()])
    data, gone = ref(attachment.unedited_data["weight"]), ref(attachment)
    del attachment, mine
    gc.collect()
    assert gone() is None
    assert data() is None


def test_an_attachment_does_not_keep_its_model_alive() -> None:
    attachment = Attachment.of(nn.Linear(3, 2))
    gc.collect()
    with pytest.raises(EditStateError, match="is gone"):
        _ = attachment.model


def test_weights_come_back_bit_for_bit_and_only_those_given_stay_changed(model: nn.Linear) -> None:
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    attachment = Attachment.of(model)
    attachment.write_weights({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    attachment.write_weights({"bias": torch.zeros(2)})
    assert torch.equal(model.weight, weight)
    assert list(attachment.unedited_data) == ["bias"]
    with attachment.unedited():
        assert torch.equal(model.bias, bias)
    assert torch.equal(model.bias, torch.zeros(2))


def test_a_write_by_somebody_else_is_noticed(model: nn.Linear) -> None:
    attachment = Attachment.of(model)
    attachment.write_weights({"weight": torch.ones(2, 3)})
    attachment.check_weights()
    model.weight.data[0, 0] = 7
    with pytest.raises(EditStateError, match="weight was changed by something else"):
        attachment.check_weights()


def test_suspended_blocks_nest(model: nn.Linear) -> None:
    attachment, x = Attachment.of(model), torch.ones(1, 3)
    plain = model(x)
    attachment.set_beside([AddOne()])
    with attachment.suspended():
        with attachment.suspended():
            assert torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)
        assert attachment.prompts_suspended
    assert torch.equal(model(x), plain + 1)
    assert not attachment.prompts_suspended
