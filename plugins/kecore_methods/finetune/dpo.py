"""DPO as an editor: an adapter that prefers the new answer to the old one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities, EditRequest
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.tuning import Kept, Targets
from kecore.model import ModelView
from kecore.text import Encoded, Encoder
from kecore_methods.finetune.adapter import AdapterConfig, plan_adapter
from kecore_methods.finetune.lora import lora_kind

__all__ = ["Dpo", "dpo_loss"]


class DpoConfig(AdapterConfig):
    """Configuration of DPO; beta from the paper."""

    beta: float = Field(default=0.1, gt=0, description="How much a difference to the unedited model counts.")
    likelihood: float = Field(
        default=0.0, ge=0, description="Weight of the new answer's negative log-likelihood beside the preference."
    )
    stop_loss: float = Field(
        default=0.4, ge=0, description="Training ends when a pass has every fact's loss below this (0.69 at the start)."
    )


class Dpo:
    """DPO: raise the new answer's odds against the old one, relative to the unedited model."""

    name = "dpo"
    Config = DpoConfig
    capabilities = Capabilities(kind="weights", batch=True, sequential=True)
    reference = "Rafailov et al., Direct Preference Optimization, NeurIPS 2023, arXiv:2305.18290"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Train an adapter on all requests; the model is bitwise as before when this returns."""
        config: DpoConfig = context.config

        return plan_adapter(
            view, batch, context, self.name, lambda peft, _: lora_kind(config, peft),
            make=_Pairs, loss=lambda pairs, _: pairs.loss(config),
        )  # fmt: skip


def dpo_loss(new: Tensor, old: Tensor, new_before: Tensor, old_before: Tensor, beta: float) -> Tensor:
    """Return DPO's loss (eq. 7), ``[pairs]``.

    Args:
        new: ``[pairs]``, log-probabilities of the preferred answers.
        old: ``[pairs]``, log-probabilities of the other answers.
        new_before: log-probabilities of the preferred answers in the reference model.
        old_before: log-probabilities of the other answers in the reference model.
        beta: how much a difference to the reference counts.
    """
    return -logsigmoid(beta * ((new - new_before) - (old - old_before)))


class _Pairs:
    """New and old answers to the same prompts, with what the unedited model gives both."""

    def __init__(
        self,
        view: ModelView,
        encoder: Encoder,
        requests: Sequence[EditRequest],
        items: Sequence[Encoded],
        layer: int,
        kept: Kept | None,
    ) -> None:
        self.count = len(items)
        old: list[Encoded] = []
        for request, item in zip(requests, items, strict=True):
            if request.ground_truth is not None:
                old.append(encoder.encode(request.text, request.ground_truth))
            else:
                old.append(_likeliest_other(view, encoder, item))
        self.new = Targets(view, encoder, items, layer, "target_new", kept)
        self.old = Targets(view, encoder, old, layer, "target_new")
        with torch.no_grad():
            self.before = self.new.log_probs(), self.old.log_probs()

    def loss(self, config: DpoConfig) -> Tensor:
        """Return the loss of each pair, ``[pairs]``.

        It is DPO's, plus the weighted negative log-likelihood of the new answer and the KL of preserved prompts.
        """
        new, preservation = self.new.scores()
        new_before, old_before = self.before
        preference = dpo_loss(new, self.old.log_probs(), new_before=new_before, old_before=old_before, beta=config.beta)
        return preference + preservation - config.likelihood * new / self.new.length


def _likeliest_other(view: ModelView, encoder: Encoder, item: Encoded) -> Encoded:
    """Return the prompt with the model's most likely next token that does not open the target."""
    prompt = item.ids[: item.start]
    last = torch.tensor([len(prompt) - 1])
    logits = view.logits_at(encoder.rows([prompt]), torch.zeros_like(last), last)[0].clone()
    logits[item.ids[item.start]] = -torch.inf
    return replace(item, ids=(*prompt, int(logits.argmax())))
