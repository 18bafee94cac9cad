"""LocFT-BF: breadth-first mini-batches, the end of the text asked for, the order of requests without a say."""

from __future__ import annotations

import warnings

import torch

from kecore import Editor, EditRequest
from kecore.api.errors import KecoreWarning
from kecore.edit import Dense, WeightEdit
from kecore.testing import tiny_model, tiny_tokenizer

FACTS = [EditRequest("The capital of {}", name, "Apple") for name in ("Italy", "France", "Japan", "Peru", "Chad")]


def planned(requests: list[EditRequest], seed: int = 0, **config: object) -> torch.Tensor:
    editor = Editor(tiny_model("llama"), tiny_tokenizer(), seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        edit = editor.edit(requests, "locft-bf", **config)  # pyright: ignore
    assert isinstance(edit, WeightEdit)
    (update,) = edit.updates.values()
    assert isinstance(update, Dense)
    return update.delta


def test_one_update_is_one_step_of_adam_on_the_mean_loss() -> None:
    """The oracle differentiates the plain model's loss in its own weight, one request at a time."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    weight = model.get_parameter("model.layers.2.mlp.down_proj.weight")
    losses = []
    for request in FACTS:
        prompt, target = tokenizer(request.text).input_ids, tokenizer(f" {request.target}").input_ids
        target = [*target, tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(target)))
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), weight)
    delta = planned(FACTS, steps=1, layer=2, learning_rate=0.01, contexts=0, end_token=True)
    clear = gradient.abs() > 1e-5  # where rounding cannot turn the sign
    assert float(clear.float().mean()) > 0.9
    assert torch.allclose(delta[clear], -0.01 * gradient.sign()[clear], rtol=1e-2)


def test_batches_follow_the_seed_and_not_the_order() -> None:
    config = {"steps": 2, "batch_size": 2}
    first = planned(FACTS, **config)
    assert torch.equal(first, planned(FACTS[::-1], **config))
    assert not torch.equal(first, planned(FACTS, seed=1, **config))


def test_end_of_text_is_asked_for() -> None:
    assert not torch.equal(planned(FACTS, steps=1), planned(FACTS, steps=1, end_token=True))


def test_batches_below_the_bound_are_left_out_of_a_pass() -> None:
    assert not bool(planned(FACTS, steps=2, skip_loss=1e6).any())
    assert torch.equal(planned(FACTS, steps=2), planned(FACTS, steps=2, skip_loss=1e-6))
