"""Whether tokens still go to the experts that they went to before an edit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kecore.edit import without_edits
from kecore.inference.scoring import BATCH_TOKENS
from kecore.model import ModelView, Routed
from kecore.model.sites import Site
from kecore.text import Encoder, Rows

__all__ = ["routing_change"]


@torch.no_grad()
def routing_change(
    view: ModelView, encoder: Encoder, prompts: Sequence[str], *, batch_tokens: int = BATCH_TOKENS
) -> dict[int, float]:
    """Return the share of tokens whose set of experts is another one than without the edits on the model.

    Prompts that the edits are not about (neighbours, other texts) should keep theirs.

    Args:
        view: the model, with the edits on it.
        encoder: its tokenizer.
        prompts: texts whose tokens are counted.
        batch_tokens: padded tokens of one pass; of speed and memory only.

    Returns:
        By index of each layer with experts, a number in [0, 1]; empty for a model without such layers. Layers up to the
        lowest edited one are at 0.
    """
    layers = [layer.index for layer in view.layers if layer.experts is not None]
    if not layers or not prompts:
        return {}
    ids = sorted({encoder.encode(prompt).ids for prompt in prompts}, key=len)
    changed = dict.fromkeys(layers, 0)
    tokens = 0
    with view.frozen():
        for begin, end in _batches([len(row) for row in ids], batch_tokens):
            rows = encoder.rows(ids[begin:end]).to(view.device)
            is_real = rows.attention_mask.bool()  # [rows, width]
            after = _chosen_experts(view, rows, layers)
            with without_edits(view.model):
                before = _chosen_experts(view, rows, layers)
            tokens += int(is_real.sum())
            for layer in layers:
                differs = (after[layer] != before[layer]).any(-1)  # [rows, width]
                changed[layer] += int((differs & is_real.to(differs.device)).sum())
    return {layer: count / tokens for layer, count in changed.items()}


def _chosen_experts(view: ModelView, rows: Rows, layers: Sequence[int]) -> dict[int, Tensor]:
    """Return the experts of every token in ascending order, ``[rows, width, k]`` of each layer."""
    taps: list[Site] = [Routed(layer, "experts") for layer in layers]
    out = view.run(rows, taps=taps, last=layers[-1])
    return {layer: out[Routed(layer, "experts")].sort(-1).values for layer in layers}


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, int]]:
    """Return where each batch of rows begins and ends, of rows by rising length."""
    batches: list[tuple[int, int]] = []
    begin = 0
    for end in range(1, len(lengths) + 1):
        is_last = end == len(lengths)
        if is_last or (end + 1 - begin) * lengths[end] > batch_tokens:
            batches.append((begin, end))
            begin = end
    return batches
