"""Greedy generation, batched: the same text for a prompt whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from kecore.errors import ConfigError
from kecore.evaluate.batching import micro_batches
from kecore.evaluate.scoring import BATCH_TOKENS
from kecore.method import Progress, silent
from kecore.text import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from kecore.model_view import ModelView
    from kecore.text import Encoder

__all__ = ["Generation", "generate"]


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote after a prompt.

    Args:
        text: without special tokens and outer white space.
        ids: the tokens, the closing one included.
        finished: it ended by itself (end of sequence, or a newline where that ends it) and was not cut.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool


def generate(
    view: ModelView,
    encoder: Encoder,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    stop_at_newline: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> list[Generation]:
    """Continue prompts with the most probable token, again and again.

    The loop is kecore's own: ``model.generate`` merges the model's generation settings (a repetition
    penalty, banned tokens) into any it is given, and then the text is no longer the model's argmax. Rows
    are aligned at their last token, masked and numbered explicitly, with a key-value cache where the model
    has one. Rounding of batched matrix products can still tip a tie in low precision.

    Args:
        view: the model.
        encoder: decides special tokens and template.
        prompts: equal prompts are continued once.
        max_new_tokens: most tokens to write.
        stop_at_newline: a line break after the first visible character ends the text.
        batch_tokens: padded tokens of one micro-batch, the new ones included.
        progress: called after each micro-batch.

    Returns:
        One generation a prompt, in order.

    Raises:
        ConfigError: ``max_new_tokens`` is below 1.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    rows = {prompt: encoder.encode(prompt).ids for prompt in dict.fromkeys(prompts)}
    names, ids = list(rows), list(rows.values())
    end = _Ending(encoder, _closing_ids(view, encoder), stop_at_newline)
    found: dict[str, Generation] = {}
    with view.frozen(), torch.no_grad():
        sizes = [len(row) for row in ids]
        for batch in micro_batches(sizes, [max_new_tokens] * len(ids), batch_tokens):
            padded = encoder.rows([ids[i] for i in batch], [len(ids[i]) - 1 for i in batch])
            written = _decode(view, padded, max_new_tokens, end)
            found.update((names[i], end.read(new)) for i, new in zip(batch, written, strict=True))
            progress("generate", len(found), len(names))
    return [found[prompt] for prompt in prompts]


def _closing_ids(view: ModelView, encoder: Encoder) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    settings = getattr(view.model, "generation_config", None)
    value: Any = getattr(settings, "eos_token_id", None)
    values: list[Any] = [encoder.tokenizer.eos_token_id, *(value if isinstance(value, list) else [value])]
    return frozenset(value for value in values if isinstance(value, int))


@dataclass(frozen=True, slots=True)
class _Ending:
    """When a text is over, and what it then says."""

    encoder: Encoder
    closing: frozenset[int]
    newline: bool

    def text(self, ids: Sequence[int]) -> str:
        tokenizer = self.encoder.tokenizer
        text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).lstrip()

    def reached(self, ids: Sequence[int]) -> bool:
        return ids[-1] in self.closing or (self.newline and "\n" in self.text(ids))

    def read(self, ids: Sequence[int]) -> Generation:
        finished = self.reached(ids)
        text = self.text(ids[:-1] if ids[-1] in self.closing else ids)
        if self.newline:
            text = text.partition("\n")[0]
        return Generation(text.strip(), tuple(ids), finished)


def _decode(view: ModelView, rows: Rows, max_new_tokens: int, end: _Ending) -> list[list[int]]:
    """New token ids of rows that all end in the last column."""
    written: list[list[int]] = [[] for _ in range(len(rows.input_ids))]
    running = set(range(len(written)))
    rows = rows.to(view.device)
    step, past = rows, None
    every = torch.arange(len(written), device=view.device)
    while running:
        last = torch.full_like(every, step.input_ids.shape[1] - 1)
        out = view.forward(step, at=(every, last), past=past, use_cache=True)
        token = cast("Tensor", out.logits).argmax(-1).to(view.device)
        values = token.tolist()
        for i in list(running):
            written[i].append(values[i])
            if len(written[i]) == max_new_tokens or end.reached(written[i]):
                running.discard(i)
        new = Rows(token.unsqueeze(-1), torch.ones_like(token).unsqueeze(-1), torch.zeros_like(token))
        rows = _append(rows, new)
        # A model without a key-value cache reads the grown rows again.
        step, past = (rows, None) if out.cache is None else (new, (out.cache, rows.attention_mask))
    return written


def _append(rows: Rows, new: Rows) -> Rows:
    return Rows(
        torch.cat([rows.input_ids, new.input_ids], -1),
        torch.cat([rows.attention_mask, new.attention_mask], -1),
        rows.offset,
    )
