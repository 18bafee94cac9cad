"""LocFT-BF: ordinary mini-batch fine-tuning of one well chosen matrix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from kecore.edit import WeightEdit
from kecore.method import MethodContext
from kecore.model_view import ModelView
from kecore.text import Encoded, Encoder
from kecore.types import Capabilities, EditRequest, check_conflicts, unique
from kecore_methods.finetune.ft import MatrixConfig, tune_matrix
from kecore_methods.finetune.training import Targets, encoded

__all__ = ["LocFtBf"]


class LocFtConfig(MatrixConfig):
    """Configuration; steps, batch size and learning rate of the published Llama-3-8B set-up, the rate made relative."""

    depth: float = Field(
        default=0.7, ge=0, le=1, description="Depth of the tuned layer (22 of 32 in the published Llama-3-8B set-up)."
    )
    batch_size: int = Field(default=100, ge=1, description="Requests per update.")
    end_token: bool = Field(
        default=False, description="Ask for the end of the text after the target, as the published code does."
    )


class LocFtBf:
    """LocFT-BF: breadth-first mini-batches on one layer's down-projection."""

    name = "locft-bf"
    Config = LocFtConfig
    capabilities = Capabilities(kind="weights", batch=True, sequential=True)
    reference = "Yang et al., Fine-tuning Done Right in Model Editing, ICLR 2026, arXiv:2509.22072"
    api = (1, 1)

    def plan(self, view: ModelView, requests: Sequence[EditRequest], context: MethodContext) -> WeightEdit:
        """Tune the matrix on all requests; the model is bitwise as before when this returns."""
        config: LocFtConfig = context.config
        check_conflicts(requests)
        asked = unique(requests)
        layer = config.tuned_layer(view)
        # By content, so that the batches do not depend on the order in which requests come.
        items = [item for _, item in sorted(zip(asked, encoded(context.encoder, asked), strict=True), key=_text)]
        if config.end_token:
            items = [_ended(item, context.encoder) for item in items]
        shuffle = random.Random(context.seed).shuffle  # noqa: S311 - an order of batches is no secret

        def epoch(_: int) -> list[Targets]:
            if len(items) > config.batch_size:
                shuffle(items)
            starts = range(0, len(items), config.batch_size)
            return [
                Targets(view, context.encoder, items[i : i + config.batch_size], layer, "target_new") for i in starts
            ]

        with view.frozen(), context.stages("tune"):
            return tune_matrix(view, context, asked, self.name, epoch)


def _text(item: tuple[EditRequest, Encoded]) -> tuple[str, str]:
    return item[0].text, item[0].target


def _ended(item: Encoded, encoder: Encoder) -> Encoded:
    """With the tokenizer's end-of-sequence token behind the target, where it has one."""
    end = encoder.tokenizer.eos_token_id
    return item if end is None else replace(item, ids=(*item.ids, end))
