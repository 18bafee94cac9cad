"""CaliNet: calibration slots beside feed-forward blocks, trained on the facts while everything else is frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

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
from kecore.engine.tuning import PreservingConfig, Targets, Wording, batch_need, estimate_items, in_contexts, train
from kecore.memory import Need
from kecore.model import ModelView
from kecore.model.sites import Output, Value
from kecore_methods.memory.neurons import Block, Neurons, read_queries
from kecore_methods.memory.unrelated import Scale, unrelated_queries

__all__ = ["CaliNet", "CaliNetConfig"]


class CaliNetConfig(PreservingConfig):
    """Configuration of CaliNet. "Tried" means the table in docs/methods/calinet.md, records 60 to 69 of CounterFact."""

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
        """Return the layers with slots, ascending.

        Raises:
            LayerError: the model has no such layer.
        """
        if self.layers is None:
            return at_depth(view, self.first_depth, self.last_depth)
        return tuple(sorted({view.layer(index).index for index in self.layers}))

    def slot_count(self, facts: int) -> int:
        """Return the number of slots that an edit of so many facts has in each layer."""
        if self.slots is not None:
            return self.slots
        return math.ceil(self.slots_per_fact * facts)

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of the slots with gradients and moments, and of a batch of texts, which is not cut."""
        layers = self.calibrated_layers(view)
        parts = {"slots, gradients and moments": 4 * 4 * 2 * len(layers) * self.slot_count(len(batch)) * view.width}
        items = estimate_items(batch.encodings, self.contexts, self.context_tokens, self.others)
        size = self.batch_size * (self.contexts + 1 + self.others)
        return [batch_need(view, items, size, layers[0], parts, epochs=self.steps)]


class CaliNet:
    """Add slots of keys and values to feed-forward blocks, and train them alone."""

    name = "calinet"
    Config = CaliNetConfig
    capabilities = Capabilities(kind="modules", batch=True, sequential=True, needs_subject=False, variant="own losses")
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
        keys, biases, values = (tensor.detach().cpu() for tensor in slots.joined())
        context.state.update({"layers": torch.tensor(layers), "keys": keys, "biases": biases, "values": values})
        notes = {"layers": list(layers), "slots": keys.shape[1], "loss": losses}
        neurons = Neurons.at(blocks, keys, biases, values, "gelu")
        return side_edit(neurons, view, context, self.name, batch.requests, notes)


class _Slots:
    """The slots of one edit behind those of earlier ones, and the texts that they are trained on.

    Args:
        view: the model, frozen.
        context: of the edit.
        blocks: the feed-forward blocks with slots, ascending.
        facts: each request in its contexts, the bare one first.
    """

    def __init__(
        self,
        view: ModelView,
        context: MethodContext,
        blocks: Sequence[Block],
        facts: Sequence[Sequence[Wording]],
    ) -> None:
        self.view, self.context, self.blocks = view, context, blocks
        self.config: CaliNetConfig = context.config
        self.earlier = _earlier_slots(blocks, context)
        self.batches = self._make_batches(facts)
        self.scales: list[Scale] = []
        for block in blocks:
            unrelated = unrelated_queries(
                view,
                context,
                block,
                passages=self.config.passages,
                tokens=self.config.passage_tokens,
                ridge=self.config.ridge,
            )
            self.scales.append(unrelated.scale)
        self._begin(self.config.slot_count(len(facts)))

    def _make_batches(self, facts: Sequence[Sequence[Wording]]) -> list[Targets]:
        config, encoder = self.config, self.context.encoder
        batches: list[Targets] = []
        # What training preserves is what the model says with the earlier edits on it.
        with Neurons.at(self.blocks, *self.earlier, "gelu").on(self.view.model):
            for start in range(0, len(facts), config.batch_size):
                chunk = facts[start : start + config.batch_size]
                items = [wording.encoded for wording in chain.from_iterable(chunk)]
                preserved = config.prompts_to_preserve(encoder, [fact[0].request for fact in chunk])
                batches.append(Targets(self.view, encoder, items, self.blocks[0].layer, "target_new", preserved))
        return batches

    def _begin(self, count: int) -> None:
        """Choose the keys that the new slots begin with, and the units that they are trained in."""
        view, blocks = self.view, self.blocks
        layers = [block.layer for block in blocks]
        first = self.batches[0]
        real = view.tokens_read(first.rows)  # [rows, width]
        with torch.no_grad():
            taps = [*map(Output, layers), *map(Value, layers)]
            out = view.run(first.rows, taps=taps, first=first.first, last=layers[-1])
        generator = torch.Generator().manual_seed(self.context.seed * 1_000_003 + self.earlier[0].shape[1])
        keys: list[Tensor] = []  # [slots, d_in] of each block
        key_units: list[Tensor] = []
        value_units: list[Tensor] = []
        for block, scale in zip(blocks, self.scales, strict=True):
            # A key that is a mixture of the texts' own inputs reads about 1 at such and little elsewhere.
            queries = scale.coordinates(read_queries(view, first.rows, block)[real])  # [tokens, d_in]
            length = queries.norm(dim=-1).mean()
            mixture = torch.rand(count, len(queries), generator=generator).to(queries) @ queries  # [slots, d_in]
            keys.append(mixture / (length * mixture.norm(dim=-1, keepdim=True)))
            # In these units a step of Adam changes what a slot reads, and the layer's output, by the learning rate.
            key_units.append(1 / (length * block.d_in**0.5))
            stream = residual_stream(view, block.layer, out)[real.to(out[Value(block.layer)].device)]
            value_units.append(stream.float().square().mean().sqrt())
        self.first_keys = torch.stack(keys).to(view.device)  # [blocks, slots, d_in]
        self.key_unit = torch.stack(key_units).to(view.device)[:, None, None]  # [blocks, 1, 1]
        self.value_unit = torch.stack(value_units).to(view.device)[:, None, None]
        self.key_steps = torch.zeros_like(self.first_keys, requires_grad=True)
        # Values begin at zero: slots have no effect before the first update.
        values_shape = (len(blocks), count, blocks[0].d_out)
        self.value_steps = torch.zeros(values_shape, device=view.device, requires_grad=True)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, biases and values as :class:`Neurons` has them: earlier edits' first, then this edit's."""
        coordinates = self.first_keys + self.key_unit * self.key_steps  # [blocks, slots, d_in]
        keys: list[Tensor] = []
        biases: list[Tensor] = []
        for scale, key in zip(self.scales, coordinates, strict=True):
            query_key, bias = scale.key(key, key.new_zeros(len(key)))
            keys.append(query_key)
            biases.append(bias)
        earlier_keys, earlier_biases, earlier_values = self.earlier
        return (
            _behind(earlier_keys, torch.stack(keys)),
            _behind(earlier_biases, torch.stack(biases)),
            _behind(earlier_values, self.value_unit * self.value_steps),
        )

    def train(self) -> list[float]:
        """Train the new slots and return the loss of each pass."""
        neurons = Neurons.at(self.blocks, *self.joined(), "gelu")

        def loss(batch: Targets) -> Tensor:
            neurons.keys, neurons.biases, neurons.values = self.joined()
            return batch.loss()

        with neurons.on(self.view.model):
            return train(
                self.context,
                parameters=[self.key_steps, self.value_steps],
                rate=self.config.learning_rate,
                epochs=self.config.steps,
                batches=lambda _: self.batches,
                loss=loss,
                stop=self.config.stop_loss,
            )


def _behind(earlier: Tensor, new: Tensor) -> Tensor:
    """Return the tensors of new slots behind those of earlier ones, ``[blocks, slots, ...]``."""
    return torch.cat([earlier.to(new), new], 1)


def _earlier_slots(blocks: Sequence[Block], context: MethodContext) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys, biases and values that earlier edits left, or none.

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
    session_layers = state["layers"].tolist()
    if session_layers != layers:
        raise ConfigError(
            f"the slots of this session are in the layers {session_layers}, not {layers}; revert its edits first"
        )
    return state["keys"], state["biases"], state["values"]
