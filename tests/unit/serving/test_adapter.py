"""An exported adapter, loaded by peft, does what the edit does."""

from __future__ import annotations

import ast
import copy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from kecore import EditRequest, WeightEdit, foreign, foreign_llama, merge, save_model
from kecore.api.errors import ArtifactMismatchError, ConfigError, UnsupportedCapabilityError
from kecore.api.identity import Fingerprint
from kecore.cli import app
from kecore.edit import Dense, LowRank
from kecore.edit.updates import smallest_factors
from kecore.model import ModelView
from kecore.models import LoadedModel
from kecore.serving import export_edits, score_drop, verify_export
from kecore.serving.adapter import served_rank
from kecore.testing import tiny_model, tiny_tokenizer

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
    exported = export_edits([edit], tmp_path / "adapter", base="tiny")
    assert (exported.rank, exported.lost) == (3, 0.0)
    # GPT-2 keeps its weights in modules that servers take no adapters for.
    assert bool(exported.warnings) is (architecture == "gpt2")
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
        export_edits([full], tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_the_smallest_rank_holds_the_edit(tmp_path: Path) -> None:
    edit = an_edit(tiny_model("llama"), {1: 2})
    (name,) = edit.updates
    low = edit.updates[name]
    assert isinstance(low, LowRank)
    # The same update in seven columns, as many facts about two subjects would have it.
    spread = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)))[0][:2]
    wide = LowRank(low.U @ spread, low.V @ spread)
    found, lost = smallest_factors(wide)
    assert (found.rank, lost) == (2, pytest.approx(0, abs=1e-6))
    torch.testing.assert_close(found.matrix(), low.matrix(), rtol=1e-5, atol=1e-6)
    adapter = export_edits([replace(edit, updates={name: wide})], tmp_path / "adapter")
    assert (adapter.rank, adapter.lost) == (2, 0.0)


def test_a_lower_rank_is_the_best_one_and_says_what_it_lost(tmp_path: Path) -> None:
    edit = an_edit(tiny_model("llama"), {1: 5})
    (name,) = edit.updates
    matrix = edit.updates[name].matrix().double()
    singular = torch.linalg.svdvals(matrix)
    found, lost = smallest_factors(Dense(matrix.float()), 3)
    assert found.rank == 3
    assert lost == pytest.approx(float(singular[3:].norm() / singular.norm()), rel=1e-4)
    error = (found.matrix().double() - matrix).norm() / matrix.norm()
    assert float(error) == pytest.approx(lost, rel=1e-3)
    full = replace(edit, updates={name: Dense(matrix.float())})
    adapter = export_edits([full], tmp_path / "adapter", rank=3)
    assert (adapter.rank, adapter.lost) == (3, pytest.approx(lost, rel=1e-3))
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        export_edits([edit], tmp_path / "none", rank=0)
    nothing = LowRank(torch.zeros(8, 2), torch.zeros(6, 2))
    assert smallest_factors(nothing)[0].matrix().abs().max() == 0


def test_edits_are_written_as_one_adapter(tmp_path: Path) -> None:
    model = tiny_model("llama")
    first, second = an_edit(model, {1: 2}), an_edit(model, {1: 1, 2: 1})
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    words = ["export", tmp_path / "first", tmp_path / "second", "--out", tmp_path / "adapter", "--base", "org/model"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    served = f"vllm serve org/model --enable-lora --max-lora-rank 8 --lora-modules edited={tmp_path / 'adapter'}"
    assert served in done.stdout
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    merge([first, second]).attach(model)
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-4, atol=1e-5)


def test_what_servers_may_be_started_with() -> None:
    assert [served_rank(rank) for rank in (1, 8, 9, 100, 512, 513)] == [8, 8, 16, 128, 512, None]


def test_peft_alone_says_what_the_edit_says(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    loaded = LoadedModel(tiny_model("llama"), tiny_tokenizer("llama-like"), "tiny", "tiny")
    requests = (EditRequest("The capital of {} is", "Italy", "Apple"), EditRequest("The company of {}", "Ann", "Rome"))
    edit = replace(an_edit(loaded.model, {1: 3, 2: 5}), requests=requests)
    before = logits(loaded.model)
    exported = export_edits([edit], tmp_path / "adapter")
    found = verify_export(loaded, [edit], exported)
    assert (found.program, found.prompts, found.same_text, found.holds) == ("peft", 2, 2, True)
    assert found.difference < 1e-4
    assert torch.equal(logits(loaded.model), before)
    (exported.folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactMismatchError, match="peft cannot load"):
        verify_export(loaded, [edit], exported)


def test_a_lower_rank_says_what_it_costs() -> None:
    loaded = LoadedModel(tiny_model("llama"), tiny_tokenizer("llama-like"), "tiny", "tiny")
    requests = (EditRequest("The capital of {} is", "Italy", "Apple", "Rome"),)
    edit = replace(an_edit(loaded.model, {1: 3, 2: 5}), requests=requests)
    before = logits(loaded.model)
    drop = score_drop(loaded, edit, 1)
    assert {"edit_success", "strict_accuracy"} <= drop.before.keys() == drop.after.keys()
    assert torch.equal(logits(loaded.model), before)


def test_programs_find_base_and_tokenizer(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama-like")
    base = save_model(model, tokenizer, tmp_path / "base")  # type: ignore[arg-type]
    edit = replace(an_edit(model, {1: 2}), model=str(base))
    exported = export_edits([edit], tmp_path / "adapter")
    assert exported.base == str(base)
    assert not exported.warnings
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    edit.attach(model)
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-4, atol=1e-5)
    assert "tokenizer.json" in exported.files
    nowhere = export_edits([replace(edit, model=str(tmp_path / "gone"))], tmp_path / "alone")
    assert "no tokenizer" in nowhere.warnings[0]
    assert "--base NAME" in nowhere.warnings[1]


@pytest.mark.parametrize("module", [foreign, foreign_llama])
def test_what_runs_in_the_other_process_knows_nothing_of_kecore(module: ModuleType) -> None:
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name and name.startswith("kecore")]
