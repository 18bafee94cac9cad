"""WISE: merging against a loop over entries, routing against a loop over rows, and what an edit leaves alone."""

from __future__ import annotations

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
from torch import Tensor

from kecore import Editor, EditRequest, ModuleEdit
from kecore.api.errors import ConfigError
from kecore.edit import suspended
from kecore.engine.tuning import Targets
from kecore_methods.memory.side_memories import SideMemories, ties
from kecore_methods.memory.wise import Wise

THIRD = EditRequest("The mother tongue of {} is", "Léon Blum", "Danube")
FAR = ("Where does the Danube", "It flows to the")
CONFIG: dict[str, Any] = {"steps": 12, "contexts": 1, "context_tokens": 3, "irrelevant": 4}


@pytest.fixture
def editor() -> Editor:
    return opened()


def ties_by_hand(vectors: list[list[float]], density: float) -> list[float]:
    """Trim, elect, merge: one entry at a time."""
    kept = max(1, round(density * len(vectors[0])))
    trimmed = []
    for vector in vectors:
        least = sorted((abs(x) for x in vector), reverse=True)[kept - 1]
        trimmed.append([x if abs(x) >= least else 0.0 for x in vector])
    merged = []
    for entries in zip(*trimmed, strict=True):
        total = sum(entries)
        agree = [x for x in entries if x * total > 0]
        merged.append(sum(agree) / len(agree) if agree else 0.0)
    return merged


@pytest.mark.parametrize("density", [0.01, 0.4, 1.0])
def test_ties_is_its_algorithm(density: float) -> None:
    vectors = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vectors[1] *= vectors[1].abs() > 0.8  # as sparse as a shard
    wanted = ties_by_hand(vectors.flatten(1).tolist(), density)
    assert torch.allclose(ties(vectors, density).flatten(), torch.tensor(wanted, dtype=torch.float64))


def test_routing_is_by_the_largest_activation_so_far() -> None:
    """Every token against eq. 3 and 6 worked out for it alone, from the tokens of its row up to it."""
    generator = torch.Generator().manual_seed(0)
    model, side = Toy(), SideMemories("lm", 3, 4, 3)
    side.deltas.copy_(torch.randn(3, 4, 3, generator=generator))
    side.thresholds.copy_(torch.tensor([4.9, 5.0, 5.1]))
    x = torch.randn(12, 5, 3, generator=generator)
    mask = torch.ones(12, 5, dtype=torch.long)
    mask[0, :2] = mask[1, 4:] = 0
    x[0, :2] = 100.0  # padding that would take the row
    plain = model(inputs_embeds=x, attention_mask=mask)
    with side.on(model):
        found = model(inputs_embeds=x, attention_mask=mask)
    taken: set[int] = set()
    for row in range(12):
        for column in range(5):
            if not mask[row, column]:
                continue
            scores = [
                max(float((x[row, c] @ delta.t()).norm()) / float(limit) for c in range(column + 1) if mask[row, c])
                for delta, limit in zip(side.deltas, side.thresholds, strict=True)
            ]
            best = max(range(3), key=scores.__getitem__)
            if scores[best] > 1:
                taken.add(best)
                wanted = plain[row, column] + side.deltas[best] @ x[row, column]
                assert torch.allclose(found[row, column], wanted, atol=1e-5)
            else:
                taken.add(-1)
                assert torch.equal(found[row, column], plain[row, column])
    assert taken == {-1, 0, 1, 2}


def test_texts_below_the_threshold_are_bitwise_as_they_were(editor: Editor) -> None:
    before, own = [logits(editor, text) for text in FAR], logits(editor, FACT.text)
    edit = editor.edit(FACT, Wise, **CONFIG)
    assert isinstance(edit, ModuleEdit)
    assert isinstance(edit.effect, SideMemories)
    assert all(torch.equal(logits(editor, text), old) for text, old in zip(FAR, before, strict=True))
    assert not torch.equal(logits(editor, FACT.text)[:, -1], own[:, -1])
    share = float((edit.effect.deltas != 0).float().mean())
    assert share == pytest.approx(0.2, abs=0.03)


def test_batches_score_as_single_prompts_do(editor: Editor) -> None:
    editor.edit([FACT, OTHER], Wise, shard_edits=1, **CONFIG)
    scores_batches_as_single_prompts(editor, (FACT.text, *FAR, f"Where? {OTHER.text}", OTHER.text))


def test_writing_with_a_cache_is_writing_without_one(editor: Editor) -> None:
    editor.edit([FACT, OTHER], Wise, shard_edits=1, **CONFIG)
    writes_with_a_cache_as_without(editor, [FACT.text, OTHER.text, FAR[0]])


def test_what_is_trained_is_what_will_act(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens before the subject's last stay below the threshold, so the side memory is trained without them."""
    given: list[Any] = []
    loss = Targets.loss
    monkeypatch.setattr(Targets, "loss", lambda batch, add: given.append((batch, add)) or loss(batch, add))
    editor.edit(THIRD, "wise", **CONFIG | {"contexts": 0, "steps": 2})
    batch, add = given[-1]
    (change,) = add.values()
    item = editor.encoder.encode(THIRD.text, THIRD.target)
    first = item.last_token_of(THIRD.subject_span)
    assert first > 0
    keys = torch.randn(1, batch.rows.input_ids.shape[1], editor.view.layers[0].site.linear.d_in)
    acting = change(keys).norm(dim=-1)[0] > 0
    assert acting.tolist() == [column >= first for column in range(len(acting))]


def by_hand(editor: Editor, side: SideMemories, text: str) -> tuple[set[int], Tensor]:
    """Algorithm 2 for one text, token by token: which memories took tokens, and the logits of the model without hooks.

    The output of the layer's value projection is put in the place of the model's own, one vector a token.
    """
    ids = torch.tensor([editor.encoder.encode(text).ids])
    projection = editor.model.get_submodule(side.place)
    given: list[Tensor] = []
    with torch.no_grad(), suspended(editor.model):
        handle = projection.register_forward_hook(lambda _m, args, out: given.extend((args[0][0], out[0])))
        editor.model(input_ids=ids, use_cache=False)
        handle.remove()
        keys, out = given[0], given[1].clone()
        best, best_score, taken = -1, 1.0, set[int]()  # the largest activation so far, in units of the threshold
        for column, key in enumerate(keys):
            for memory, (delta, limit) in enumerate(zip(side.deltas, side.thresholds, strict=True)):
                score = float((delta @ key).norm() / limit)
                if score > best_score:
                    best, best_score = memory, score
            if best >= 0:
                out[column] += side.deltas[best] @ key
            taken.add(best)
        handle = projection.register_forward_hook(lambda *_: out[None])
        logits = editor.model(input_ids=ids, use_cache=False).logits
        handle.remove()
    return taken, logits


@pytest.mark.parametrize(("mode", "memories"), [("retrieve", 3), ("merge", 2)])
def test_full_shards_are_merged_and_others_begun(editor: Editor, mode: str, memories: int) -> None:
    """Five edits, one a shard, two shards a memory: the merged ones are TIES of what was there before.

    What the model says then is what Algorithm 2 says, worked out by hand with these memories.
    """
    setup = {**CONFIG, "shard_edits": 1, "shards": 2, "mode": mode}
    effects: list[SideMemories] = []
    for i, request in enumerate((FACT, OTHER, THIRD, FACT, OTHER)):
        target = ("Rome", "Paris", "French", "Berlin", "Apple")[i]
        edit = editor.edit(EditRequest(request.prompt, request.subject, target), Wise, **setup)
        assert isinstance(edit, ModuleEdit)
        assert isinstance(edit.effect, SideMemories)
        effects.append(edit.effect)
    assert [len(effect.deltas) for effect in effects] == [1, 2, 2, 3, memories]
    first = ties(effects[1].deltas, 0.53)
    assert torch.equal(effects[2].deltas[0], first)
    shards = effects[3].deltas if mode == "merge" else effects[3].deltas[1:]
    assert torch.equal(effects[4].deltas[memories - 2], ties(shards, 0.53))
    assert all(math.isfinite(float(limit)) and float(limit) > 0 for limit in effects[4].thresholds)
    asked: set[int] = set()
    for text in (FACT.text, OTHER.text, THIRD.text, *FAR):
        taken, wanted = by_hand(editor, effects[4], text)
        found = logits(editor, text)
        assert torch.allclose(found, wanted, atol=1e-4)
        asked |= taken
    assert {-1, memories - 2} <= asked, "neither a text beyond the memories nor one that what was merged last takes"


def test_other_layer_of_a_session_is_refused(editor: Editor) -> None:
    editor.edit(FACT, Wise, layer=1, **CONFIG)
    with pytest.raises(ConfigError, match="at layer 1, not 2"):
        editor.edit(OTHER, Wise, layer=2, **CONFIG)


def test_no_weight_changes_by_more_than_the_bound(editor: Editor) -> None:
    """EasyEdit cuts a shard to within its ``norm_constraint`` of the weight; two edits of a shard share the bound."""
    bound = 1e-3
    config = {**CONFIG, "optimizer": "sgd", "learning_rate": 1.0, "norm_constraint": bound, "absolute_margins": True}
    free = {**config, "norm_constraint": None, "about_others": False}
    with editor:
        editor.edit(FACT, "wise", **config)
        edit = editor.edit(OTHER, "wise", **config)
    with editor:
        unbounded = editor.edit(FACT, "wise", **free)
    assert isinstance(edit, ModuleEdit)
    assert isinstance(unbounded, ModuleEdit)
    assert 0.99 * bound < float(edit.effect.deltas.abs().max()) <= bound * (1 + 1e-6)
    assert float(unbounded.effect.deltas.abs().max()) > bound
