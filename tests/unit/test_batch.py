"""The requests of an edit, made ready once: which they are, where their subjects end, and what is tokenised for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from kecore.api.errors import PromptTooLongError, RequestConflictError, RequestError
from kecore.api.method import MethodContext
from kecore.api.types import EditRequest
from kecore.batch import RequestBatch
from kecore.model import ModelView, SiteId
from kecore.statistics import KeyStatistics
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder, join_context
from kecore_methods.locate.memit import Memit

CONTEXT = "The Danube flows to Paris, and Paris"
REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("{} is located in", "Vinson Massif", "Europe"),
    EditRequest("Paris and {}", "Paris", "Berlin"),  # the subject occurs in the prompt and in the context as well
    EditRequest("{}的首都是", "日本", "巴黎"),
    EditRequest("The mother tongue of {} is", "Léon Blum", "Greek"),
]
AGAIN = EditRequest("{} lies in", "France", "Asia")  # about the first one's subject


class Counting(Encoder):
    """An encoder that counts the texts it is given."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.seen: Counter[str] = Counter()

    def encode(self, prompt: str, target: str = "") -> Any:
        self.seen[self.text(prompt, target)] += 1
        return super().encode(prompt, target)


@pytest.mark.parametrize("kind", ["byte-bpe", "llama-like"])
@pytest.mark.parametrize("context", ["", CONTEXT])
def test_lookup_is_the_subjects_last_token_in_every_context(kind: str, context: str) -> None:
    encoder = Encoder(tiny_tokenizer(kind))
    batch = RequestBatch.of(REQUESTS, encoder)
    for request, item in zip(REQUESTS, batch.located(context), strict=True):
        text = f"{context}. {request.text}" if context else request.text
        encoded = encoder.encode(text, request.target)
        assert (item.ids, item.start) == (encoded.ids, encoded.start)
        end = text.rindex(request.subject) + len(request.subject)
        start, stop = encoded.spans[item.lookup]
        assert start < end <= stop  # holds the subject's last character
        assert not any(low < end for low, _ in encoded.spans[item.lookup + 1 : item.start])
        assert encoder.tokenizer.decode(item.ids[item.start :]).strip() == request.target


@pytest.mark.parametrize("kind", ["byte-bpe", "llama-like"])
def test_a_prompts_tokens_do_not_depend_on_its_target(kind: str) -> None:
    """So what reads the prompt alone, such as a key, need not tokenise it alone."""
    encoder = Encoder(tiny_tokenizer(kind))
    glued = EditRequest("Rome (", "Rome", "Italy")  # nothing stands between prompt and target
    batch = RequestBatch.of([*REQUESTS, glued], encoder)
    for context in ("", CONTEXT):
        for request, item in zip(batch.requests, batch.located(context), strict=True):
            assert item.ids[: item.start] == encoder.encode(join_context(context, request.text)).ids


def test_lookups_are_those_of_the_encodings() -> None:
    encoder = Encoder(tiny_tokenizer())
    batch = RequestBatch.of(REQUESTS, encoder)
    assert [encoded.ids for encoded in batch.encodings] == [item.ids for item in batch.located()]
    assert batch.lookups == tuple(
        encoded.last_token_of(request.subject_span) for request, encoded in zip(REQUESTS, batch.encodings, strict=True)
    )


def test_a_chat_template_shifts_the_subject() -> None:
    encoder = Encoder(tiny_tokenizer(), chat=True)
    batch = RequestBatch.of(REQUESTS[:1], encoder)
    low, high = batch.encodings[0].spans[batch.lookups[0]]
    assert encoder.text(REQUESTS[0].text, "Rome")[low:high].strip() == "France"


def test_texts_about_a_subject_have_no_target() -> None:
    encoder = Encoder(tiny_tokenizer())
    france, massif = RequestBatch.of([*REQUESTS[:2], AGAIN], encoder).about_subjects("It is {} that")
    encoded = encoder.encode("It is France that")
    assert (france.ids, france.start) == (encoded.ids, len(encoded.ids))
    low, high = encoded.spans[france.lookup]
    assert "It is France that"[low:high].strip() == "France"
    assert massif.ids == encoder.encode("It is Vinson Massif that").ids


def test_requests_about_one_subject_share_a_group() -> None:
    batch = RequestBatch.of([*REQUESTS[:2], AGAIN], Encoder(tiny_tokenizer()))
    assert batch.groups == (0, 1, 0)
    assert batch.subjects == ("France", "Vinson Massif")
    alone = batch.ungrouped()
    assert alone.requests == batch.requests
    assert alone.groups == (0, 1, 2)
    assert alone.subjects == ("France", "Vinson Massif", "France")
    assert batch.select([1, 2]).requests == (REQUESTS[1], AGAIN)
    assert batch.select([1, 2]).groups == (0, 1)


def test_a_request_that_is_given_twice_counts_once() -> None:
    batch = RequestBatch.of([*REQUESTS[:2], REQUESTS[0]], Encoder(tiny_tokenizer()))
    assert batch.requests == tuple(REQUESTS[:2])
    assert len(batch) == 2


def test_bad_requests_make_no_batch() -> None:
    encoder = Encoder(tiny_tokenizer())
    with pytest.raises(RequestConflictError):
        RequestBatch.of([REQUESTS[0], EditRequest("The capital of {} is", "France", "Berlin")], encoder)
    with pytest.raises(RequestError, match="no edit requests"):
        RequestBatch.of([], encoder)


def test_what_does_not_fit_is_refused_when_tokens_are_asked_for() -> None:
    batch = RequestBatch.of(REQUESTS, Encoder(tiny_tokenizer(), max_length=4))
    assert len(batch.groups) == len(REQUESTS)
    with pytest.raises(PromptTooLongError):
        _ = batch.encodings


def test_views_of_a_batch_tokenise_nothing_again() -> None:
    encoder = Counting(tiny_tokenizer())
    batch = RequestBatch.of([*REQUESTS, AGAIN], encoder)
    for view in (batch, batch.ungrouped(), batch.select([3, 0])):
        for _ in range(2):
            view.located(CONTEXT)
            view.about_subjects("{} is a")
            assert view.lookups
            assert view.encodings
    assert len(encoder.seen) == 2 * 6 + 5
    assert set(encoder.seen.values()) == {1}


def test_an_edit_by_memit_tokenises_each_text_once() -> None:
    """Memory's needs, values, keys of all layers and essence prompts read one tokenisation of prompt and context."""
    view, encoder = ModelView.of(tiny_model("gpt2")), Counting(tiny_tokenizer("byte-bpe"))
    moments = {SiteId(layer): torch.eye(view.layers[layer].site.linear.d_in) for layer in (0, 1)}
    statistics = KeyStatistics(moments, 100, {}, "text")
    config = Memit.Config(contexts=2, context_tokens=3, steps=2, layers=(0, 1))  # pyright: ignore
    context = MethodContext(config, encoder, statistics=statistics)
    batch = RequestBatch.of([*REQUESTS, AGAIN, AGAIN], encoder)
    config.needs(view, batch)
    edit = Memit().plan(view, batch, context)
    prefixes = edit.notes["contexts"]
    prompts = [
        encoder.text(join_context(prefix, request.text), request.target)
        for prefix in prefixes
        for request in batch.requests
    ]
    essences = [f"{subject} is a" for subject in batch.subjects]
    assert encoder.seen == Counter([*prompts, *essences, *prefixes[1:]])  # the prefixes alone say how strong noise is
