"""Spaces, special tokens, spans and padding, for the two families of tokenizers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kecore.api.errors import PromptTooLongError, RequestError, TokenizerError
from kecore.testing import tiny_tokenizer
from kecore.text import Encoder, separator

KINDS = ["byte-bpe", "llama-like"]


@pytest.fixture(params=KINDS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(tiny_tokenizer(request.param))


@pytest.mark.parametrize(
    ("prompt", "target", "between"),
    [
        ("The capital of France is", "Paris", " "),
        ("The capital of France is ", "Paris", ""),
        ("line\n", "Paris", ""),
        ("The capital is", " Paris", ""),
        ("He said (", "Paris", ""),
        ('He said "', "Paris", ""),
        ("He said “", "Paris", ""),
        ("Paris", ", France", ""),
        ("Paris", "?", ""),
        ("Paris", "”", ""),
        ("Paris", "- or so", " "),
        ("法国的首都是", "巴黎", ""),
        ("日本の首都は", "東京", ""),
        ("法国的首都是", "Paris", ""),
        ("The capital is", "巴黎", ""),
        ("法国的首都是，", "巴黎", ""),
        ("프랑스의 수도는", "파리", ""),
        ("La capitale è", "Parigi", " "),
        ("", "Paris", ""),
        ("Paris", "", ""),
    ],
)
def test_separator(prompt: str, target: str, between: str) -> None:
    assert separator(prompt, target) == between


def test_text_is_what_is_tokenised(encoder: Encoder) -> None:
    assert encoder.text("The capital is", "Paris") == "The capital is Paris"
    assert encoder.text("法国的首都是", "巴黎") == "法国的首都是巴黎"
    encoded = encoder.encode("The capital of France is", "Paris")
    assert encoder.tokenizer.decode(encoded.ids, skip_special_tokens=True) == "The capital of France is Paris"


def test_only_a_tokenizer_that_has_one_puts_a_token_first() -> None:
    plain, marked = (Encoder(tiny_tokenizer(kind)).encode("The capital", "is") for kind in KINDS)
    assert plain.spans[0] == (0, 3)
    assert marked.ids[0] == tiny_tokenizer("llama-like").bos_token_id
    assert marked.spans[0] == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "subject", "token"),
    [
        ("The capital of France is", "France", "France"),
        ("France is", "France", None),
        ("The Eiffel Tower is located in", "Eiffel Tower", None),
        ("The mother tongue of Léon Blum is", "Léon Blum", None),
        ("Léon, not Blum", "Léon", None),
        ("日本的首都是", "日本", None),
        ("法国的首都是巴黎,日本的首都是东京", "日本", None),
        ("Who is Ω≈ç, then?", "Ω≈ç", None),
        ("The capital of France", "France", "France"),
    ],
)
@pytest.mark.parametrize("target", ["", "Rome"])
def test_the_subjects_last_token_holds_its_last_character(
    encoder: Encoder, prompt: str, subject: str, token: str | None, target: str
) -> None:
    start = prompt.rindex(subject)
    span = (start, start + len(subject))
    encoded = encoder.encode(prompt, target)
    index = encoded.last_token_of(span)
    low, high = encoded.spans[index]
    assert low < span[1] <= high
    assert all(later >= span[1] for later, _ in encoded.spans[index + 1 : encoded.start])
    if token is not None:
        assert encoder.text(prompt, target)[low:high].strip() == token
    assert encoded.ids[: encoded.start] == encoder.encode(prompt).ids  # the target changes nothing before it


def test_text_that_a_tokenizer_drops_has_no_token() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "end": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))
    with pytest.raises(TokenizerError, match=r"no token covers the characters \(3, 6\)"):
        encoder.encode("the   end").last_token_of((3, 6))


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The capital of France is", "Rome and Paris"),
        ("The capital of France is ", "Rome"),
        ("法国的首都是", "东京"),
        ("艾菲尔铁塔位", "于巴黎"),  # the vocabulary has tokens across this border
        ("The Dan", "ube"),
        ('He said "', "Paris"),
        ("France", ", or Italy"),
    ],
)
def test_target_tokens_are_those_after_the_prompt(encoder: Encoder, prompt: str, target: str) -> None:
    encoded = encoder.encode(prompt, target)
    tail = encoder.tokenizer.decode(encoded.ids[encoded.start :])
    assert tail.strip() == target.strip()
    assert len(encoded.ids) == len(encoded.spans)
    text = encoder.text(prompt, target)
    assert encoded.spans[-1][1] == len(text)
    assert text[encoded.spans[encoded.start][0] : encoded.spans[-1][1]].strip() == target.strip()


def test_a_token_across_the_border_is_split() -> None:
    """Without a space between them, prompt and target may share a token of the whole text."""
    encoder = Encoder(tiny_tokenizer("llama-like"))
    whole = encoder.tokenizer("艾菲尔铁塔")["input_ids"]
    joined = encoder.encode("艾菲尔", "铁塔")
    assert joined.ids != tuple(whole)
    assert joined.ids[: joined.start] == encoder.encode("艾菲尔").ids
    # The tail stands inside a text, so it opens with no mark for a space.
    assert not encoder.tokenizer.convert_ids_to_tokens(joined.ids[joined.start]).startswith("▁")
    at_a_space = encoder.encode("The", "Danube")
    assert at_a_space.ids == tuple(encoder.tokenizer("The Danube")["input_ids"])


def test_a_target_without_tokens_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))
    with pytest.raises(RequestError, match="gives no tokens for the target"):
        encoder.encode("the", "\t")


def test_closing_tokens_are_left_out() -> None:
    core = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "the": 2, "end": 3}, unk_token="the"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=core, cls_token="[CLS]", sep_token="[SEP]"))
    assert encoder.encode("the").ids == (0, 2)
    encoded = encoder.encode("the", "end")
    assert (encoded.ids, encoded.start) == ((0, 2, 3), 2)


def test_chat_puts_the_prompt_into_the_template_and_the_target_into_the_answer(encoder: Encoder) -> None:
    chat = Encoder(encoder.tokenizer, chat=True)
    assert chat.text("Where is it?", "Rome") == "<user>Where is it?</user><assistant>Rome"
    encoded = chat.encode("Where is the capital of France?", "Rome")
    text = chat.text("Where is the capital of France?", "Rome")
    low, high = encoded.spans[encoded.last_token_of((24, 30))]
    assert "France" in text[low:high]
    assert text[encoded.spans[encoded.start][0] :] == "Rome"
    assert encoder.tokenizer.bos_token_id not in encoded.ids or encoder.tokenizer.bos_token_id is None


def test_chat_needs_a_template_that_keeps_the_message() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "Hello"
    with pytest.raises(TokenizerError, match="drops the user's message"):
        Encoder(tokenizer, chat=True)
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="has no chat template"):
        Encoder(tokenizer, chat=True)
    assert Encoder(tokenizer).encode("The capital").start > 0


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"SimpleNamespace gives no character offsets.*use_fast=True"):
        Encoder(SimpleNamespace(is_fast=False))


def test_too_long(encoder: Encoder) -> None:
    count = len(encoder.encode("The capital of France is", "Rome").ids)
    assert Encoder(encoder.tokenizer, max_length=count).encode("The capital of France is", "Rome")
    with pytest.raises(PromptTooLongError, match=rf"take {count} tokens, the model's context holds {count - 1}"):
        Encoder(encoder.tokenizer, max_length=count - 1).encode("The capital of France is", "Rome")


@pytest.mark.parametrize(
    ("tokens", "pad"),
    [
        ({"pad_token": "<unk>", "eos_token": "</s>"}, 0),
        ({"eos_token": "</s>", "bos_token": "<s>"}, 2),
        ({"bos_token": "<s>"}, 1),
        ({}, 0),
    ],
)
def test_padding_token(tokens: dict[str, str], pad: int) -> None:
    core = Tokenizer.from_str(tiny_tokenizer("llama-like").backend_tokenizer.to_str())
    assert Encoder(PreTrainedTokenizerFast(tokenizer_object=core, **tokens)).pad_id == pad


def test_rows_line_up_at_the_first_token_or_where_they_are_told(encoder: Encoder) -> None:
    ids = [[5, 6, 7], [8], [9, 10, 11, 12]]
    pad = encoder.pad_id
    rows = encoder.rows(ids)
    assert rows.input_ids.tolist() == [[5, 6, 7, pad], [8, pad, pad, pad], [9, 10, 11, 12]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert rows.offset.tolist() == [0, 0, 0]
    rows = encoder.rows(ids, [2, 0, 1])
    assert rows.input_ids.tolist() == [[5, 6, 7, pad, pad], [pad, pad, 8, pad, pad], [pad, 9, 10, 11, 12]]
    assert rows.input_ids[:, 2].tolist() == [7, 8, 10]
    assert rows.offset.tolist() == [0, 2, 1]
    assert rows.position_ids.tolist() == [[0, 1, 2, 2, 2], [0, 0, 0, 0, 0], [0, 0, 1, 2, 3]]
    chosen = rows.select(torch.tensor([2, 1]))
    assert (chosen.input_ids[0].tolist(), chosen.offset.tolist()) == ([pad, 9, 10, 11, 12], [1, 2])
    moved: Any = rows.to("meta")
    assert {moved.input_ids.device.type, moved.attention_mask.device.type, moved.offset.device.type} == {"meta"}
    assert encoder.rows([]).input_ids.shape == (0, 0)


def test_the_tiny_tokenizers_are_what_they_claim() -> None:
    plain, marked = (tiny_tokenizer(kind) for kind in KINDS)
    for tokenizer in (plain, marked):
        assert len(tokenizer) <= 512
        for text in ("The Eiffel Tower", "日本的首都是东京", "unseen Ωβ≈ 🙂"):
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert plain.bos_token_id is None
    assert marked("x")["input_ids"][0] == marked.bos_token_id == 1
    with pytest.raises(ValueError, match="unknown kind 'x'"):
        tiny_tokenizer("x")
