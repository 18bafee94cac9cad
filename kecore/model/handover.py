"""Encoder-decoders as models of one row of tokens: the encoder reads its beginning, the decoder what comes behind.

A row is laid out ``source closing start target``. ``closing`` ends what the encoder reads, ``start`` opens what the
decoder writes; the two side by side are the *handover*. The decoder's layers are the model's layers, so a state stands
at ``start`` and behind it, and the last token of a prompt is the last of the handover. In a row without a handover
the decoder reads everything, and the encoder a text without words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kecore.api.errors import UnsupportedModelError
from kecore.model.layout import RightPadding
from kecore.text import Rows

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Handover", "SplitRows"]


@dataclass(frozen=True, slots=True)
class Handover:
    """The tokens between what an encoder reads and what its decoder writes.

    Args:
        closing: the token that ends the encoder's text.
        start: the token that the decoder begins with.
        forced: tokens that the model is made to write first, such as the language of a translation.
    """

    closing: int
    start: int
    forced: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """All of its tokens, in the order in which they stand in a row."""
        return (self.closing, self.start, *self.forced)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Read a model's handover from its configuration; None for a model without an encoder.

        Raises:
            UnsupportedModelError: the configuration lacks one of the two tokens.
        """
        config: Any = getattr(model, "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            return None
        closing = _token(model, "eos_token_id")
        start = _token(model, "decoder_start_token_id")
        if start is None:
            start = _shifted_start(model)
        if closing is None or start is None:
            missing = "eos_token_id" if closing is None else "decoder_start_token_id"
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder-decoder whose configuration has no {missing}, so nothing says "
                f"how its decoder begins; set model.config.{missing} to the token that the model was trained with"
            )
        forced = _token(model, "forced_bos_token_id")
        return cls(closing, start, () if forced is None else (forced,))

    def arguments(self, rows: Rows, source: Rows | None = None) -> dict[str, Any]:
        """Return what the model's ``forward`` is called with.

        Args:
            rows: what the decoder reads, padded on the right.
            source: what the encoder reads; a text without words where None.
        """
        if source is None:
            ids = torch.full_like(rows.input_ids[:, :1], self.closing)  # [rows, 1]
            source = Rows(ids, torch.ones_like(ids), torch.zeros_like(rows.offset))
        source = source.to(rows.input_ids.device)
        return {
            "input_ids": source.input_ids,
            "attention_mask": source.attention_mask,
            "decoder_input_ids": rows.input_ids,
            "decoder_attention_mask": rows.attention_mask,
        }


def _token(model: nn.Module, name: str) -> int | None:
    """Return a token id from the configuration of a model's texts, its own or that for generation; None if unset."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(config, name, None)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return None


def _shifted_start(model: nn.Module) -> int | None:
    """Return the token that a model puts before labels when it trains; None where that depends on the labels."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return None
    device = next(model.parameters()).device
    starts: set[int] = set()
    for labels in ([5, 6], [7, 8]):
        try:
            starts.add(int(shift(labels=torch.tensor([labels], device=device))[0, 0]))
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return None  # such as T5's, which asks for the configuration that is missing
    return starts.pop() if len(starts) == 1 else None


class SplitRows(RightPadding):
    """Token rows taken apart at their handovers.

    The decoder's tokens are rotated to the first columns, so that a state of the decoder and a state of the rows hold
    the same numbers in another order.

    Args:
        rows: token rows with padding on either side.
        handover: of the model.
    """

    def __init__(self, rows: Rows, handover: Handover) -> None:
        rows = rows.to("cpu")
        begin = _decoder_columns(rows, handover)  # [rows]
        super().__init__(replace(rows, offset=begin))
        self.source = _source_rows(rows, begin, handover.closing)

    def rows(self, rows: Rows) -> Rows:
        """Return what the decoder reads, with its tokens first; the encoder's are padding there."""
        column = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
        is_decoders = column >= self.offset.to(column.device)[:, None]  # [rows, width]
        return super().rows(replace(rows, attention_mask=rows.attention_mask * is_decoders))


def _decoder_columns(rows: Rows, handover: Handover) -> Tensor:
    """Return the column of each row at which the decoder begins, ``[rows]``: its first token without a handover."""
    ids, is_real = rows.input_ids, rows.attention_mask.bool()
    closes = (ids[:, :-1] == handover.closing) & is_real[:, :-1]  # [rows, width - 1]
    starts = (ids[:, 1:] == handover.start) & is_real[:, 1:]  # [rows, width - 1]
    is_handover = closes & starts
    column = 1 + is_handover.int().argmax(-1) if ids.shape[1] > 1 else torch.zeros_like(rows.offset)
    return torch.where(is_handover.any(-1), column, rows.offset)


def _source_rows(rows: Rows, begin: Tensor, closing: int) -> Rows:
    """Return what the encoder reads, padded on the right; the closing token alone where a row has no handover."""
    sources: list[Tensor] = []
    for ids, first, end in zip(rows.input_ids, rows.offset.tolist(), begin.tolist(), strict=True):
        sources.append(ids[first:end] if end > first else ids.new_tensor([closing]))
    padded = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True)  # [rows, longest source]
    length = torch.tensor([len(source) for source in sources])  # [rows]
    mask = (torch.arange(padded.shape[1]) < length[:, None]).long()  # [rows, longest source]
    return Rows(padded, mask, torch.zeros_like(rows.offset))
