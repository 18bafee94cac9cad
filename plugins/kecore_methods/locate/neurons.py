"""Knowledge neurons: which activations inside the feed-forward blocks express a fact (arXiv 2104.08696).

A neuron is one input of a layer's value projection, read at a prompt's last token. How much it adds to the probability
of the answer is told by integrated gradients; those that matter in many prompts of one fact are its knowledge neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.api.progress import Progress, silent
from kecore.engine.replay import Replay
from kecore.memory import Need, backward_bytes, cached_bytes, logits_bytes
from kecore.model import ModelView
from kecore.model.sites import Key
from kecore.text import Encoder

__all__ = ["Attributions", "Neuron", "attribute", "attribution_need", "knowledge_neurons", "next_tokens"]


@dataclass(frozen=True, slots=True)
class Neuron:
    """A knowledge neuron.

    Args:
        layer: index of its layer.
        index: which input of the layer's value projection it is.
        attribution: what it adds to the probability of the answer, mean over the prompts.
        share: share of the prompts in which it passed the threshold.
        activation: its activation, mean over the prompts.
    """

    layer: int
    index: int
    attribution: float
    share: float
    activation: float


@dataclass(frozen=True, slots=True, eq=False)
class Attributions:
    """Contributions of every neuron to the probability of an answer, for some prompts.

    Args:
        clean: ``[prompts]``, probability of the answer.
        scores: for each layer ``[prompts, d_in]`` float32, the attributions.
        activations: for each layer ``[prompts, d_in]`` float32.
    """

    clean: Tensor
    scores: tuple[Tensor, ...]
    activations: tuple[Tensor, ...]


@torch.no_grad()
def next_tokens(view: ModelView, encoder: Encoder, prompts: Sequence[str]) -> list[int]:
    """Return the model's most likely next token of each prompt."""
    ids = [encoder.encode(prompt).ids for prompt in prompts]
    rows = encoder.rows(ids)
    last = torch.tensor([len(row) - 1 for row in ids], device=view.device)
    with view.frozen():
        logits = view.logits_at(rows, torch.arange(len(ids), device=view.device), last)
    return [int(token) for token in logits.argmax(-1)]


def attribute(
    view: ModelView,
    encoder: Encoder,
    prompts: Sequence[str],
    answers: Sequence[int],
    *,
    steps: int = 20,
    memory: int = 2 << 30,
    progress: Progress = silent,
) -> Attributions:
    """Attribute an answer's probability to each neuron by integrated gradients (section 3.2, eq. 5, a Riemann sum).

    ``Attr(w_i) = w_i / m sum_k dP(k/m w)/dw_i`` with ``P(w)`` the probability of the answer where the last token's
    activations in the layer are ``w``. As in the released code, all activations of a layer go from zero to their value
    together, so that a layer's attributions add up to ``P(w) - P(0)`` as the steps become many. What scaled activations
    do passes through the value projection ``W``, so the gradient is taken there and ``dP/dw = Wᵀ dP/d(Ww)``.

    Args:
        view: the model.
        encoder: its tokenizer.
        prompts: texts.
        answers: the token whose probability is explained, for each prompt.
        steps: terms of the sum, ``m``.
        memory: bytes of activations per chunk of rows.
        progress: called once a layer.

    Raises:
        PromptTooLongError: a prompt does not fit the model's context.
    """
    ids = [encoder.encode(prompt).ids for prompt in prompts]
    lookups = [len(row) - 1 for row in ids]
    layers = range(len(view.layers))
    prompt = torch.arange(len(ids), device=view.device)  # [prompts]
    answer = torch.tensor(answers, device=view.device)  # [prompts]
    lookup = torch.tensor(lookups, device=view.device)  # [prompts]
    with view.frozen():
        with torch.no_grad():
            rows = encoder.rows(ids, lookups)
            last_column = torch.full_like(prompt, max(lookups))  # rows are aligned at their last token
            out = view.run(rows, taps=map(Key, layers), at=(prompt, last_column))
        keys = [out[Key(layer)][:, -1].float() for layer in layers]  # [prompts, d_in] of each layer
        scores: list[Tensor] = []
        first_replay = Replay(view, encoder, ids, lookups, 0)
        rows_at_once = max(1, memory // _row_bytes(view, max(lookups) + 1))
        for layer in layers:
            weight = view.layers[layer].site.linear.weight.float()
            replay = first_replay.at_layer(layer)
            value = keys[layer] @ weight.t()  # [prompts, d_model]
            gradient = _integrate(replay, value, answer, lookup, steps=steps, rows_at_once=rows_at_once)
            scores.append((keys[layer] * (gradient @ weight)).cpu())  # [prompts, d_in]
            progress("attribution", layer + 1, len(layers))
    clean = out.logits.float().softmax(-1)[prompt, answer].cpu()
    return Attributions(clean, tuple(scores), tuple(key.cpu() for key in keys))


def _integrate(
    replay: Replay, value: Tensor, answer: Tensor, lookups: Tensor, *, steps: int, rows_at_once: int
) -> Tensor:
    """Return the mean over ``alpha = 1/m .. m/m`` of ``dP / d(Ww)``, where the output is ``alpha Ww``.

    Args:
        replay: passes from the layer on.
        value: ``[prompts, d_model]``, the layer's output ``Ww`` at each prompt's last token.
        answer: ``[prompts]`` tokens.
        lookups: ``[prompts]``, the column of the last token.
        steps: ``m``.
        rows_at_once: most rows of a pass; there is one row for each prompt and step.
    """
    total = torch.zeros_like(value)
    for chunk in torch.arange(len(value) * steps, device=value.device).split(rows_at_once):
        prompt, alpha = chunk // steps, (chunk % steps + 1) / steps  # [rows] each
        delta = ((alpha - 1)[:, None] * value[prompt]).requires_grad_()  # [rows, d_model]
        row = torch.arange(len(chunk), device=value.device)
        logits = replay.select(prompt).logits(delta, row, lookups[prompt])  # [rows, vocab]
        probability = logits.float().softmax(-1)[row, answer[prompt]]
        total.index_add_(0, prompt, torch.autograd.grad(probability.sum(), delta)[0])
    return total / steps


def knowledge_neurons(
    attributions: Attributions, *, threshold: float = 0.2, share: float = 0.4, least: int = 2
) -> list[Neuron]:
    """Return the neurons that matter in many prompts of one fact (section 3.3), highest attribution first.

    Args:
        attributions: of all prompts of the fact.
        threshold: a neuron counts in a prompt if its attribution exceeds this share of the highest one (``t``).
        share: neurons that count in more than this share of the prompts are returned (``p``).
        least: where these are fewer, the share is lowered until they are so many, as the authors do.
    """
    prompts = len(attributions.clean)
    highest_in_layer = [scores.max(1).values for scores in attributions.scores]  # [prompts] each
    highest = torch.stack(highest_in_layer).max(0).values
    counts = [(scores > threshold * highest[:, None]).sum(0) for scores in attributions.scores]  # [d_in] each
    all_counts = torch.cat(counts)
    lowered = max(1, int(all_counts.topk(min(least, len(all_counts))).values[-1]))
    neurons: list[Neuron] = []
    for layer, count in enumerate(counts):
        scores, activations = attributions.scores[layer], attributions.activations[layer]
        for index in (count > min(share * prompts, lowered - 1)).nonzero().flatten().tolist():
            neurons.append(
                Neuron(
                    layer,
                    index,
                    attribution=float(scores[:, index].mean()),
                    share=float(count[index]) / prompts,
                    activation=float(activations[:, index].mean()),
                )
            )
    return sorted(neurons, key=lambda neuron: -neuron.attribution)


def attribution_need(view: ModelView, prompts: int, steps: int, width: int) -> Need:
    """Return the memory that :func:`attribute` needs, in rows.

    Args:
        view: the model.
        prompts: number of prompts of one fact.
        steps: rows of each prompt.
        width: tokens of the longest prompt.
    """
    widest = max(layer.site.linear.d_in for layer in view.layers)
    parts = {"activations and attributions": 2 * 4 * prompts * widest * len(view.layers)}
    return Need("attribution", parts, _row_bytes(view, width), prompts * steps, 1)


def _row_bytes(view: ModelView, width: int) -> int:
    """Return the bytes of one row: its activations, keys and values of the tokens before the last, and its logits."""
    return width * (backward_bytes(view, 0) + cached_bytes(view, 0)) + logits_bytes(view)
