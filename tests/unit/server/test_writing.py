"""Texts token by token, against the text of all their tokens; sampling against the distribution it draws from."""

from __future__ import annotations

import pytest
import torch

from kecore.testing import tiny_tokenizer
from kecore_serve.server.sampling import Choice, Sampler, Sampling, choose_tokens
from kecore_serve.server.writing import Piece, TextStream, Writing, join_pieces

TEXTS = ["Rome is the capital of Italy.", " leading", "naïve 🙂 東京", "a\n\nb  c", "🙂"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte-bpe", "llama-like"])
def test_the_pieces_are_the_text(kind: str, text: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    prompt = tokenizer("The capital of France is")["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.finish())
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == whole[len(before) :]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1 or text == "🙂"


def _write(text: str, stop: tuple[str, ...] = (), max_tokens: int = 100) -> list[Piece]:
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    writing = Writing(tokenizer, [], Sampling(max_tokens, stop=stop), frozenset({tokenizer.eos_token_id}))
    pieces: list[Piece] = []
    for token in ids:
        pieces.append(writing.push(Choice(token)))
        if writing.finished:
            break
    return pieces


def test_a_text_ends_by_its_closing_token_its_length_or_a_stop() -> None:
    whole = join_pieces(_write("Rome is in Italy"))
    assert (whole.text, whole.finish_reason) == ("Rome is in Italy", "stop")
    cut = _write("Rome is in Italy", max_tokens=2)
    assert len(cut) == 2
    assert cut[-1].finish_reason == "length"
    assert "Rome is in Italy".startswith(join_pieces(cut).text)
    stopped = join_pieces(_write("Rome is in Italy", stop=("Italy", " in")))
    assert (stopped.text, stopped.finish_reason) == ("Rome is", "stop")


def test_nothing_of_a_stop_is_ever_sent_and_nothing_else_is_held_back_for_good() -> None:
    pieces = _write("aab aaab b", stop=("aaab",))
    assert join_pieces(pieces) == Piece("aab ", (), "stop")
    sent = ""
    for piece in pieces:
        sent += piece.text
        assert "aab ".startswith(sent)
    assert join_pieces(_write("a aa", stop=("aaab",))).text == "a aa"  # what began like the stop was none


def test_tokens_are_drawn_in_proportion() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = 4000
    rows = logits.expand(draws, -1)
    for top_p, temperature, expected in [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.7, 1.0, [0.625, 0.375, 0, 0]),
        (0.1, 1.0, [1, 0, 0, 0]),
        (1.0, 0.5, [0.685, 0.247, 0.062, 0.007]),
    ]:
        samplers = [Sampler(Sampling(1, temperature, top_p, seed=3), number) for number in range(draws)]
        tokens = [choice.token for choice in choose_tokens(rows, samplers)]
        shares = [tokens.count(token) / draws for token in range(4)]
        assert shares == pytest.approx(expected, abs=0.03)


def test_draws_are_those_of_the_seed_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))

    def draw(rows: list[int]) -> list[int]:
        samplers = [Sampler(Sampling(1, seed=7), number=row) for row in rows]
        return [choice.token for _ in range(5) for choice in choose_tokens(logits[rows], samplers)[:1]]

    assert draw([1]) == draw([1, 0, 2])
    assert draw([1]) == draw([1])


def test_probabilities_are_told_before_temperature() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    (choice,) = choose_tokens(logits, [Sampler(Sampling(1, temperature=0, alternatives=2))])
    expected = logits[0].log_softmax(-1).tolist()
    assert choice.token == 0
    assert choice.logprob == pytest.approx(expected[0])
    assert [token for token, _ in choice.top] == [0, 1]
    assert [value for _, value in choice.top] == pytest.approx(expected[:2])
