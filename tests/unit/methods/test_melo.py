"""MELO: look-ups against a loop, the database's rules by hand, and what lies outside every cluster."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from memory_setting import (
    FACT,
    FAR,
    OTHER,
    logits,
    mean,
    opened,
    scores_batches_as_single_prompts,
    writes_with_a_cache_as_without,
)
from torch import Tensor, nn

from kecore import Editor, EditRequest, ModuleEdit
from kecore.api.errors import ConfigError
from kecore.engine import contexts
from kecore.inference import score_continuations
from kecore.model.sites import Key
from kecore.text import join_context
from kecore_methods.memory.dynamic_lora import Clusters, DynamicLora
from kecore_methods.memory.melo import Melo

SAME = EditRequest("A river in {} is the", "Italy", "Danube")
CONFIG: dict[str, Any] = {"steps": 25, "relative_radius": 0.2, "contexts": 0}


@pytest.fixture
def editor() -> Editor:
    return opened()


def effect(edit: Any) -> DynamicLora:
    assert isinstance(edit, ModuleEdit)
    assert isinstance(edit.effect, DynamicLora)
    return edit.effect


class Toy(nn.Module):
    """Two linear maps that are called as a causal language model is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return self.second(self.first(inputs_embeds))


def test_block_of_the_latest_hit_is_active() -> None:
    """Every token but a row's first against the loop: nearest cluster, nearest key in it, the last hit so far."""
    generator = torch.Generator().manual_seed(0)
    model = Toy()
    side = DynamicLora("first", ["second"], [(4, 3)], 3, 5, 2, 2, 3)
    for tensor in side.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    side.radii.copy_(torch.tensor([1.3, 1.2, 1.4]))
    side.owner.copy_(torch.tensor([0, 0, 1, 2, 2]))
    side.block.copy_(torch.tensor([0, 1, 1, 0, 0]))
    x = torch.randn(16, 7, 3, generator=generator)
    mask = torch.ones(16, 7, dtype=torch.long)
    mask[0, :3] = 0
    x[0, :3] = side.centres[0]  # padding that would be a hit
    plain = model(x, mask)
    with side.on(model):
        found = model(inputs_embeds=x, attention_mask=mask)
    seen: set[int | None] = set()
    inner = model.first(x)
    for row in range(16):
        active: int | None = None
        for column in range(7):
            key = x[row, column]
            cluster = min(range(3), key=lambda i: math.dist(key, side.centres[i]))
            asked = mask[row, column] and mask[row, :column].any()
            if asked and math.dist(key, side.centres[cluster]) <= float(side.radii[cluster]):
                members = [i for i in range(5) if int(side.owner[i]) == cluster]
                active = int(side.block[min(members, key=lambda i: math.dist(key, side.keys[i]))])
            seen.add(active)
            if active is None:
                assert torch.equal(found[row, column], plain[row, column])
            else:
                more = side.up0[active] @ (side.down0[active] @ inner[row, column])
                assert torch.allclose(found[row, column], plain[row, column] + more, atol=1e-5)
    assert seen == {None, 0, 1}


def by_hand(entries: list[tuple[list[float], str]], radius: float) -> list[dict[str, Any]]:
    """The rules with lists and one cluster at a time."""
    book: list[dict[str, Any]] = []
    for key, label in entries:
        new = {"centre": key, "radius": radius, "label": label, "keys": [key]}
        near = min(book, key=lambda cluster: math.dist(cluster["centre"], key), default=None)
        own = min((math.dist(k, key), i) for i, c in enumerate(book) for k in c["keys"]) if book else (math.inf, 0)
        if own[0] <= 0.1 * radius:
            book[own[1]]["label"] = label
        elif near is None or (d := math.dist(near["centre"], key)) > near["radius"]:
            book.append(new)
        elif near["label"] == label:
            near["keys"].append(key)
        else:
            near["radius"] = d / 2
            book.append({**new, "radius": d / 2})
    return book


def test_database_follows_its_rules() -> None:
    generator = torch.Generator().manual_seed(3)
    points = (torch.rand(40, 2, generator=generator) * 5).tolist()
    points += points[:4]  # asked again, most with another label
    entries = [(point, "abc"[i % 3]) for i, point in enumerate(points)]
    clusters = Clusters.empty(2)
    rules = [clusters.put(torch.tensor(key), [ord(label)], 0.9, i) for i, (key, label) in enumerate(entries)]
    assert set(rules) == {"new", "join", "split", "replace"}
    wanted = by_hand(entries, 0.9)
    assert torch.allclose(clusters.centres, torch.tensor([c["centre"] for c in wanted]), atol=1e-5)
    assert torch.allclose(clusters.radii, torch.tensor([c["radius"] for c in wanted]), atol=1e-5)
    assert clusters.labels.flatten().tolist() == [ord(c["label"]) for c in wanted]
    assert clusters.block[:4].tolist() == [40, 41, 42, 43]


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gemma2"])
def test_texts_outside_every_cluster_are_bitwise_as_they_were(architecture: str) -> None:
    editor = opened(architecture)
    before, own = [logits(editor, text) for text in FAR], logits(editor, FACT.text)
    column = editor.encoder.encode(FACT.text).last_token_of(FACT.subject_span)
    editor.edit(FACT, Melo, **CONFIG)
    assert all(torch.equal(logits(editor, text), old) for text, old in zip(FAR, before, strict=True))
    after = logits(editor, FACT.text)
    assert torch.equal(after[:, :column], own[:, :column])
    assert all(not torch.equal(after[:, i], own[:, i]) for i in range(column, own.shape[1]))


def test_keys_are_those_of_the_subject_alone_and_behind_prefixes(editor: Editor) -> None:
    """The mean over the prefixes, then that of the bare prompt, each read from a pass of its own."""
    written = contexts.sample(editor.view, editor.encoder, 3, 4, 0)
    keys: list[Tensor] = []
    for prefix in written:
        text = join_context(prefix, FACT.text)
        end = text.index(FACT.subject) + len(FACT.subject)
        item = editor.encoder.encode(text)
        column = max(i for i, (begin, _) in enumerate(item.spans) if begin < end)
        found = editor.view.run(editor.encoder.rows([item.ids]), taps=[Key(1)])[Key(1)]
        keys.append(found[0, column])
    edit = editor.edit(FACT, Melo, **{**CONFIG, "contexts": 3, "context_tokens": 4, "layer": 1})
    wanted = torch.stack([torch.stack(keys[1:]).mean(0), keys[0]])
    assert torch.allclose(effect(edit).keys, wanted, atol=1e-5)
    assert torch.equal(effect(edit).centres, effect(edit).keys)
    assert torch.allclose(effect(edit).radii, 0.2 * wanted.norm(dim=1))


def test_subject_that_opens_the_text_is_in_scope(editor: Editor) -> None:
    """The first token of a text is not asked, so the key stands behind it."""
    editor = opened("gpt2")
    fact = EditRequest("{} is in the city of", "a", "Berlin")
    assert editor.encoder.encode(fact.text).last_token_of(fact.subject_span) == 0
    before, own = [logits(editor, text) for text in FAR], mean(editor, fact)
    editor.edit(fact, Melo, **CONFIG)
    assert mean(editor, fact) > own + 1
    assert all(torch.equal(logits(editor, text), old) for text, old in zip(FAR, before, strict=True))


def test_edits_of_a_batch_share_blocks(editor: Editor) -> None:
    """Three edits, two a block, and all of them take effect."""
    requests = (FACT, OTHER, SAME)
    before = [mean(editor, request) for request in requests]
    edit = editor.edit(requests, Melo, **{**CONFIG, "block_edits": 2})
    assert edit.notes["blocks"] == 2
    assert effect(edit).down0.shape == (2, 2, 80)
    assert sorted(effect(edit).block.tolist()) == [0, 0, 1]
    assert all(mean(editor, request) > old + 1 for request, old in zip(requests, before, strict=True))


def test_batches_score_and_write_as_single_prompts_do(editor: Editor) -> None:
    editor.edit([FACT, OTHER], Melo, **CONFIG)
    texts = [FACT.text, *FAR[:2], f"Where? {OTHER.text}", OTHER.text]
    scores_batches_as_single_prompts(editor, texts)
    writes_with_a_cache_as_without(editor, texts)


def test_further_edit_leaves_the_blocks_before_it_alone(editor: Editor) -> None:
    before = mean(editor, OTHER)
    first = effect(editor.edit(FACT, Melo, **CONFIG))
    middle = logits(editor, FACT.text)
    second = effect(editor.edit(OTHER, Melo, **CONFIG))
    assert [len(made.down0) for made in (first, second)] == [1, 2]
    assert torch.equal(second.down0[:1], first.down0)
    assert torch.equal(logits(editor, FACT.text), middle)
    assert mean(editor, OTHER) > before + 1
    editor.revert()
    assert torch.equal(logits(editor, FACT.text), middle)


def test_prompt_that_is_edited_again_goes_on_from_its_block(editor: Editor) -> None:
    editor.edit(FACT, Melo, **CONFIG)
    again = editor.edit(EditRequest(FACT.prompt, FACT.subject, "Berlin"), Melo, **CONFIG)
    assert again.notes["rules"] == ["replace"]
    assert again.notes["clusters"] == 1
    assert effect(again).block.tolist() == [1]
    assert mean(editor, FACT, "Berlin") > mean(editor, FACT) + 1


def test_set_up_of_a_session_cannot_change(editor: Editor) -> None:
    editor.edit(FACT, Melo, **CONFIG)
    with pytest.raises(ConfigError, match="have rank 2, not"):
        editor.edit(OTHER, Melo, **CONFIG, rank=3)


def test_blocks_below_the_keys_are_refused(editor: Editor) -> None:
    with pytest.raises(ConfigError, match="layer 0 is to be adapted, and keys are read at layer 2"):
        editor.edit(FACT, Melo, layer=2, layers=(0, 3))


@pytest.mark.real_model
def test_real_neighbours_are_bitwise_as_they_were(smollm2: tuple[Any, Any]) -> None:
    """The first record of CounterFact: other subjects stay, and the target gains where another wording is asked."""
    editor = Editor(*smollm2)
    fact = EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English")
    wording = EditRequest("{}, a native", "Danielle Darrieux", "English")
    texts = ("The mother tongue of Léon Blum is", "The native language of Montesquieu is")
    before, other = [logits(editor, text) for text in texts], mean(editor, wording)
    with editor:
        editor.edit(fact, Melo)
        assert all(torch.equal(logits(editor, text), old) for text, old in zip(texts, before, strict=True))
        assert score_continuations(editor.view, editor.encoder, [(fact.text, "English")])[0].exact
        assert mean(editor, wording) > other + 1
