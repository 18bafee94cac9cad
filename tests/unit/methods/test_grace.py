"""GRACE against a codebook written out by hand, and its answers in batches, with padding, and while writing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from memory_setting import (
    FACT,
    OTHER,
    Toy,
    logits,
    opened,
    scores_batches_as_single_prompts,
    writes_with_a_cache_as_without,
)

from kecore import Editor, EditRequest, ModuleEdit
from kecore.api.errors import ConfigError
from kecore.engine.passes import Passes
from kecore.engine.tuning import Targets
from kecore.inference import score_continuations
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_methods.memory.grace import Codebook, Entries, Grace

NEIGHBOURS = ("The capital of France is", "The iPhone", "Where does the Danube")
CONFIG: dict[str, Any] = {"steps": 15}


@pytest.fixture
def editor() -> Editor:
    return opened()


def by_hand(queries: list[tuple[list[float], str]], radius: float) -> list[dict[str, Any]]:
    """Algorithm 1 of the paper, with lists and one entry at a time."""
    book: list[dict[str, Any]] = []
    for key, label in queries:
        new = {"key": key, "radius": radius, "label": label}
        if not book:
            book.append(new)
            continue
        near = min(book, key=lambda entry: math.dist(entry["key"], key))
        d = math.dist(near["key"], key)
        if d > near["radius"] + radius:
            book.append(new)
        elif near["label"] == label:
            near["radius"] = max(near["radius"], 1.01 * d)
        elif d <= 0.1 * radius:
            near["label"] = label
        else:
            near["radius"] = min(near["radius"], d / 2)
            book.append({**new, "radius": d / 2})
    return book


def test_rules_are_those_of_the_algorithm() -> None:
    generator = torch.Generator().manual_seed(3)
    points = (torch.rand(60, 2, generator=generator) * 4).tolist()
    points += points[:5]  # asked again, most with another label
    queries = [(point, "abc"[i % 3]) for i, point in enumerate(points)]
    entries, rules = Entries.empty(2, 4), []
    for key, label in queries:
        rules.append(entries.make_room(torch.tensor(key), [ord(label)], 0.3)[0])
    assert set(rules) == {"new", "expand", "split", "replace"}
    wanted = by_hand(queries, 0.3)
    assert torch.allclose(entries.keys, torch.tensor([entry["key"] for entry in wanted]))
    assert torch.allclose(entries.radii, torch.tensor([entry["radius"] for entry in wanted]), atol=1e-6)
    assert entries.labels.flatten().tolist() == [ord(entry["label"]) for entry in wanted]


def test_labels_of_different_length_differ() -> None:
    entries = Entries.empty(2, 4)
    assert entries.make_room(torch.tensor([0.0, 0.0]), [7], 1.0) == ("new", 0)
    assert entries.make_room(torch.tensor([1.0, 0.0]), [7, 8], 1.0) == ("split", 1)
    assert entries.labels.tolist() == [[7, -1], [7, 8]]
    assert entries.radii.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_values_stand_where_the_mode_says(replace: Any) -> None:
    """Each token's output against a loop over rows, tokens and entries; the padding holds a key and is left alone."""
    width = 6
    model = Toy()
    book = Codebook("lm", 2, 3, 4, 1, replace)
    book.keys.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    book.radii.copy_(torch.tensor([0.2, 0.1]))
    book.values.copy_(torch.arange(8.0).reshape(2, 4))
    x = torch.randn(3, width, 3, generator=torch.Generator().manual_seed(0)) + 3
    mask = torch.ones(3, width, dtype=torch.long)
    x[0, 3], x[0, 4] = torch.tensor([1.0, 0.1, 0]), torch.tensor([0.0, 1.05, 0])
    x[1, 2], x[1, 0], mask[1, 0] = torch.tensor([0.0, 1, 0]), torch.tensor([1.0, 0, 0]), 0
    plain = model(inputs_embeds=x, attention_mask=mask)
    with book.on(model):
        found = model(inputs_embeds=x, attention_mask=mask)
        assert torch.equal(found, model(x, mask))  # arguments without their names
    wanted = plain.clone()
    for row, tokens in enumerate(x):
        decided: tuple[int, int] | None = None
        for column, token in enumerate(tokens):
            for entry in range(2):
                inside = math.dist(token, book.keys[entry]) <= float(book.radii[entry])
                if inside and mask[row, column]:
                    if replace == "last":
                        wanted[row, column] = book.values[entry]
                    decided = decided or (entry, column)
        if decided and replace != "last":
            until = decided[1] + 1 if replace == "prompt" else width
            for column in range(until):
                if mask[row, column]:
                    wanted[row, column] = book.values[decided[0]]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gemma2"])
def test_prompts_out_of_scope_are_bitwise_as_they_were(architecture: str) -> None:
    editor = Editor(tiny_model(architecture), tiny_tokenizer("llama-like" if architecture == "gemma2" else "byte-bpe"))
    before = [logits(editor, text) for text in NEIGHBOURS]
    own = logits(editor, FACT.text)
    editor.edit(FACT, Grace, **CONFIG)
    assert all(torch.equal(logits(editor, text), old) for text, old in zip(NEIGHBOURS, before, strict=True))
    after = logits(editor, FACT.text)
    assert torch.equal(after[:, :-1], own[:, :-1])
    assert not torch.equal(after[:, -1], own[:, -1])


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_batches_score_as_single_prompts_do(editor: Editor, replace: str) -> None:
    editor.edit([FACT, OTHER], Grace, replace=replace, **CONFIG)
    scores_batches_as_single_prompts(editor, (FACT.text, *NEIGHBOURS, f"Where? {OTHER.text}", OTHER.text))


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_writing_with_a_cache_is_writing_without_one(editor: Editor, replace: str) -> None:
    """Greedy text in a left-padded batch with a cache, against a full pass for every token."""
    editor.edit([FACT, OTHER], Grace, replace=replace, **CONFIG)
    writes_with_a_cache_as_without(editor, [FACT.text, OTHER.text, NEIGHBOURS[1]])


def test_state_carries_the_codebook_from_edit_to_edit(editor: Editor) -> None:
    first = editor.edit(FACT, Grace, **CONFIG)
    alone = score_continuations(editor.view, editor.encoder, [(FACT.text, FACT.target)])[0].mean
    second = editor.edit(OTHER, Grace, **CONFIG)
    assert isinstance(first, ModuleEdit)
    assert isinstance(second, ModuleEdit)
    assert [edit.notes["entries"] for edit in (first, second)] == [1, 2]
    assert score_continuations(editor.view, editor.encoder, [(FACT.text, FACT.target)])[0].mean == alone
    editor.revert()
    third = editor.edit(OTHER, Grace, **CONFIG)
    assert isinstance(third, ModuleEdit)
    pairs = zip(itertools.chain(second.effect.tensors().values()), third.effect.tensors().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_prompt_that_is_edited_again_changes_its_entry(editor: Editor) -> None:
    editor.edit(FACT, Grace, **CONFIG)
    again = editor.edit(EditRequest(FACT.prompt, FACT.subject, "Berlin"), Grace, **CONFIG)
    assert again.notes["rules"] == ["replace"]
    assert again.notes["entries"] == 1
    scores = score_continuations(editor.view, editor.encoder, [(FACT.text, "Berlin"), (FACT.text, FACT.target)])
    assert scores[0].mean > scores[1].mean


def test_an_entry_that_expands_goes_on_from_its_value_with_the_new_prompt_alone(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the released code has it: one value for both prompts, and only the new one in the loss."""
    wide: dict[str, Any] = {**CONFIG, "radius": 1e3}
    trained: list[int] = []
    loss = Targets.loss
    monkeypatch.setattr(Targets, "loss", lambda batch: trained.append(len(batch.rows.input_ids)) or loss(batch))
    first = editor.edit(FACT, Grace, **wide)
    same = EditRequest(OTHER.prompt, OTHER.subject, FACT.target)
    still = editor.edit(same, Grace, **wide, learning_rate=1e-9)
    assert isinstance(first, ModuleEdit)
    assert isinstance(still, ModuleEdit)
    assert still.notes["rules"] == ["expand"]
    assert still.notes["entries"] == 1
    assert torch.allclose(still.effect.tensors()["values"], first.effect.tensors()["values"], atol=1e-6)
    editor.revert()
    moved = editor.edit(same, Grace, **wide)
    assert isinstance(moved, ModuleEdit)
    assert not torch.allclose(moved.effect.tensors()["values"], first.effect.tensors()["values"], atol=1e-2)
    assert set(trained) == {1}


def test_other_layer_of_a_session_is_refused(editor: Editor) -> None:
    editor.edit(FACT, Grace, layer=1, **CONFIG)
    with pytest.raises(ConfigError, match="at layer 1, not 2"):
        editor.edit(OTHER, Grace, layer=2, **CONFIG)


def test_pass_that_was_stopped_leaves_nothing_behind(editor: Editor) -> None:
    """Its mask must not be taken for that of a layer that is called on its own afterwards."""
    passes = Passes(editor.model)
    seen: list[bool] = []
    layer = editor.view.layers[0].module
    passes.handles.append(layer.register_forward_hook(lambda *_: seen.append(passes.mask is not None)))
    rows = editor.encoder.rows([editor.encoder.encode(FACT.text).ids])
    editor.view.run(rows, last=0)
    assert seen == [True]
    assert passes.mask is None
    for handle in passes.handles:
        handle.remove()


@pytest.mark.real_model
def test_real_neighbours_are_bitwise_as_they_were(smollm2: tuple[Any, Any]) -> None:
    """The first record of CounterFact: other subjects, and a paraphrase, which GRACE takes for one as well."""
    editor = Editor(*smollm2)
    fact = EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English")
    texts = (
        "The mother tongue of Léon Blum is",
        "The native language of Montesquieu is",
        "Jacques Chaban-Delmas is a native speaker of",
        "Danielle Darrieux, a native",
    )
    before = [logits(editor, text) for text in texts]
    with editor:
        editor.edit(fact, Grace)
        assert all(torch.equal(logits(editor, text), old) for text, old in zip(texts, before, strict=True))
        assert score_continuations(editor.view, editor.encoder, [(fact.text, "English")])[0].exact
