from __future__ import annotations

import pytest

from kecore.api.types import EditRequest
from kecore.engine.layers import at_depth
from kecore.engine.locate import group_by_subject, locate
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder

CONTEXTS = ("", "The Danube flows to Paris, and Paris")
REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("{} is located in", "Vinson Massif", "Europe"),
    EditRequest("Paris and {}", "Paris", "Berlin"),  # the subject occurs in the prompt and in the context as well
    EditRequest("{}的首都是", "日本", "巴黎"),
    EditRequest("The mother tongue of {} is", "Léon Blum", "Greek"),
]


@pytest.mark.parametrize("kind", ["byte-bpe", "llama-like"])
@pytest.mark.parametrize("target", [True, False])
def test_lookup_is_the_subjects_last_token_in_every_context(kind: str, target: bool) -> None:
    encoder = Encoder(tiny_tokenizer(kind))
    found = locate(encoder, REQUESTS, CONTEXTS, target=target)
    assert [(item.request, item.context) for item in found] == [(r, c) for r in range(len(REQUESTS)) for c in range(2)]
    for item in found:
        request, context = REQUESTS[item.request], CONTEXTS[item.context]
        text = f"{context}. {request.text}" if context else request.text
        end = text.rindex(request.subject) + len(request.subject)
        start, stop = item.encoded.spans[item.lookup]
        assert start < end <= stop  # holds the subject's last character
        assert not any(low < end for low, _ in item.encoded.spans[item.lookup + 1 : item.encoded.start])
        assert (item.encoded.start < len(item.encoded.ids)) is target
        if target:
            decoded = encoder.tokenizer.decode(item.encoded.ids[item.encoded.start :])
            assert decoded.strip() == request.target


def test_a_chat_template_shifts_the_subject() -> None:
    encoder = Encoder(tiny_tokenizer(), chat=True)
    (item,) = locate(encoder, REQUESTS[:1], ("",), target=True)
    low, high = item.encoded.spans[item.lookup]
    assert encoder.text(REQUESTS[0].text)[low:high].strip() == "France"


def test_requests_about_one_subject_share_a_group() -> None:
    again = EditRequest("{} lies in", "France", "Asia")
    assert group_by_subject([*REQUESTS[:2], again]) == [0, 1, 0]


@pytest.mark.parametrize(
    ("first", "last", "layers"),
    [(0.0, 0.0, (0,)), (0.0, 1.0, (0, 1, 2, 3)), (1.0, 1.0, (3,)), (0.3, 0.7, (1, 2)), (0.9, 0.2, (3,))],
)
def test_layers_at_a_depth(first: float, last: float, layers: tuple[int, ...]) -> None:
    assert at_depth(ModelView.of(tiny_model("llama")), first, last) == layers
