"""DPO as an editor: an adapter that prefers the new answer to the old one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.tuning import Preserved, Targets, Wording
from kecore.model import ModelView
from kecore.text import Encoded, Encoder
from kecore_methods import hparams
from kecore_methods.finetune.adapter import Adapter, AdapterConfig, AdapterTraining, plan_adapter
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published

__all__ = ["Dpo", "dpo_loss"]


class DpoConfig(Published, AdapterConfig):
    """Configuration of DPO; beta from the paper."""

    preset_file: ClassVar[str] = "dpo"
    hparams_table: ClassVar[HparamsTable | None] = hparams.DPO

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
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_subject=False)
    reference = "Rafailov et al., Direct Preference Optimization, NeurIPS 2023, arXiv:2305.18290"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Train an adapter on all requests; the model is bitwise as before when this returns."""
        return plan_adapter(view, batch, context, self.name, DpoTraining(context.config))


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


class Pairs:
    """New and old answers to the same prompts, with what the unedited model gives both.

    Args:
        new: the targets.
        old: the old answers to the same prompts.
    """

    def __init__(self, new: Targets, old: Targets) -> None:
        self.new, self.old = new, old
        self.count = new.count
        with torch.no_grad():
            self.new_before, self.old_before = new.log_probs(), old.log_probs()  # [pairs] each


class DpoTraining(AdapterTraining):
    """A LoRA adapter that is trained by DPO's loss.

    Args:
        config: the configuration.
    """

    def __init__(self, config: DpoConfig) -> None:
        super().__init__(config)
        self.dpo = config

    def make_batch(
        self,
        view: ModelView,
        encoder: Encoder,
        wordings: Sequence[Wording],
        layer: int,
        preserved: Preserved | None,
    ) -> Pairs:
        """Return the pairs of new and old answers; the old one is the ground truth, or else the model's own."""
        new = [wording.encoded for wording in wordings]
        old: list[Encoded] = []
        for wording in wordings:
            ground_truth = wording.request.ground_truth
            if ground_truth is not None:
                old.append(encoder.encode(wording.request.text, ground_truth))
            else:
                old.append(_likeliest_other(view, encoder, wording.encoded))
        return Pairs(
            Targets(view, encoder, new, layer, "target_new", preserved),
            Targets(view, encoder, old, layer, "target_new"),
        )

    def loss(self, batch: Pairs, adapter: Adapter) -> Tensor:
        """Return the loss of each pair, ``[pairs]``.

        It is DPO's, plus the weighted negative log-likelihood of the new answer and the KL of preserved prompts.
        """
        del adapter
        new, preservation = batch.new.scores()
        old = batch.old.log_probs()
        preference = dpo_loss(new, old, new_before=batch.new_before, old_before=batch.old_before, beta=self.dpo.beta)
        return preference + preservation - self.dpo.likelihood * new / batch.new.length


def _likeliest_other(view: ModelView, encoder: Encoder, item: Encoded) -> Encoded:
    """Return the prompt with the model's most likely next token that does not open the target."""
    prompt = item.ids[: item.start]
    last = torch.tensor([len(prompt) - 1])
    logits = view.logits_at(encoder.rows([prompt]), torch.zeros_like(last), last)[0].clone()
    logits[item.ids[item.start]] = -torch.inf
    return replace(item, ids=(*prompt, int(logits.argmax())))
