"""LocFT-BF: ordinary mini-batch fine-tuning of one well chosen matrix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import ClassVar

from pydantic import Field

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.tuning import Targets, Wording, batch_need, estimate_items, in_contexts
from kecore.memory import Need
from kecore.model import ModelView
from kecore.text import Encoded, Encoder
from kecore_methods.finetune.ft import MatrixConfig, tune_matrix
from kecore_methods.presets import Published

__all__ = ["LocFtBf"]


class LocFtConfig(Published, MatrixConfig):
    """Configuration; passes of the published Llama-3-8B set-up, its learning rate made relative, smaller batches."""

    preset_file: ClassVar[str] = "locft-bf"

    depth: float = Field(
        default=0.17, ge=0, le=1, description="Depth of the tuned layer (22 of 32 in the published Llama-3-8B set-up)."
    )
    relative_learning_rate: float = Field(
        default=0.01, gt=0, description="Of Adam, relative to the matrix's root mean square (0.025 as published)."
    )
    batch_size: int = Field(default=10, ge=1, description="Requests per update (100 as published, of thousands).")
    stop_loss: float = Field(default=0.1, ge=0, description="Tuning ends when a pass has a mean loss below this.")
    contexts: int = Field(default=2, ge=0, description="Sampled prefixes put before a prompt; 0 as published.")
    context_tokens: int = Field(default=10, ge=1, description="Length of each prefix.")
    end_token: bool = Field(
        default=False, description="Ask for the end of the text after the target, as the published code does."
    )

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of tuning one matrix on prompts in their contexts."""
        (need,) = super().needs(view, batch)
        items = estimate_items(batch.encodings, self.contexts, self.context_tokens, self.others)
        size = self.batch_size * (self.contexts + 1 + self.others)
        return [batch_need(view, items, size, self.tuned_layer(view), need.parts, epochs=self.steps)]


class LocFtBf:
    """LocFT-BF: breadth-first mini-batches on one layer's down-projection."""

    name = "locft-bf"
    Config = LocFtConfig
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_subject=False)
    reference = "Yang et al., Fine-tuning Done Right in Model Editing, ICLR 2026, arXiv:2509.22072"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Tune the matrix on all requests; the model is bitwise as before when this returns."""
        config: LocFtConfig = context.config
        layer = config.tuned_layer(view)
        # By content, so that the batches do not depend on the order in which requests come.
        requests = batch.requests
        order = sorted(range(len(batch)), key=lambda i: (requests[i].text, requests[i].target))
        shuffle = random.Random(context.seed).shuffle  # noqa: S311 - an order of batches is no secret
        size = config.batch_size
        only_batch: list[Targets] = []

        def make_batch(facts: Sequence[Sequence[Wording]]) -> Targets:
            items = [wording.encoded for wording in chain.from_iterable(facts)]
            if config.end_token:
                items = [_append_end(item, context.encoder) for item in items]
            preserved = config.prompts_to_preserve(context.encoder, [fact[0].request for fact in facts])
            return Targets(view, context.encoder, items, layer, "target_new", preserved)

        def batches_of_pass(_: int) -> list[Targets]:
            if len(facts) > size:
                shuffle(facts)
                return [make_batch(facts[i : i + size]) for i in range(0, len(facts), size)]
            if not only_batch:
                only_batch.append(make_batch(facts))  # the same in every pass, so the layers below run once
            return only_batch

        with view.frozen():
            with context.stages("contexts"):
                facts = in_contexts(view, context, batch.select(order), config.contexts, config.context_tokens)
            with context.stages("tune"):
                return tune_matrix(view, context, requests, self.name, batches_of_pass)


def _append_end(item: Encoded, encoder: Encoder) -> Encoded:
    """Return the item with the tokenizer's end-of-sequence token behind the target, where it has one."""
    end = encoder.tokenizer.eos_token_id
    if end is None:
        return item
    return replace(item, ids=(*item.ids, end))
