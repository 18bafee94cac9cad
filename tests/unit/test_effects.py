"""Edits that leave every weight alone: attached, stacked, superseded, taken off, and read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore import EditRequest, LowRank, ModelView, ModuleEdit, PromptEdit, WeightEdit, attached, load_edit
from kecore.api.errors import ArtifactError, ArtifactMismatchError, EditStateError, PluginError
from kecore.api.identity import Fingerprint, Identity
from kecore.edit import Edit, PromptWriter, SideModule, suspended, written
from kecore.testing import tiny_model
from kecore.testing.snapshot import Snapshot

PLACE = "model.layers.1.mlp.down_proj"
IDS = torch.tensor([[3, 1, 4, 1, 5]])


class Shift(SideModule):
    """Adds a vector to a layer's value projection."""

    def __init__(self, place: str, width: int) -> None:
        super().__init__()
        self.place = place
        self.vector = nn.Parameter(torch.zeros(width))

    def settings(self) -> dict[str, Any]:
        return {"place": self.place, "width": self.vector.numel()}

    def install(self, model: nn.Module) -> Iterable[RemovableHandle]:
        return [model.get_submodule(self.place).register_forward_hook(lambda _m, _a, out: out + self.vector)]


class Lost(Shift):
    """Finds its first place and not its second."""

    def install(self, model: nn.Module) -> Iterable[RemovableHandle]:
        yield from super().install(model)
        model.get_submodule("nowhere")


class Preface(PromptWriter):
    """Puts a text before prompts that hold a word."""

    def __init__(self, word: str, text: str) -> None:
        self.word, self.text = word, text

    def settings(self) -> dict[str, Any]:
        return {"word": self.word, "text": self.text}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Preface:
        return cls(**settings)

    def write(self, prompts: Sequence[str]) -> list[str]:
        return [f"{self.text} {prompt}" if self.word in prompt else prompt for prompt in prompts]


class Shifting:
    effect = Shift


class Prefacing:
    effect = Preface


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("llama")


def about(model: nn.Module) -> dict[str, Any]:
    return {
        "base": Fingerprint.of(Identity(model), torch.float32),
        "requests": (EditRequest("{} is", "Paris", "big"),),
        "notes": {"loss": 0.5},
    }


def shift(model: nn.Module, size: float, *, method: str = "shift", supersedes: bool = False) -> ModuleEdit:
    made = Shift(PLACE, 32)
    with torch.no_grad():
        made.vector.fill_(size)
    return ModuleEdit(effect=made, method=method, supersedes=supersedes, **about(model))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def with_vector(model: nn.Module, size: float) -> Tensor:
    """What a hook written by hand gives."""
    handle = model.get_submodule(PLACE).register_forward_hook(lambda _m, _a, out: out + torch.full((32,), size))
    found = logits(model)
    handle.remove()
    return found


def test_side_module_acts_while_attached_and_leaves_nothing_behind(model: nn.Module) -> None:
    plain, wanted = logits(model), with_vector(model, 0.3)
    edit = shift(model, 0.3)
    before = Snapshot(model)
    edit.attach(model)
    assert attached(model) == (edit,)
    assert torch.equal(logits(model), wanted)
    with pytest.raises(EditStateError, match="attached to the model already"):
        edit.attach(model)
    edit.revert(model)
    assert torch.equal(logits(model), plain)
    assert not before.differences()
    with pytest.raises(EditStateError, match="not attached"):
        edit.revert(model)


def test_a_compiled_model_takes_weights_at_any_time_and_no_hooks(model: nn.Module) -> None:
    """Compiled code is given the weights each time, and does not look at hooks again."""
    name = f"{PLACE}.weight"
    update = LowRank(*(torch.ones(size, 1) for size in model.get_parameter(name).shape))
    weights = WeightEdit(updates={name: update}, method="weights", **about(model))
    other = tiny_model("llama")
    weights.attach(other)
    model.compile(backend="eager")
    plain = logits(model)
    with pytest.raises(EditStateError, match=r"the model is compiled, .* compile the model after that"):
        shift(model, 0.3).attach(model)
    assert attached(model) == ()
    weights.attach(model)
    torch.testing.assert_close(logits(model), logits(other))
    weights.revert(model)
    assert torch.equal(logits(model), plain)


def test_what_acts_beside_a_model_that_was_compiled_since_stays_on(model: nn.Module) -> None:
    torch.compiler.reset()
    edit = shift(model, 0.3)
    edit.attach(model)
    acting = logits(model)
    model.compile(backend="eager")
    with pytest.raises(EditStateError, match="compiled since, so they cannot be put aside"), suspended(model):
        pass
    torch.testing.assert_close(logits(model), acting)
    edit.revert(model)


def test_attached_copy_is_apart_from_the_edit(model: nn.Module) -> None:
    edit = shift(model, 0.3)
    edit.attach(model)
    wanted = logits(model)
    assert isinstance(edit.effect, Shift)
    with torch.no_grad():
        edit.effect.vector.fill_(9)
    assert torch.equal(logits(model), wanted)


def test_edits_of_one_method_stack_unless_the_later_supersedes(model: nn.Module) -> None:
    first, second = shift(model, 0.25), shift(model, 0.5)
    first.attach(model)
    second.attach(model)
    assert torch.equal(logits(model), with_vector_of(model, first, second))
    second.revert(model)
    instead, other = shift(model, 0.5, supersedes=True), shift(model, 0.125, method="other")
    instead.attach(model)
    alone = logits(model)
    other.attach(model)
    other.revert(model)
    assert torch.equal(logits(model), alone)
    first.revert(model)  # asleep, and taken off all the same
    assert torch.equal(logits(model), alone)
    first.attach(model)
    instead.revert(model)
    assert torch.equal(logits(model), with_vector_of(model, first))


def with_vector_of(model: nn.Module, *edits: ModuleEdit) -> Tensor:
    """What the edits alone do to a fresh model, hooked in by hand."""
    fresh = tiny_model("llama")
    for edit in edits:
        list(edit.effect.install(fresh))
    return logits(fresh)


def test_superseded_edit_wakes_when_the_later_one_goes(model: nn.Module) -> None:
    first, second = shift(model, 0.25, supersedes=True), shift(model, 0.5, supersedes=True)
    first.attach(model)
    one = logits(model)
    second.attach(model)
    assert torch.equal(logits(model), with_vector_of(model, second))
    second.revert(model)
    assert torch.equal(logits(model), one)


def test_failed_installation_leaves_the_model_as_it_was(model: nn.Module) -> None:
    good = shift(model, 0.3)
    good.attach(model)
    before = Snapshot(model)
    bad = ModuleEdit(effect=Lost(**good.effect.settings()), method="lost", **about(tiny_model("llama")))
    with pytest.raises(AttributeError, match="nowhere"):
        bad.attach(model)
    assert not before.differences()
    assert attached(model) == (good,)


def test_side_modules_and_weights_come_off_in_any_order(model: nn.Module) -> None:
    plain = logits(model)
    name = "model.layers.0.mlp.down_proj.weight"
    rows, columns = dict(model.named_parameters())[name].shape
    update = LowRank(torch.full((rows, 1), 0.1), torch.full((columns, 1), 0.1))
    weights = WeightEdit(updates={name: update}, method="weights", **about(model))
    side = shift(model, 0.3)
    for order in ((side, weights), (weights, side)):
        for edit in order:
            edit.attach(model)
        for edit in order:
            edit.revert(model)
        assert torch.equal(logits(model), plain)


def test_other_models_are_refused_by_side_modules_and_welcome_to_prompts(model: nn.Module) -> None:
    other = tiny_model("llama", seed=5)
    with pytest.raises(ArtifactMismatchError, match="made for other weights"):
        shift(model, 0.3).attach(other)
    PromptEdit(effect=Preface("a", "b"), method="preface", **about(model)).attach(other)


def test_prompts_are_written_in_the_order_of_the_edits(model: nn.Module) -> None:
    first = PromptEdit(effect=Preface("sea", "Blue."), method="preface", **about(model))
    second = PromptEdit(effect=Preface("sea", "Deep."), method="preface", **about(model))
    first.attach(model)
    second.attach(model)
    assert written(model, ["the sea", "the sky"]) == ["Deep. Blue. the sea", "the sky"]
    first.revert(model)
    assert written(model, ["the sea"]) == ["Deep. the sea"]
    later = PromptEdit(effect=Preface("sky", "High."), method="preface", supersedes=True, **about(model))
    later.attach(model)
    assert written(model, ["the sea", "the sky"]) == ["the sea", "High. the sky"]


def test_suspended_edits_have_no_effect_inside_the_block(model: nn.Module) -> None:
    plain = logits(model)
    edits: list[Edit] = [shift(model, 0.3), PromptEdit(effect=Preface("a", "b"), method="preface", **about(model))]
    for edit in edits:
        edit.attach(model)
    acting = logits(model)
    with suspended(model):
        assert torch.equal(logits(model), plain)
        assert written(model, ["a"]) == ["a"]
        with suspended(model):  # as a method may be asked for what it does itself
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
        assert written(model, ["a"]) == ["a"]
    assert torch.equal(logits(model), acting)
    assert written(model, ["a"]) == ["b a"]
    edits[0].revert(model)
    assert torch.equal(logits(model), plain)


def test_what_a_writer_suspends_is_suspended(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logits(model)
    for edit in (shift(model, 0.3), PromptEdit(effect=Preface("a", "b"), method="preface", **about(model))):
        edit.attach(model)
    acting, seen = logits(model), list[Tensor]()

    def asks(_self: Preface, prompts: Sequence[str]) -> list[str]:
        seen.append(logits(model))
        with suspended(model):
            seen.append(logits(model))
        seen.append(logits(model))
        return list(prompts)

    monkeypatch.setattr(Preface, "write", asks)
    written(model, ["a"])
    assert [torch.equal(found, acting) for found in seen] == [True, False, True]
    assert torch.equal(seen[1], plain)


def test_an_edit_taken_off_inside_the_block_stays_off(model: nn.Module) -> None:
    plain, edit = logits(model), shift(model, 0.3)
    edit.attach(model)
    with suspended(model):
        edit.revert(model)
    assert torch.equal(logits(model), plain)


def test_structure_is_read_without_what_acts_beside_it(model: nn.Module) -> None:
    edit = shift(model, 0.3)
    edit.attach(model)
    acting = logits(model)
    assert ModelView.of(model).layers[1].site.linear.name == f"{PLACE}.weight"
    assert torch.equal(logits(model), acting)


def test_saved_edits_are_the_same_edits(model: nn.Module, tmp_path: Path) -> None:
    side = shift(model, 0.3, supersedes=True)
    prompt = PromptEdit(effect=Preface("a", "b"), method="preface", **about(model))
    for edit, method in ((side, Shifting), (prompt, Prefacing)):
        loaded = load_edit(edit.save(tmp_path / edit.method), method)
        assert type(loaded) is type(edit)
        assert loaded.inspect() == edit.inspect()
        assert isinstance(loaded, ModuleEdit | PromptEdit)
        assert loaded.supersedes is edit.supersedes
    load_edit(tmp_path / "shift", Shifting).attach(model)
    assert torch.equal(logits(model), with_vector_of(model, side))


def test_edit_of_a_method_that_cannot_read_it_is_refused(model: nn.Module, tmp_path: Path) -> None:
    file = shift(model, 0.3, method="memit").save(tmp_path)
    with pytest.raises(ArtifactError, match="method 'memit' does not say how to read its edits"):
        load_edit(file)
    with pytest.raises(ArtifactError, match="does not say how"):
        load_edit(file, Prefacing)


def test_effect_of_another_kind_is_refused(model: nn.Module) -> None:
    wrong: Any = Preface("a", "b")
    with pytest.raises(PluginError, match="needs a SideModule, and method 'x' gave a Preface"):
        ModuleEdit(effect=wrong, method="x", **about(model))
