"""Edits on and off a model, bit by bit, and to and from a file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kecore import files
from kecore.api.errors import (
    ArtifactError,
    ArtifactMismatchError,
    EditStateError,
    NonFiniteError,
    UnsupportedCapabilityError,
)
from kecore.api.identity import Fingerprint, Identity
from kecore.api.types import EditRequest
from kecore.edit import Dense, LowRank, WeightEdit, attached, factored, load_edit, merge, set_edits, updated
from kecore.model import ModelView
from kecore.testing import Snapshot, tiny_model

REQUESTS = (
    EditRequest("The capital of {} is", "France", "Rome", "Paris"),
    EditRequest("{}的首都是", "日本", "巴黎"),
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def edit_of(model: nn.Module, seed: int, layers: tuple[int, ...] = (0, 2), **fields: Any) -> WeightEdit:
    view = ModelView.of(model)
    generator = torch.Generator().manual_seed(seed)
    projections = [view.layers[i].site.linear for i in layers]
    updates = {
        p.name: LowRank(
            torch.randn(p.d_out, 3, generator=generator) / 9, torch.randn(p.d_in, 3, generator=generator) / 9
        )
        for p in projections
    }
    known: dict[str, Any] = {
        "updates": updates,
        "base": Fingerprint.of(view.identity(), view.dtype),
        "method": "test",
        "transposed": frozenset(p.name for p in projections if p.transposed),
        "requests": REQUESTS,
        "seed": seed,
    }
    return WeightEdit(**{**known, **fields})


def stored(update: LowRank | Dense, edit: WeightEdit, name: str) -> Tensor:
    return update.matrix().t() if name in edit.transposed else update.matrix()


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


def test_attach_and_revert_are_bit_exact(model: nn.Module) -> None:
    before = Snapshot(model)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    edit = edit_of(model, 1)
    edit.attach(model)
    assert attached(model) == (edit,)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, base[name])]
    assert changed == list(edit.updates)
    for name, update in edit.updates.items():
        assert torch.equal(model.get_parameter(name), base[name] + stored(update, edit, name))
    edit.revert(model)
    assert before.differences() == []
    assert attached(model) == ()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_stacked_edits_come_off_in_any_order(model: nn.Module, order: tuple[int, ...]) -> None:
    before = Snapshot(model)
    edits = [edit_of(model, seed, layers) for seed, layers in enumerate([(0, 1), (1, 2), (0, 1, 2)])]
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    for edit in edits:
        edit.attach(model)
    for count, index in enumerate(order, 1):
        edits[index].revert(model)
        left = [edit for i, edit in enumerate(edits) if i not in order[:count]]
        assert attached(model) == tuple(left)
        for name in edits[2].updates:
            wanted = base[name].clone()
            for edit in left:
                if name in edit.updates:
                    wanted += stored(edit.updates[name], edit, name)
            assert torch.equal(model.get_parameter(name), wanted)
    assert before.differences() == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_edit_planned_in_float32_rounds_once_on_a_cast_of_its_base(model: nn.Module, dtype: torch.dtype) -> None:
    edits = [edit_of(model, 1), edit_of(model, 2)]
    model.to(dtype)
    base = {name: model.get_parameter(name).detach().clone() for name in edits[0].updates}
    for edit in edits:
        edit.attach(model)
    for name, data in base.items():
        total = data.float()
        for edit in edits:
            total = total + stored(edit.updates[name], edit, name)
        assert torch.equal(model.get_parameter(name), total.to(dtype))
        assert model.get_parameter(name).dtype == dtype
    for edit in edits:
        edit.revert(model)
    assert all(torch.equal(model.get_parameter(name), data) for name, data in base.items())


def test_a_model_may_move_between_types_while_edited(model: nn.Module) -> None:
    edit = edit_of(model, 1)
    wanted = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    edit.attach(model)
    model.bfloat16()
    edit.revert(model)
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


def test_dense_and_low_rank_updates_mix(model: nn.Module) -> None:
    low = edit_of(model, 1)
    dense = replace(edit_of(model, 2), updates={n: Dense(u.matrix()) for n, u in edit_of(model, 2).updates.items()})
    before = Snapshot(model)
    base = {name: model.get_parameter(name).detach().clone() for name in low.updates}
    low.attach(model)
    dense.attach(model)
    for name, data in base.items():
        wanted = data + stored(low.updates[name], low, name)
        assert torch.equal(model.get_parameter(name), wanted + stored(dense.updates[name], dense, name))
    low.revert(model)
    dense.revert(model)
    assert before.differences() == []


def test_updated_adds_in_float32_and_leaves_the_data() -> None:
    data = torch.full((2, 2), 256.0, dtype=torch.bfloat16)  # where 0.75 is less than half a step
    step = Dense(torch.full((2, 2), 0.75))
    new = updated("w", data, [step, step], transposed=False)
    assert new.tolist() == [[258.0, 258.0]] * 2  # 257.5 rounded once; each step rounded alone would give 256
    assert data.tolist() == [[256.0, 256.0]] * 2


@pytest.fixture
def untouched(model: nn.Module) -> Iterator[Any]:
    """Whatever the test tries must leave the model bitwise as it is."""
    before = Snapshot(model)
    yield model
    assert before.differences() == []
    assert attached(model) == ()


class TestRefused:
    def test_other_weights(self, untouched: nn.Module) -> None:
        edit = edit_of(tiny_model(untouched.config.model_type, seed=1), 1)
        with pytest.raises(ArtifactMismatchError, match=r"than those of '.*': fingerprint expected \w{12}, got \w{12}"):
            edit.attach(untouched)

    def test_one_bit_anywhere(self, model: nn.Module) -> None:
        edit = edit_of(model, 1)
        norm = next(p for p in model.parameters() if p.ndim == 1)
        with torch.no_grad():
            norm[0] += 1e-6
        with pytest.raises(ArtifactMismatchError, match="other weights"):
            edit.attach(model)

    def test_other_parameters(self, untouched: nn.Module) -> None:
        edit = edit_of(untouched, 1)
        (name, update), *_ = edit.updates.items()
        with pytest.raises(ArtifactMismatchError, match=r"changes layers\.9\.x, which \w+ does not have"):
            replace(edit, updates={"layers.9.x": update}).attach(untouched)
        wrong = LowRank(torch.zeros(5, 1), torch.zeros(7, 1))
        with pytest.raises(ArtifactMismatchError, match=r"the edit is for \(5, 7\), the model has \(32, 80\)"):
            replace(edit, updates={name: wrong}).attach(untouched)

    def test_overflow(self, model: nn.Module) -> None:
        edit = edit_of(model, 1)
        *_, last = edit.updates
        huge = LowRank(torch.full((32, 1), 300.0), torch.full((80, 1), 300.0))
        edit = replace(edit, updates={**edit.updates, last: huge})
        model.half()
        before = Snapshot(model)
        with pytest.raises(NonFiniteError, match=r"overflow torch\.float16; nothing was attached"):
            edit.attach(model)
        assert before.differences() == []
        assert attached(model) == ()

    def test_float64(self, model: nn.Module) -> None:
        edit = edit_of(model, 1)
        with pytest.raises(ArtifactMismatchError, match=r"weights are torch\.float64; edits attach to float32"):
            edit.attach(model.double())


def test_twice_is_refused_and_leaves_the_first(model: nn.Module) -> None:
    edit = edit_of(model, 1)
    with pytest.raises(EditStateError, match="not attached"):
        edit.revert(model)
    edit.attach(model)
    before = Snapshot(model)
    with pytest.raises(EditStateError, match="attached to the model already"):
        edit.attach(model)
    assert before.differences() == []
    edit.revert(model)
    with pytest.raises(EditStateError, match="not attached"):
        edit.revert(model)


def test_the_base_is_known_under_another_edit(model: nn.Module) -> None:
    first, second = edit_of(model, 1), edit_of(model, 2)
    foreign = edit_of(tiny_model(model.config.model_type, seed=1), 3)
    first.attach(model)
    second.attach(model)
    with pytest.raises(ArtifactMismatchError, match="other weights"):
        foreign.attach(model)
    with pytest.raises(ArtifactMismatchError, match="other weights"):
        edit_of(model, 4).attach(model)  # planned on the edited model, not on its base


@pytest.mark.parametrize("how", ["in-place", "past autograd", "swapped", "load_state_dict", "new data"])
def test_changes_by_others_are_not_overwritten(model: nn.Module, how: str) -> None:
    edit, other = edit_of(model, 1), edit_of(model, 2)
    edit.attach(model)
    name = next(iter(edit.updates))
    parameter = model.get_parameter(name)
    changed = parameter.detach() + 1
    if how == "in-place":
        with torch.no_grad():
            parameter += 1
    elif how == "past autograd":  # torch does not count this write
        parameter.data[3, 5] += 1e-3
    elif how == "swapped":
        with torch.no_grad():
            parameter.copy_(parameter.flip(0))
    elif how == "load_state_dict":
        model.load_state_dict({name: changed}, strict=False)
    else:
        parameter.data = changed
    before = Snapshot(model)
    for attempt in (lambda: edit.revert(model), lambda: other.attach(model)):
        with pytest.raises((EditStateError, ArtifactMismatchError), match="changed by something else"):
            attempt()
    assert before.differences() == []


def test_two_models_do_not_know_of_each_other() -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    edit = edit_of(first, 1)
    edit.attach(first)
    edit.attach(second)
    edit.revert(first)
    assert (attached(first), attached(second)) == ((), (edit,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_updates_that_are_not_finite_cannot_be_made(model: nn.Module, value: float) -> None:
    edit = edit_of(model, 1)
    (name, update), *_ = edit.updates.items()
    assert isinstance(update, LowRank)
    for bad in (
        LowRank(update.U, update.V * value),
        LowRank(update.U * value, update.V),
        Dense(update.matrix() * value),
    ):
        with pytest.raises(NonFiniteError, match=f"the update of {name}"):
            replace(edit, updates={name: bad})


# To and from a file.


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> tuple[WeightEdit, Path]:
    edit = edit_of(
        model,
        5,
        config={"layers": [0, 2], "rate": 0.5, "nested": {"a": None}},
        notes={"condition": 3.5},
        state={"keys/0": torch.randn(4, 3), "count": torch.tensor(7)},
    )
    (first, update), *_ = edit.updates.items()
    edit = replace(edit, updates={**edit.updates, first: Dense(update.matrix())})
    return edit, edit.save(tmp_path / "out")


def test_round_trip(model: nn.Module, saved: tuple[WeightEdit, Path], tmp_path: Path) -> None:
    edit, file = saved
    assert file == tmp_path / "out" / "edit.safetensors"
    for again in (load_edit(file), load_edit(file.parent), WeightEdit.load(str(file))):
        for field in ("base", "method", "transposed", "config", "requests", "seed", "notes", "created", "version"):
            assert getattr(again, field) == getattr(edit, field), field
        assert again.updates.keys() == edit.updates.keys()
        for name, update in edit.updates.items():
            assert type(again.updates[name]) is type(update)
            assert torch.equal(again.updates[name].matrix(), update.matrix())
        assert again.state.keys() == edit.state.keys()
        assert all(torch.equal(again.state[name], tensor) for name, tensor in edit.state.items())
    edit.attach(model)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    edit.revert(model)
    load_edit(file).attach(model)
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())
    assert edit.save(tmp_path / "named.safetensors") == tmp_path / "named.safetensors"


def test_damaged_files_are_refused(saved: tuple[WeightEdit, Path], tmp_path: Path) -> None:
    _, file = saved
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="truncated"):
        load_edit(file)
    flipped = bytearray(whole)
    flipped[-100] ^= 4
    file.write_bytes(flipped)
    with pytest.raises(ArtifactError, match="corrupt"):
        load_edit(file)
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(ArtifactError, match="without a kecore header; expected a kecore edit"):
        load_edit(file)
    files.write_tensors(file, "key-statistics", {"format": 1}, {})
    with pytest.raises(ArtifactError, match="expected a kecore edit, got a kecore key-statistics"):
        load_edit(file)
    files.write_tensors(file, "weight-edit", {"format": 99, "version": "7.0"}, {})
    with pytest.raises(ArtifactError, match=r"written by kecore 7\.0 in a newer format"):
        load_edit(file)
    with pytest.raises(ArtifactError, match="no such file"):
        load_edit(tmp_path / "nowhere")


def test_a_save_that_fails_leaves_the_old_file(saved: tuple[WeightEdit, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    edit, file = saved
    before = file.read_bytes()

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        replace(edit, seed=9).save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


# Several edits.


def test_a_merged_edit_does_what_its_parts_do_together(model: nn.Module) -> None:
    first = edit_of(model, 1, (0, 1), method="memit")
    second = edit_of(model, 2, (1, 2), method="rome")
    third = edit_of(model, 3, (2,), method="memit")
    third = replace(third, updates={n: Dense(u.matrix()) for n, u in third.updates.items()})
    for parts in ([first, second], [first, second, third]):
        whole = merge(parts)
        for part in parts:
            part.attach(model)
        wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
        for part in parts:
            part.revert(model)
        whole.attach(model)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-5, atol=1e-6)
        whole.revert(model)
        assert whole.method == "memit+rome"
        assert whole.requests == REQUESTS * len(parts)
    shared = next(n for n in first.updates if n in second.updates)
    assert merge([first, second]).updates[shared].rank == 6


def test_only_edits_of_one_base_merge(model: nn.Module) -> None:
    other = edit_of(tiny_model(model.config.model_type, seed=1), 2)
    with pytest.raises(ArtifactMismatchError, match="different base models"):
        merge([edit_of(model, 1), other])
    with pytest.raises(ArtifactError, match="no edits to merge"):
        merge([])


def test_an_edit_merges_neither_with_itself_nor_with_one_beside_the_weights(model: nn.Module, tmp_path: Path) -> None:
    edit = edit_of(model, 1)
    edit.save(tmp_path / "edit")
    for same in (edit, load_edit(tmp_path / "edit")):
        with pytest.raises(ArtifactError, match=r"edits 1 and 3 are the same edit by .*would double it"):
            merge([edit, edit_of(model, 2), same])
    beside = SimpleNamespace(method="grace")
    with pytest.raises(UnsupportedCapabilityError, match="edit 2, by 'grace', changes no weights"):
        merge([edit, beside])  # type: ignore[list-item]


def test_inspect(saved: tuple[WeightEdit, Path]) -> None:
    edit, file = saved
    seen = load_edit(file).inspect()
    assert seen["method"] == "test"
    assert seen["requests"] == [request.to_json() for request in REQUESTS]
    for name, update in edit.updates.items():
        assert seen["updates"][name]["shape"] == [32, 80]
        assert seen["updates"][name]["rank"] == (32 if isinstance(update, Dense) else 3)
        assert seen["updates"][name]["norm"] == pytest.approx(
            float(torch.linalg.matrix_norm(update.matrix())), rel=1e-5
        )
    assert seen["bytes"] == 4 * (32 * 80 + 3 * (32 + 80))
    assert json.loads(json.dumps(seen)) == seen


def test_diff(model: nn.Module) -> None:
    first = edit_of(model, 1, (0, 1))
    second = replace(edit_of(model, 2, (1, 2)), requests=REQUESTS[1:])
    seen = first.diff(second)
    assert seen["same_base"] is True
    assert seen["only_in_first"] == [REQUESTS[0].to_json()]
    assert seen["only_in_second"] == []
    names = sorted({*first.updates, *second.updates})
    assert seen["updates"][names[0]] == {"only_in": "first"}
    assert seen["updates"][names[2]] == {"only_in": "second"}
    a, b = first.updates[names[1]].matrix(), second.updates[names[1]].matrix()
    assert seen["updates"][names[1]]["distance"] == pytest.approx(float((a - b).norm()), rel=1e-5)
    cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    assert seen["updates"][names[1]]["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    same = first.diff(first)
    assert all(u == {"distance": 0.0, "cosine": pytest.approx(1.0)} for u in same["updates"].values())


def test_factors_that_outgrow_their_matrix_become_it() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(6, 4, generator=generator), torch.randn(10, 4, generator=generator)
    few, many = factored(u[:, :3], v[:, :3]), factored(u, v)
    assert (type(few), type(many)) == (LowRank, Dense)  # 48 numbers and 64, for 60
    torch.testing.assert_close(many.matrix(), u @ v.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_many_edits_and_their_reverts_give_the_base_back(dtype: torch.dtype, order: str) -> None:
    """Weights are always the base and the sum of float32 updates, rounded once: nothing drifts, whatever the order."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False)).to(dtype)
    identity = Identity(model)
    base, untouched = Fingerprint.of(identity, dtype), model[0].weight.data.clone()
    edits: list[WeightEdit] = []
    for number in range(120):
        factors = LowRank(torch.randn(8, 1, generator=generator), 0.1 * torch.randn(12, 1, generator=generator))
        edits.append(WeightEdit(updates={"0.weight": factors}, base=base, method="random", seed=number))
        edits[-1].attach(model, base=identity)
    total = untouched.float()
    for edit in edits:
        total = total + edit.updates["0.weight"].matrix()
    assert torch.equal(model[0].weight.data, total.to(dtype))
    going = edits[::-1] if order == "reverse" else [edits[i] for i in torch.randperm(120, generator=generator)]
    for edit in going:
        assert not torch.equal(model[0].weight.data, untouched)
        edit.revert(model)
    assert torch.equal(model[0].weight.data, untouched)


def test_edits_are_set_in_one_go_or_not_at_all() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 4, bias=False))
    base = Fingerprint.of(Identity(model), torch.float32)

    def factors(number: int, size: float = 1.0) -> LowRank:
        generator = torch.Generator().manual_seed(number)
        return LowRank(size * torch.randn(5, 1, generator=generator), size * torch.randn(6, 1, generator=generator))

    edits = [
        WeightEdit(updates={"0.weight": factors(number)}, base=base, method="random", seed=number)
        for number in range(4)
    ]
    for edit in edits[:3]:
        edit.attach(model)
    one_by_one = model[0].weight.data.clone()
    for edit in edits[:3]:
        edit.revert(model)
    set_edits(model, edits[:3])
    assert torch.equal(model[0].weight.data, one_by_one)
    assert attached(model) == tuple(edits[:3])
    too_large = WeightEdit(updates={"0.weight": factors(9, 1e22)}, base=base, method="random", seed=9)
    with pytest.raises(NonFiniteError):
        set_edits(model, [edits[3], too_large])
    with pytest.raises(EditStateError, match="given twice"):
        set_edits(model, [edits[3], edits[3]])
    assert torch.equal(model[0].weight.data, one_by_one)
    assert attached(model) == tuple(edits[:3])
    set_edits(model, ())
    assert Identity(model).of() == base.digests["float32"]
