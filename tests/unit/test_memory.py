"""Estimates of memory, and how a budget is kept: shapes against what autograd keeps, arithmetic against hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kecore import Corpus, Editor, EditRequest, KeyStatistics, memory
from kecore.api.errors import KecoreWarning, MemoryBudgetError
from kecore.memory import MemoryPlan, Need, backward_bytes, make_plan
from kecore.model import ModelView
from kecore.model.sites import Output, Start
from kecore.statistics import collect_statistics, collection_need
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Rows

MIB = 1 << 20
HELD = {"weights": 100 * MIB, "program": 50 * MIB}
SMALL = Need("small", {"part": 10 * MIB}, token=MIB, tokens=100, least=4)
LARGE = Need("large", {"part": 30 * MIB, "other": 20 * MIB}, token=2 * MIB, tokens=1000, least=8, mapped=("other",))


@pytest.fixture(scope="module")
def view() -> ModelView:
    return ModelView.of(tiny_model("llama"))


def plan(view: ModelView, budget: int | None, needs: Sequence[Need] = (SMALL, LARGE)) -> MemoryPlan:
    return make_plan(view, budget, needs, HELD)


class TestPlan:
    def test_a_budget_is_shared_by_the_stages(self, view: ModelView) -> None:
        found = plan(view, 300 * MIB)
        assert found.activations == 84 * MIB  # 0.85 of what the large stage leaves, 300 - 150 - 50, in tokens of 2
        assert [need.micro_batch(found.activations) for need in found.needs] == [84, 42]
        assert [found.peak(need) // MIB for need in found.needs] == [150 + 10 + 84, 150 + 50 + 84]

    @pytest.mark.parametrize("budget", range(216, 3000, 97))
    def test_every_stage_keeps_within_it(self, view: ModelView, budget: int) -> None:
        found = plan(view, budget * MIB)
        assert max(found.peak(need) for need in found.needs) <= budget * MIB
        assert all(need.micro_batch(found.activations) >= need.least for need in found.needs)

    def test_too_little_is_refused_and_named(self, view: ModelView) -> None:
        assert plan(view, (150 + 50 + 16) * MIB).activations == 12 * MIB
        with pytest.raises(MemoryBudgetError) as error:
            plan(view, (150 + 50 + 16) * MIB - 1)
        for words in ("'large'", "216 MiB", "weights 100 MiB", "program 50 MiB", "part 30 MiB", "of 8 tokens 16 MiB"):
            assert words in str(error.value)
        with pytest.raises(MemoryBudgetError, match="weights 100 MiB"):
            plan(view, 149 * MIB, ())

    def test_without_a_budget_what_is_free_counts(self, view: ModelView, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "resident_bytes", lambda _: 160 * MIB)
        monkeypatch.setattr(memory, "free_bytes", lambda _: 400 * MIB)
        found = plan(view, None)
        assert found.budget == (160 + 300) * MIB
        assert found.activations == 220 * MIB  # of 460 - 150 - 50
        monkeypatch.setattr(memory, "free_bytes", lambda _: 8 * MIB)
        with pytest.warns(KecoreWarning, match="'large' needs 216 MiB at the least, 66 MiB of them still to come"):
            assert plan(view, None).activations == 1
        monkeypatch.setattr(memory, "free_bytes", lambda _: None)
        assert plan(view, None).budget is None

    def test_more_than_enough_is_not_taken_on_a_cpu(self, view: ModelView) -> None:
        assert plan(view, 1 << 40).activations == 2 << 30

    def test_as_json(self, view: ModelView) -> None:
        values = plan(view, 300 * MIB).to_json()
        assert values["held"] == HELD
        assert values["stages"][1] == {
            "stage": "large",
            "parts": {"part": 30 * MIB, "other": 20 * MIB},
            "mapped": ["other"],
            "micro_batch_tokens": 42,
            "tokens": 1000,
            "peak_bytes": 284 * MIB,
        }


def test_what_is_held_is_weights_and_program(view: ModelView) -> None:
    found = memory.measure_held(view)
    assert found["weights"] == sum(4 * p.numel() for p in view.model.parameters()) + sum(
        b.numel() * b.element_size() for b in view.model.buffers()
    )
    assert found["program"] > 50 * MIB  # torch alone


def test_free_memory_is_no_more_than_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    free = memory.free_bytes(cpu)
    monkeypatch.setattr(memory, "_group_limit", lambda: [7 * MIB])
    assert memory.free_bytes(cpu) == 7 * MIB
    assert free is None or free > 7 * MIB


def kept(view: ModelView, layer: int) -> float:
    """Bytes that autograd keeps for each token and a pass through the layers above ``layer``."""
    rows, width = 4, 16
    ids = torch.randint(5, 100, (rows, width), generator=torch.Generator().manual_seed(0))
    tokens = Rows(ids, torch.ones_like(ids), torch.zeros(rows, dtype=torch.long))
    weights = {p.untyped_storage().data_ptr() for p in view.model.parameters()}
    stored: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with view.frozen():
        with torch.no_grad():
            hidden = view.run(tokens, taps=[Output(layer)], last=layer)[Output(layer)]
        hidden = hidden.clone().requires_grad_(True)
        at = torch.arange(rows), torch.full((rows,), width - 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            view.run(tokens, first=Start(layer + 1, hidden), at=at)
    return sum(stored.values()) / (rows * width)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "qwen3", "gemma2", "opt", "bloom", "granite"])
def test_activations_are_estimated_within_a_factor_of_four(architecture: str) -> None:
    """From above: what is not kept is room for what comes and goes in between."""
    view = ModelView.of(tiny_model(architecture))
    assert 0.25 < kept(view, 1) / backward_bytes(view, 1) < 1.0


def test_half_precision_takes_half(view: ModelView) -> None:
    assert (
        backward_bytes(view, 1, torch.bfloat16) * 2 == backward_bytes(view, 1) == backward_bytes(view, 1, torch.float32)
    )


# In a session.

FACTS = [
    EditRequest("{} is in the city of", "The tower", "Rome", "Paris"),
    EditRequest("The mother tongue of {} is", "Anna", "French and Italian", "English"),
]
FAST = {"steps": 3, "contexts": 2, "context_tokens": 2}


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> KeyStatistics:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"The tower number {i} is in the city of Paris, and Anna speaks it." for i in range(400)))
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    return collect_statistics(editor.view, editor.encoder, Corpus.of(text), range(4), tokens=4000)


def session(statistics: KeyStatistics, budget: int | None = None) -> Editor:
    return Editor(tiny_model("llama"), tiny_tokenizer(), statistics=statistics, memory=budget)


@pytest.mark.parametrize("method", ["memit", "rome", "alphaedit", "emmet", "ft-m"])
def test_a_preflight_names_the_stages(statistics: KeyStatistics, method: str) -> None:
    editor = session(statistics)
    found = editor.preflight(FACTS, method, **({} if method == "ft-m" else FAST))
    stages = [need.stage for need in found.needs]
    assert stages == (["tune"] if method == "ft-m" else ["values", "keys", "solve"])
    assert found.budget is not None
    assert all(0 < need.micro_batch(found.activations) <= need.tokens for need in found.needs if need.token)
    assert all(size >= 0 for need in found.needs for size in need.parts.values())
    assert editor.history == ()


def test_more_facts_need_more_and_bfloat16_needs_a_copy(statistics: KeyStatistics) -> None:
    editor = session(statistics)
    one, two = (editor.preflight(FACTS[:n], "memit", **FAST).needs for n in (1, 2))
    assert all(b.fixed + b.token * b.tokens >= a.fixed + a.token * a.tokens for a, b in zip(one, two, strict=True))
    half = editor.preflight(FACTS, "memit", **FAST, precision="bfloat16").needs[0]
    copied = half.parts["weights in bfloat16"]
    assert copied == 2 * sum(p.numel() for p in editor.model.parameters())


def test_a_budget_that_cannot_hold_the_model_is_refused_at_once(statistics: KeyStatistics) -> None:
    with pytest.raises(MemoryBudgetError, match=r"budget of 1 MiB is too small.*weights \d+ MiB|program"):
        session(statistics, MIB)


def test_a_tight_budget_makes_smaller_micro_batches_of_the_same_edit(statistics: KeyStatistics) -> None:
    free = session(statistics)
    roomy = free.edit(FACTS, "memit", **FAST)
    needs = free.preflight(FACTS, "memit", **FAST).needs
    least = max(need.bytes(0) for need in needs)
    editor = session(statistics)
    budget = sum(editor.memory_plan(()).held.values()) + least
    editor.memory = budget
    tight = editor.preflight(FACTS, "memit", **FAST)
    assert tight.activations < free.preflight(FACTS, "memit", **FAST).activations
    edit = editor.edit(FACTS, "memit", **FAST)
    for name, update in edit.updates.items():
        torch.testing.assert_close(update.matrix(), roomy.updates[name].matrix(), rtol=1e-3, atol=1e-5)
    editor.memory = budget - 1
    with pytest.raises(MemoryBudgetError):
        editor.edit(FACTS, "memit", **FAST)
    assert len(editor.history) == 1


def test_statistics_need_their_sums_and_a_row(view: ModelView) -> None:
    found = collection_need(view, [0, 2], 10_000)
    assert found.parts["sums"] == 2 * 8 * 80 * 80
    assert (found.tokens, found.least) == (2048, 256)  # a row is no longer than the model's context


def tensors(value: Any, seen: dict[int, int]) -> None:
    """Storage and size of every tensor that an object holds."""
    if isinstance(value, Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            tensors(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            tensors(item, seen)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            tensors(getattr(value, name), seen)


@pytest.mark.parametrize(("method", "options"), [("memit", {}), ("memit", {"accumulate": True}), ("alphaedit", {})])
@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_a_sequence_of_edits_grows_by_its_factors_and_keys_alone(
    statistics: KeyStatistics, method: str, options: dict[str, Any]
) -> None:
    """Nothing of the size of a matrix is kept for each edit, and no edit keeps another copy of what came before."""
    editor = session(statistics)
    grown: list[int] = []
    for i in range(6):
        editor.edit(EditRequest("{} is in the city of", f"Tower {chr(65 + i)}", "Rome"), method, **FAST, **options)
        seen: dict[int, int] = {}
        tensors([editor.history, editor._states], seen)
        grown.append(sum(seen.values()))
    layers = len(editor.history[0].edit.updates)
    columns = FAST["contexts"] + 1
    # Factors of one value, a key for each context, and a few numbers, in float32 at each layer; keys may be views of a
    # larger tensor.
    bound = layers * (4 * (80 + 32) + 2 * columns * (4 * 80 + 16) + 64)
    steps = [b - a for a, b in pairwise(grown)]
    assert max(steps) <= bound, (steps, bound)
    assert max(steps) < layers * 4 * 80 * 80
