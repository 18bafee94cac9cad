"""What tests of side modules share: facts, prompts that none is about, and questions to an editor."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from kecore import Editor, EditRequest
from kecore.inference import score_continuations
from kecore.inference.generation import generate
from kecore.testing import tiny_model, tiny_tokenizer

FACT = EditRequest("The capital of {} is", "Italy", "Vienna")
OTHER = EditRequest("The company of {} is", "Tim Cook", "French")
FAR = ("The mother tongue of Danielle", "Where does the Danube", "Antarctica is", "The iPhone", "It flows to")


class Toy(nn.Module):
    """One linear map that is called as a causal language model is."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = nn.Linear(3, 4)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return self.lm(inputs_embeds)


def opened(architecture: str = "llama") -> Editor:
    """A session on a tiny model."""
    kind = "byte-bpe" if architecture in ("gpt2", "gptj") else "llama-like"
    return Editor(tiny_model(architecture), tiny_tokenizer(kind))


def logits(editor: Editor, text: str) -> Tensor:
    """``[1, tokens, vocab]`` for one text, without a cache."""
    ids = torch.tensor([editor.encoder.encode(text).ids])
    with torch.no_grad():
        return editor.model(input_ids=ids, use_cache=False).logits


def mean(editor: Editor, request: EditRequest, target: str = "") -> float:
    """Mean log-probability of a request's target, or of another one."""
    pairs = [(request.text, target or request.target)]
    return score_continuations(editor.view, editor.encoder, pairs)[0].mean


def writes_with_a_cache_as_without(editor: Editor, texts: Sequence[str]) -> None:
    """Greedy text in a left-padded batch with a cache, and transformers' own, against a full pass for every token.

    Also where other texts of the batch end before.
    """
    found = generate(editor.view, editor.encoder, texts, max_new_tokens=6)
    limits = [(1, 6, 3)[i % 3] for i in range(len(texts))]
    uneven = generate(editor.view, editor.encoder, texts, max_new_tokens=limits)
    assert [item.ids for item in uneven] == [item.ids[:n] for item, n in zip(found, limits, strict=True)]
    for text, generation in zip(texts, found, strict=True):
        ids = list(editor.encoder.encode(text).ids)
        own = editor.model.generate(
            torch.tensor([ids]), max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0
        )
        assert own[0, len(ids) :].tolist()[: len(generation.ids)] == list(generation.ids)
        for token in generation.ids:
            with torch.no_grad():
                out = editor.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert float(out.max() - out[token]) < 1e-4
            ids.append(token)


def scores_batches_as_single_prompts(editor: Editor, texts: Sequence[str]) -> None:
    """The same continuation behind several prompts, together and alone."""
    pairs = [(text, "Vienna, not Rome") for text in texts]
    together = score_continuations(editor.view, editor.encoder, pairs)
    alone = [score_continuations(editor.view, editor.encoder, [pair])[0] for pair in pairs]
    for a, b in zip(together, alone, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
