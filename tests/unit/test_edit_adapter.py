"""An exported adapter, loaded by peft, does what the edit does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from kecore import WeightEdit
from kecore.api.errors import UnsupportedCapabilityError
from kecore.api.identity import Fingerprint
from kecore.cli import app
from kecore.edit import Dense, LowRank
from kecore.edit.adapter import export_adapter
from kecore.model import ModelView
from kecore.testing import tiny_model

PROMPT = torch.tensor([[7, 33, 104, 21, 80]])


def an_edit(model: nn.Module, ranks: dict[int, int]) -> WeightEdit:
    """Random updates of the value projections of some layers, by rank."""
    view = ModelView.of(model)
    draw = torch.Generator().manual_seed(0)

    def factor(width: int, rank: int) -> Tensor:
        return torch.randn(width, rank, generator=draw) / 8

    parts = {layer: view.layers[layer].site.linear for layer in ranks}
    return WeightEdit(
        updates={p.name: LowRank(factor(p.d_out, ranks[i]), factor(p.d_in, ranks[i])) for i, p in parts.items()},
        transposed=frozenset(p.name for p in parts.values() if p.transposed),
        base=Fingerprint.of(view.identity(), view.dtype),
        method="random",
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_peft_loads_it(architecture: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(architecture)
    edit, plain = an_edit(model, {1: 1, 2: 3}), logits(model)
    export_adapter(edit, tmp_path / "adapter", base="tiny")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == "tiny"
    edit.attach(model)
    expected = logits(model)
    assert float((logits(adapted) - expected).norm()) < 1e-5 * float((expected - plain).norm())


def test_command_writes_it(tmp_path: Path) -> None:
    an_edit(tiny_model("llama"), {1: 2}).save(tmp_path / "edit")
    words = ["export", str(tmp_path / "edit"), "--out", str(tmp_path / "adapter")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert CliRunner().invoke(app, words).exit_code == 2  # there is one already


def test_full_updates_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    low = an_edit(model, {1: 1})
    (name,) = low.updates
    full = WeightEdit(updates={name: Dense(low.updates[name].matrix())}, base=low.base, method="ft-m")
    with pytest.raises(UnsupportedCapabilityError, match=r"'ft-m' has a full one of .*kecore attach"):
        export_adapter(full, tmp_path)
    assert not list(tmp_path.iterdir())
