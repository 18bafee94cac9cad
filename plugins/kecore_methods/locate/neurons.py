"""Knowledge neurons: which activations inside the feed-forward blocks express a fact (arXiv 2104.08696).

A neuron is one input of a layer's value projection, read at a prompt's last token. How much it adds to the probability
of the answer is told by integrated gradients; those that matter in many prompts of one fact are its knowledge neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.api.errors import LayerError
from kecore.api.progress import Progress, silent
from kecore.engine.replay import Replay
from kecore.memory import Need, backward_bytes, cached_bytes, logits_bytes
from kecore.model import ModelView
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
    """What every neuron adds to the probability of an answer, for some prompts.

    Args:
        clean: ``[prompts]``, probability of the answer.
        scores: of each layer ``[prompts, d_in]`` float32, the attributions.
        activations: of each layer ``[prompts, d_in]`` float32.
    """

    clean: Tensor
    scores: tuple[Tensor, ...]
    activations: tuple[Tensor, ...]


@torch.no_grad()
def next_tokens(view: ModelView, encoder: Encoder, prompts: Sequence[str]) -> list[int]:
    """The model's most likely next token of each prompt."""
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
    """Attribution of every neuron by integrated gradients (section 3.2, eq. 5, its Riemann sum).

    ``Attr(w_i) = w_i / m sum_k dP(k/m w)/dw_i`` with ``P(w)`` the probability of the answer where the last token's
    activations in the layer are ``w``. As in the released code, all activations of a layer go from zero to their value
    together, so that a layer's attributions add up to ``P(w) - P(0)`` as the steps become many. What scaled activations
    do passes through the value projection ``W``, so the gradient is taken there and ``dP/dw = Wᵀ dP/d(Ww)``.

    Args:
        view: the model.
        encoder: its tokenizer.
        prompts: texts.
        answers: of each prompt the token whose probability is explained.
        steps: terms of the sum, ``m``.
        memory: bytes of activations per chunk of rows.
        progress: called once a layer.

    Raises:
        PromptTooLongError: a prompt does not fit the model's context.
    """
    ids = [encoder.encode(prompt).ids for prompt in prompts]
    lookups = [len(row) - 1 for row in ids]
    layers = range(len(view.layers))
    every = torch.arange(len(ids), device=view.device)
    answer, place = torch.tensor(answers, device=view.device), torch.tensor(lookups, device=view.device)
    size = max(1, memory // _row_bytes(view, max(lookups) + 1))
    with view.frozen():
        with torch.no_grad():
            rows = encoder.rows(ids, lookups)
            out = view.forward(rows, keys=layers, at=(every, torch.full_like(every, max(lookups))))
        keys = [out.keys[layer][:, -1].float() for layer in layers]
        scores: list[Tensor] = []
        first = Replay(view, encoder, ids, lookups, 0)
        for layer in layers:
            weight = view.layers[layer].value_projection.weight.float()
            replay = first.at_layer(layer)
            value, total = keys[layer] @ weight.t(), torch.zeros(len(ids), view.width, device=view.device)
            for part in torch.arange(len(ids) * steps, device=view.device).split(size):
                own, alpha = part // steps, (part % steps + 1) / steps
                delta = ((alpha - 1)[:, None] * value[own]).requires_grad_()
                chosen = torch.arange(len(part), device=view.device)
                logits = replay.select(own).logits(delta, chosen, place[own])
                probability = logits.float().softmax(-1)[chosen, answer[own]]
                total.index_add_(0, own, torch.autograd.grad(probability.sum(), delta)[0])
            scores.append((keys[layer] * (total / steps @ weight)).cpu())
            progress("attribution", layer + 1, len(layers))
    if out.logits is None:  # guaranteed by the pass, which is not stopped early
        raise LayerError("the pass ended before the logits")
    clean = out.logits.float().softmax(-1)[every, answer].cpu()
    return Attributions(clean, tuple(scores), tuple(key.cpu() for key in keys))


def knowledge_neurons(
    found: Attributions, *, threshold: float = 0.2, share: float = 0.4, least: int = 2
) -> list[Neuron]:
    """The neurons that matter in many prompts of one fact (section 3.3), highest attribution first.

    Args:
        found: attributions of all prompts of the fact.
        threshold: of a prompt, neurons whose attribution exceeds this share of the highest one count (``t``).
        share: neurons that count in more than this share of the prompts are kept (``p``).
        least: where fewer are kept, the share is lowered until so many are, as the authors do.
    """
    prompts = len(found.clean)
    highest = torch.stack([scores.max(1).values for scores in found.scores]).max(0).values
    counts = [(scores > threshold * highest[:, None]).sum(0) for scores in found.scores]
    every = torch.cat(counts)
    enough = max(1, int(every.topk(min(least, len(every))).values[-1]))
    kept: list[Neuron] = []
    for layer, count in enumerate(counts):
        for i in (count > min(share * prompts, enough - 1)).nonzero().flatten().tolist():
            score, activation = float(found.scores[layer][:, i].mean()), float(found.activations[layer][:, i].mean())
            kept.append(Neuron(layer, i, score, float(count[i]) / prompts, activation))
    return sorted(kept, key=lambda neuron: -neuron.attribution)


def attribution_need(view: ModelView, prompts: int, steps: int, width: int) -> Need:
    """Memory of :func:`attribute`, in rows.

    Args:
        view: the model.
        prompts: of one fact.
        steps: rows of each.
        width: tokens of the longest.
    """
    widest = max(layer.value_projection.d_in for layer in view.layers)
    parts = {"activations and attributions": 2 * 4 * prompts * widest * len(view.layers)}
    return Need("attribution", parts, _row_bytes(view, width), prompts * steps, 1)


def _row_bytes(view: ModelView, width: int) -> int:
    """Bytes that one row takes: its activations, keys and values of the tokens before the last, and its logits."""
    return width * (backward_bytes(view, 0) + cached_bytes(view, 0)) + logits_bytes(view)
