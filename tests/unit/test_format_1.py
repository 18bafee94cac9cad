"""Statistics and edits that kecore wrote when their keys were layers are still read, and sessions go on from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kecore.api.types import EditRequest
from kecore.edit import Edit, LowRank, WeightEdit, load_edit
from kecore.editor import Editor
from kecore.model import SiteId
from kecore.statistics import KeyStatistics
from kecore.testing.models import tiny_model, tiny_tokenizer

FILES = Path(__file__).parents[1] / "fixtures" / "format-1"
METHODS = ["memit", "alphaedit", "ultraedit", "prune"]
WITH_STATISTICS = ["memit", "alphaedit", "prune"]


@pytest.fixture
def model() -> nn.Module:
    model = tiny_model("gpt2", n_embd=16, n_head=2, n_inner=24, n_positions=64, n_layer=3).float().eval()
    parameters = dict(model.named_parameters())
    for name, saved in load_file(FILES / "model.safetensors").items():
        parameters[name].data = saved
    return model


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FILES / "expected.safetensors")


def logits(model: nn.Module) -> Tensor:
    ids = tiny_tokenizer()("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1].double()


def edits(method: str) -> list[Edit]:
    return [load_edit(FILES / f"{method}-{position}.safetensors") for position in (1, 2)]


@pytest.mark.parametrize("method", METHODS)
def test_edits_do_what_they_did(model: nn.Module, expected: dict[str, Tensor], method: str) -> None:
    torch.testing.assert_close(logits(model), expected["unedited"])
    for edit in edits(method):
        edit.attach(model)
    torch.testing.assert_close(logits(model), expected[method])
    assert not torch.allclose(expected[method], expected["unedited"])  # else this says nothing


def test_statistics_are_read(model: nn.Module) -> None:
    statistics = KeyStatistics.load(FILES)
    statistics.check(Editor(model, tiny_tokenizer()).view)
    assert statistics.sites == (SiteId(0), SiteId(1), SiteId(2))
    assert statistics.moment(SiteId(1)).shape == (24, 24)


@pytest.mark.parametrize("method", METHODS)
def test_a_session_goes_on_from_the_state_of_the_first_edit(model: nn.Module, method: str) -> None:
    """The second edit, planned now, is the one that was planned then."""
    first, second = edits(method)
    statistics = KeyStatistics.load(FILES) if method in WITH_STATISTICS else None
    editor = Editor(model, tiny_tokenizer(), statistics=statistics)
    editor.resume([first])
    fact = EditRequest("{} is a company that makes the", "iPhone", "Apple")
    again = editor.edit(fact, method, **second.config)
    assert isinstance(again, WeightEdit)
    assert isinstance(second, WeightEdit)
    assert again.state.keys() >= second.state.keys()  # later releases may keep more
    for name, tensor in second.state.items():
        torch.testing.assert_close(again.state[name], tensor, rtol=1e-4, atol=1e-5)
    for name, update in second.updates.items():
        assert isinstance(update, LowRank)
        torch.testing.assert_close(again.updates[name].matrix(), update.matrix(), rtol=1e-3, atol=1e-4)
