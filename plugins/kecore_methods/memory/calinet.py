"""CaliNet: calibration slots beside feed-forward blocks, trained on the facts while everything else is frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import ModuleEdit, suspended
from kecore.engine.layers import at_depth
from kecore.engine.passes import residual_stream
from kecore.engine.side import side_edit
from kecore.engine.tuning import KeptConfig, Targets, Wording, batch_need, in_contexts, lengthened, train
from kecore.memory import Need
from kecore.model import ModelView
from kecore_methods.memory.neurons import Block, Neurons, queries
from kecore_methods.memory.unrelated import unrelated

__all__ = ["CaliNet", "CaliNetConfig"]


class CaliNetConfig(KeptConfig):
    """What may be chosen. "Tried" means the table in docs/methods/calinet.md, records 60 to 69 of CounterFact."""

    layers: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="Layers with slots; None goes by depth (kecore's choice)."
    )
    first_depth: float = Field(
        default=0.17,
        ge=0,
        le=1,
        description="Depth of the lowest of them (kecore's choice, tried: MEMIT's last layer; the paper has the "
        "decoder's last).",
    )
    last_depth: float = Field(
        default=0.17, ge=0, le=1, description="Depth of the highest of them (kecore's choice, as first_depth)."
    )
    slots: int | None = Field(
        default=None,
        ge=1,
        description="Slots of an edit in each layer (64 in the paper); None goes by the number of facts (kecore's "
        "choice).",
    )
    slots_per_fact: float = Field(
        default=4.0, gt=0, description="Slots for each fact (kecore's choice, tried; 64 for 100 facts in the paper)."
    )
    contexts: int = Field(
        default=3,
        ge=0,
        description="Sampled prefixes put before a prompt, for further wordings (kecore's choice, tried; templates of "
        "the relation in the paper).",
    )
    context_tokens: int = Field(default=5, ge=1, description="Length of each prefix (kecore's choice).")
    batch_size: int = Field(default=32, ge=1, description="Requests per update (kecore's choice).")
    steps: int = Field(default=100, ge=1, description="Passes over all texts, at the most (kecore's choice).")
    passages: int = Field(
        default=64,
        ge=1,
        le=64,
        description="Wikipedia passages that inputs are standardised over (kecore's choice: all that are packaged).",
    )
    passage_tokens: int = Field(default=24, ge=1, description="Tokens of each passage (kecore's choice).")
    ridge: float = Field(
        default=0.1,
        gt=0,
        description="Added to the covariance that inputs are standardised by, in units of their mean variance "
        "(kecore's choice).",
    )
    learning_rate: float = Field(
        default=0.03,
        gt=0,
        description="Of Adam, where what a slot reads and the layer's output are units (kecore's choice, tried).",
    )
    stop_loss: float = Field(
        default=2e-2, ge=0, description="Training ends when a pass has a mean loss below this (kecore's choice)."
    )

    def calibrated_layers(self, view: ModelView) -> tuple[int, ...]:
        """The layers with slots, ascending.

        Raises:
            LayerError: the model has no such layer.
        """
        chosen = self.layers or at_depth(view, self.first_depth, self.last_depth)
        return tuple(sorted({view.layer(index).index for index in chosen}))

    def count(self, facts: int) -> int:
        """Slots of an edit in each layer."""
        return self.slots or math.ceil(self.slots_per_fact * facts)

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """The slots with gradients and moments, and a batch of texts, which is not cut further."""
        layers = self.calibrated_layers(view)
        parts = {"slots, gradients and moments": 4 * 4 * 2 * len(layers) * self.count(len(batch)) * view.width}
        items = lengthened(batch.encodings, self.contexts, self.context_tokens, self.others)
        size = self.batch_size * (self.contexts + 1 + self.others)
        return [batch_need(view, items, size, layers[0], parts)]


class CaliNet:
    """Add slots of keys and values to feed-forward blocks, and train them alone."""

    name = "calinet"
    Config = CaliNetConfig
    capabilities = Capabilities(kind="modules", batch=True, sequential=True)
    reference = (
        "Dong et al., Calibrating Factual Knowledge in Pretrained Language Models, Findings of EMNLP 2022, "
        "arXiv:2210.03329"
    )
    api = (2, 2)
    effect = Neurons

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Train slots on all requests; the model is as before when this returns."""
        config: CaliNetConfig = context.config
        layers = config.calibrated_layers(view)
        with view.frozen(), suspended(view.model):
            blocks = [Block.of(view, layer) for layer in layers]
            with context.stages("contexts"):
                # Where slots begin must not depend on the order that requests come in.
                requests = batch.requests
                order = sorted(range(len(batch)), key=lambda i: (requests[i].text, requests[i].target))
                facts = in_contexts(view, context, batch.select(order), config.contexts, config.context_tokens)
            with context.stages("tune"):
                slots = _Slots(view, context, blocks, facts)
                losses = slots.train()
        keys, biases, values = (part.detach().cpu() for part in slots.joined())
        context.state.update({"layers": torch.tensor(layers), "keys": keys, "biases": biases, "values": values})
        notes = {"layers": list(layers), "slots": keys.shape[1], "loss": losses}
        neurons = Neurons.at(blocks, keys, biases, values, "gelu")
        return side_edit(neurons, view, context, self.name, batch.requests, notes)


class _Slots:
    """The slots of one edit behind those of earlier ones, and the texts that they are trained on."""

    def __init__(
        self,
        view: ModelView,
        context: MethodContext,
        blocks: Sequence[Block],
        facts: Sequence[Sequence[Wording]],
    ) -> None:
        self.view, self.context, self.blocks = view, context, blocks
        self.config: CaliNetConfig = context.config
        self.old = _opened(blocks, context)
        config, layers = self.config, [block.layer for block in blocks]
        encoder, self.batches = context.encoder, list[Targets]()
        with Neurons.at(blocks, *self.old, "gelu").on(view.model):  # what is kept is what earlier edits say
            for start in range(0, len(facts), config.batch_size):
                part = facts[start : start + config.batch_size]
                items = [wording.encoded for fact in part for wording in fact]
                kept = config.kept(encoder, [fact[0].request for fact in part])
                self.batches.append(Targets(view, encoder, items, layers[0], "target_new", kept))
        first = self.batches[0]
        real = first.rows.attention_mask.bool()
        with torch.no_grad():
            out = view.forward(first.rows, resume=first.resume, stop=layers[-1], hidden=layers, values=layers)
        generator = torch.Generator().manual_seed(context.seed * 1_000_003 + self.old[0].shape[1])
        self.scales = [
            unrelated(view, context, block, config.passages, config.passage_tokens, config.ridge)[1] for block in blocks
        ]
        keys: list[Tensor] = []
        lengths: list[Tensor] = []
        units: list[Tensor] = []
        for block, scale in zip(blocks, self.scales, strict=True):
            # A key that is a mixture of the texts' own inputs reads about 1 at such and little elsewhere.
            own = scale.coordinates(queries(view, first.rows, block)[real])
            length = own.norm(dim=-1).mean()
            mix = torch.rand(config.count(len(facts)), len(own), generator=generator).to(own) @ own
            keys.append(mix / (length * mix.norm(dim=-1, keepdim=True)))
            lengths.append(1 / (length * block.d_in**0.5))
            beside = residual_stream(view, block.layer, out)[real.to(out.values[block.layer].device)]
            units.append(beside.float().square().mean().sqrt())
        self.begun = torch.stack(keys).to(view.device)
        self.units = [torch.stack(part).to(view.device)[:, None, None] for part in (lengths, units)]
        shape = (*self.begun.shape[:2], blocks[0].d_out)
        self.steps = [
            torch.zeros_like(self.begun, requires_grad=True),
            torch.zeros(shape, device=view.device, requires_grad=True),
        ]

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, biases and values as :class:`Neurons` has them: of earlier edits, and of this one as they are now."""
        keys = self.begun + self.units[0] * self.steps[0]
        own = [scale.key(key, key.new_zeros(len(key))) for scale, key in zip(self.scales, keys, strict=True)]
        new = (*(torch.stack(part) for part in zip(*own, strict=True)), self.units[1] * self.steps[1])
        k, b, v = (torch.cat([old.to(part), part], 1) for old, part in zip(self.old, new, strict=True))
        return k, b, v

    def train(self) -> list[float]:
        """Train the new slots; the loss of each pass."""
        neurons = Neurons.at(self.blocks, *self.joined(), "gelu")

        def loss(batch: Targets) -> Tensor:
            neurons.keys, neurons.biases, neurons.values = self.joined()
            return batch.loss()

        with neurons.on(self.view.model):
            return train(
                self.context, self.steps, self.config.learning_rate, self.config.steps, lambda _: self.batches, loss,
                stop=self.config.stop_loss,
            )  # fmt: skip


def _opened(blocks: Sequence[Block], context: MethodContext) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, biases and values that earlier edits left, or none.

    Raises:
        ConfigError: they are in other layers.
    """
    state, layers = context.state, [block.layer for block in blocks]
    if not state:
        count = len(blocks)
        return (
            torch.zeros(count, 0, blocks[0].d_in),
            torch.zeros(count, 0),
            torch.zeros(count, 0, blocks[0].d_out),
        )
    old = state["layers"].tolist()
    if old != layers:
        raise ConfigError(f"the slots of this session are in the layers {old}, not {layers}; revert its edits first")
    return state["keys"], state["biases"], state["values"]
