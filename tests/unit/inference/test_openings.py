"""What rows begin with alike: found, run once, and without effect on any result."""

from __future__ import annotations

import copy
import random
from itertools import combinations
from typing import Any

import pytest
import torch
from slow_reference import greedy, log_probs
from tiny_worlds import World, make_world

from kecore.api.errors import KecoreWarning
from kecore.inference import generate, score_continuations
from kecore.inference.opening import NO_OPENING, Opening
from kecore.inference.openings import group_by_prefix, open_batches
from kecore.inference.scoring import next_tokens
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder

FACTS = "The capital of Italy is Paris. The Danube flows to Berlin. The mother tongue of Apollo is French. "
PROMPTS = [
    "The capital of France is",
    "The Danube",
    "Where does the Danube flow? It flows to the",
    "The mother tongue of Danielle Darrieux is",
    "Vinson Massif",
]
PAIRS = [(FACTS + prompt, answer) for prompt in PROMPTS for answer in ("Rome", "the Black Sea")]
BATCH = 256  # tokens; a quarter of them has to be spared


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Opening]:
    """The openings that are run."""
    found: list[Opening] = []
    run = Opening.run.__func__  # type: ignore[attr-defined]

    def kept(cls: type[Opening], *args: Any) -> Opening:
        found.append(run(cls, *args))
        return found[-1]

    monkeypatch.setattr(Opening, "run", classmethod(kept))
    return found


def test_scores_are_those_of_each_prompt_alone(world: World, ran: list[Opening]) -> None:
    found = score_continuations(world.view, world.encoder, PAIRS, batch_tokens=BATCH)
    assert ran
    assert world.encoder.tokenizer.decode(ran[0].ids, skip_special_tokens=True).strip().startswith("The capital of It")
    for (prompt, target), score in zip(PAIRS, found, strict=True):
        values, correct = log_probs(world.view.model, world.encoder.tokenizer, prompt, target)
        assert score.log_probs == pytest.approx(values, abs=1e-9)
        assert score.correct == tuple(correct)


def test_texts_are_those_of_each_prompt_alone(world: World, ran: list[Opening]) -> None:
    prompts = [FACTS + prompt for prompt in PROMPTS]
    found = generate(world.view, world.encoder, prompts, max_new_tokens=8, batch_tokens=BATCH)
    assert len(ran) == 1
    for prompt, item in zip(prompts, found, strict=True):
        assert list(item.ids) == greedy(world.view.model, world.encoder.tokenizer, prompt, 8)


def test_distributions_are_those_of_each_prompt_alone(world: World, ran: list[Opening]) -> None:
    prompts = [FACTS + prompt for prompt in PROMPTS]
    found = next_tokens(world.view, world.encoder, prompts, batch_tokens=BATCH)
    assert len(ran) == 1
    for prompt, values in zip(prompts, found, strict=True):
        torch.testing.assert_close(values, next_tokens(world.view, world.encoder, [prompt])[0], rtol=0, atol=1e-9)


def test_a_chat_template_is_an_opening(ran: list[Opening]) -> None:
    world = make_world("byte-level")
    tokenizer = copy.deepcopy(world.encoder.tokenizer)
    tokenizer.chat_template = f"{FACTS}{tokenizer.chat_template}"
    encoder = Encoder(tokenizer, chat=True)
    pairs = [(prompt, "Rome") for prompt in PROMPTS]
    found = score_continuations(world.view, encoder, pairs, batch_tokens=BATCH)
    assert len(ran) == 1
    for pair, score in zip(pairs, found, strict=True):
        alone = score_continuations(world.view, encoder, [pair])[0]
        assert score.log_probs == pytest.approx(alone.log_probs, abs=1e-9)


@pytest.mark.parametrize("trial", range(20))
def test_groups_begin_alike_and_spare_what_is_asked(trial: int) -> None:
    stream = random.Random(trial)
    trunks = [[stream.randrange(3) for _ in range(stream.randrange(10, 80))] for _ in range(4)]
    heads = [
        [*stream.choice(trunks)[: stream.randrange(8, 90)], *(stream.randrange(9) for _ in range(stream.randrange(4)))]
        for _ in range(stream.randrange(30))
    ]
    least = stream.choice([1, 40, 200])
    groups = group_by_prefix(heads, least)
    members = [index for _, group in groups for index in group]
    assert len(members) == len(set(members))
    for shared, group in groups:
        assert shared >= 16
        assert len(group) > 1
        assert shared * (len(group) - 1) >= least
        for a, b in combinations(group, 2):
            assert heads[a][:shared] == heads[b][:shared]
        assert len({tuple(heads[i][: shared + 1]) for i in group}) > 1 or any(len(heads[i]) == shared for i in group)
    # No two that are left could have been a group of their own.
    for a, b in combinations(sorted(set(range(len(heads))) - set(members)), 2):
        common = next((k for k, (x, y) in enumerate(zip(heads[a], heads[b], strict=False)) if x != y),
                      min(len(heads[a]), len(heads[b])))  # fmt: skip
        assert common < max(16, least)


def test_what_few_share_is_not_hidden_by_what_many_share() -> None:
    template, one, other = list(range(20)), [7] * 100, [8] * 100
    heads = [[*template, *facts, i] for facts in (one, other) for i in range(5)] + [[*template, i] for i in range(9)]
    assert group_by_prefix(heads, 64) == [(120, [0, 1, 2, 3, 4]), (120, [5, 6, 7, 8, 9]), (20, [*range(10, 19)])]


def test_short_or_rare_openings_are_left_alone(small: World, ran: list[Opening]) -> None:
    score_continuations(small.view, small.encoder, PAIRS)  # of the default micro-batch too little is spared
    score_continuations(small.view, small.encoder, [(p, "Rome") for p in PROMPTS], batch_tokens=BATCH)
    assert not ran


def test_what_an_opening_takes_counts_in_a_micro_batch(small: World) -> None:
    head = list(range(40))
    rows = [(*head, i, i) for i in range(30)]
    batches = list(open_batches(small.view, small.encoder, rows, [2] * 30, [3] * 30, 80))
    assert sorted(i for _, batch, _ in batches for i in batch) == list(range(30))
    for opening, batch, tails in batches:
        assert list(opening.ids) == head
        assert [(*opening.ids, *tail) for tail in tails.input_ids.tolist()] == [rows[i] for i in batch]
        assert len(batch) * (2 + 3) < 80, "a row would have cost nothing beside its own tokens"


def test_whoever_hooks_into_the_model_is_given_whole_prompts(small: World, ran: list[Opening]) -> None:
    seen: list[int] = []
    layer = small.view.layers[0].module
    handle = layer.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[1]))
    try:
        score_continuations(small.view, small.encoder, PAIRS, batch_tokens=BATCH)
    finally:
        handle.remove()
    assert not ran
    assert min(seen) > len(small.encoder.encode(FACTS).ids)


def test_a_model_that_goes_on_in_another_way_reads_whole_prompts(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = score_continuations(small.view, small.encoder, PAIRS)
    before = Opening.before

    def forgetful(self: Opening, rows: Any) -> Any:
        past = before(self, rows)
        if past is not None:
            past[1][:, :5] = 0
        return past

    monkeypatch.setattr(Opening, "before", forgetful)
    with pytest.warns(KecoreWarning, match="in common anew for each of them: logits behind it differ by"):
        found = score_continuations(small.view, small.encoder, PAIRS, batch_tokens=BATCH)
    for a, b in zip(found, wanted, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-9)


def test_a_model_that_does_not_go_on_from_a_cache_reads_whole_prompts(
    small: World, ran: list[Opening], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(small.view.__dict__, "continues", False)
    score_continuations(small.view, small.encoder, PAIRS, batch_tokens=BATCH)
    assert not ran


def test_without_tokens_there_is_nothing_before(small: World) -> None:
    assert NO_OPENING.before(small.encoder.rows([[1, 2]])) is None


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
@pytest.mark.parametrize("at_ends", [False, True])
def test_windows_of_attention_that_padding_would_fill_are_noticed_in_every_group(
    at_ends: bool, ran: list[Opening]
) -> None:
    """The rows of the longer opening need no padding, so they say nothing of the others."""
    view, encoder = ModelView.of(tiny_model("mistral")), Encoder(tiny_tokenizer())
    even = [[*range(100, 140), i, i + 1, i + 2] for i in range(5, 9)]
    ragged = [[*range(200, 220), *range(i, i + length)] for i, length in ((5, 1), (9, 2), (20, 12))]
    rows = [*even, *ragged]
    with view.frozen():
        batches = open_batches(view, encoder, rows, [1] * len(rows), [0] * len(rows), 100, at_ends=at_ends)
        for opening, batch, tails in batches:
            found = opening.logits_at(view, tails, torch.arange(len(batch)), tails.ends - 1)
            for index, logits in zip(batch, found, strict=True):
                alone = encoder.rows([rows[index]])
                wanted = view.logits_at(alone, torch.tensor([0]), alone.ends - 1)[0]
                torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert len(ran) == 2
