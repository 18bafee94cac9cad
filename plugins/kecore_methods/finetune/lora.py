"""LoRA and AdaLoRA: low-rank adapters trained on the facts and written as low-rank edits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.model import ModelView
from kecore_methods.finetune.adapter import Adapter, AdapterConfig, AdapterTraining, plan_adapter
from kecore_methods.presets import Published

if TYPE_CHECKING:
    from peft import PeftConfig
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable

__all__ = ["AdaLora", "AdaLoraConfig", "Lora", "LoraConfig"]


class LoraConfig(Published, AdapterConfig):
    """Configuration of LoRA; layers, contexts and where to stop were chosen for neighbours, see its page."""

    preset_file: ClassVar[str] = "lora"
    hparams_table: ClassVar[HparamsTable | None] = hparams.LORA

    depth_first: float = Field(default=0.03, ge=0, le=1, description="Depth of the first adapted layer.")
    depth_last: float = Field(default=0.17, ge=0, le=1, description="Depth of the last adapted layer.")
    contexts: int = Field(default=2, ge=0, description="Sampled prefixes put before a prompt; none in the paper.")
    rank: int = Field(default=32, ge=1, description="Rank of each factor pair (EasyEdit: 8).")
    learning_rate: float | None = Field(
        default=None, gt=0, description="Of Adam (EasyEdit: 5e-3); None takes the relative one."
    )
    stop_loss: float = Field(default=0.1, ge=0, description="Training ends when a pass has a mean loss below this.")


class AdaLoraConfig(Published, AdapterConfig):
    """Configuration of AdaLoRA; defaults of its paper where none of EasyEdit's is named."""

    preset_file: ClassVar[str] = "adalora"
    hparams_table: ClassVar[HparamsTable | None] = hparams.ADALORA

    alpha: float = Field(default=8, gt=0, description="Triplets are scaled by alpha / initial rank.")
    learning_rate: float | None = Field(default=5e-3, gt=0, description="Of Adam (EasyEdit: 5e-3).")
    stop_loss: float = Field(
        default=0.0, ge=0, description="As of LoRA; at 0 all passes are made, so that the budget of ranks is met."
    )
    initial_rank: int = Field(default=12, ge=1, description="Rank of each adapter at the start (peft: 12).")
    warm_up: float = Field(default=0.1, ge=0, lt=1, description="Share of the updates before ranks are cut.")
    settle: float = Field(default=0.3, ge=0, lt=1, description="Share of the updates after the last cut.")
    orthogonality: float = Field(default=0.5, ge=0, description="Weight of the regulariser (peft: 0.5).")


class Lora:
    """LoRA: ``ΔW = (alpha / r) B A`` with both factors trained on the facts."""

    name = "lora"
    Config = LoraConfig
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_subject=False)
    reference = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Train an adapter on all requests; the model is bitwise as before when this returns."""
        return plan_adapter(view, batch, context, self.name, AdapterTraining(context.config))


class AdaLoraTraining(AdapterTraining):
    """AdaLoRA's parametrisation, its regulariser, and its allocation of ranks after every update.

    Args:
        config: the configuration.
    """

    def __init__(self, config: AdaLoraConfig) -> None:
        super().__init__(config)
        self.adalora = config

    def peft_config(self, peft: Any, updates: int) -> PeftConfig:
        """Return an AdaLoRA adapter whose ranks are cut between two shares of all updates."""
        config = self.adalora
        return peft.AdaLoraConfig(
            init_r=config.initial_rank,
            target_r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            total_step=updates,
            tinit=int(config.warm_up * updates),
            tfinal=int(config.settle * updates),
        )

    def loss(self, batch: Any, adapter: Adapter) -> Tensor:
        """Return the targets' negative log-likelihood plus the regulariser."""
        return batch.loss() + self.adalora.orthogonality * non_orthogonality(adapter)

    def after_update(self, adapter: Adapter, update: int) -> None:
        """Give the ranks to the matrices that matter most so far."""
        adapter.tuner.update_and_allocate(update)  # type: ignore[operator]


class AdaLora:
    """AdaLoRA: ``ΔW = P Λ Q`` with ranks given to the matrices that matter most."""

    name = "adalora"
    Config = AdaLoraConfig
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_subject=False)
    reference = "Zhang et al., Adaptive Budget Allocation for Fine-Tuning, ICLR 2023, arXiv:2303.10512"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Train an adapter on all requests; the model is bitwise as before when this returns."""
        return plan_adapter(view, batch, context, self.name, AdaLoraTraining(context.config))


def non_orthogonality(adapter: Adapter) -> Tensor:
    """Return AdaLoRA's regulariser, ``|PᵀP - I|_F² + |QQᵀ - I|_F²`` (eq. 4), its mean over the adapted matrices."""
    terms: list[Tensor] = []
    for path in adapter.maps:
        layer = adapter.layer(path)
        p = next(iter(layer.lora_B.values()))  # [d_out, rank]
        q = next(iter(layer.lora_A.values()))  # [rank, d_in]
        identity = torch.eye(q.shape[0], device=q.device)
        terms.append((p.t() @ p - identity).square().sum() + (q @ q.t() - identity).square().sum())
    return torch.stack(terms).mean()
