"""WISE: side memories of one value projection, and an activation that routes each text to one of them or to none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities, EditRequest
from kecore.batch import RequestBatch
from kecore.edit import ModuleEdit, suspended
from kecore.engine import contexts
from kecore.engine.side import side_edit
from kecore.engine.texts import load_passages, prompts_about_others
from kecore.engine.tuning import Targets, batch_need, choose_layer, train
from kecore.memory import Need
from kecore.model import ModelView
from kecore.model.sites import Key, Value
from kecore.text import Encoded, Rows
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.memory.side_memories import SideMemories, ties
from kecore_methods.presets import Published

__all__ = ["Wise", "WiseConfig"]

_OPENING_WORDS = 8  # of a passage, as an irrelevant prompt
_TINY = 1e-12
_TENSORS = ("shards", "merged", "keys", "owner")


class WiseConfig(Published):
    """Configuration of WISE; published numbers are those of the paper's Table 10 for Llama-2-7B."""

    preset_file: ClassVar[str] = "wise"
    hparams_table: ClassVar[HparamsTable | None] = hparams.WISE

    layer: int | None = Field(default=None, ge=0, description="Layer with the side memory; None goes by depth.")
    depth: float = Field(default=0.87, ge=0, le=1, description="Depth of that layer (27 of 32 in the paper).")
    mode: Literal["retrieve", "merge"] = Field(
        default="retrieve",
        description="What happens once all shards of a memory are full: it is kept and another begun, or all that "
        "follows is merged into the one memory.",
    )
    mask_ratio: float = Field(default=0.2, gt=0, le=1, description="Share of the entries that a shard may change.")
    shards: int = Field(default=2, ge=1, description="Shards of a side memory, merged once all are full.")
    shard_edits: int = Field(default=500, ge=1, description="Edits of a shard (1000 edits in 2 shards in the paper).")
    density: float = Field(default=0.53, gt=0, le=1, description="Share of entries that TIES keeps (EasyEdit: 0.53).")
    alpha: float = Field(
        default=0.25, ge=0, description="Most activation of irrelevant prompts, in units of the layer's output (5)."
    )
    beta: float = Field(default=1.0, gt=0, description="Least activation of an edit, in the same units (20).")
    gamma: float = Field(default=0.5, ge=0, description="Least distance between the two, in the same units (10).")
    absolute_margins: bool = Field(
        default=False,
        description="These three are numbers, as published, and no multiples of the output's length; with a "
        "margin_weight of 1 the routing loss is then the paper's.",
    )
    margin_weight: float = Field(
        default=20.0, ge=0, description="Weight of the routing loss; with units of 20 it is the paper's own."
    )
    threshold_ratio: float = Field(
        default=0.88, gt=0, le=1, description="Threshold relative to the least activation of an edit (EasyEdit: 0.88)."
    )
    contexts: int = Field(default=3, ge=0, description="Sampled prefixes put before a prompt (10 in the paper).")
    context_tokens: int = Field(default=10, ge=1, description="Length of each prefix (10 in the paper).")
    irrelevant: int = Field(
        default=8,
        ge=2,
        description="Irrelevant prompts of each edit: openings of packaged Wikipedia passages, and with about_others "
        "as many of the request's own prompt about somebody else.",
    )
    about_others: bool = Field(
        default=True,
        description="Half of them are the request's prompt about others, which protects its neighbours; the released "
        "code has none of these.",
    )
    steps: int = Field(default=70, ge=1, description="Gradient steps of an edit, at the most (EasyEdit: 70).")
    relative_learning_rate: float = Field(
        default=0.1, gt=0, description="Learning rate, relative to the matrix's root mean square."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="The same as a number (1 in EasyEdit); None takes the relative one."
    )
    optimizer: Literal["adam", "sgd"] = Field(
        default="adam", description="Adam, or plain gradient descent (EasyEdit's, with a learning rate of 1)."
    )
    norm_constraint: float | None = Field(
        default=None, gt=0, description="Largest change of any weight (1 in EasyEdit); None for no bound."
    )
    stop_loss: float = Field(default=2e-2, ge=0, description="An edit is finished at a loss below this.")

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of the shards, a gradient and moments, and of one request with its contexts at a time."""
        layer = choose_layer(view, self.layer, self.depth)
        projection = view.layers[layer].block
        parts = {"shards, gradient and moments": 4 * (4 + self.shards) * projection.d_out * projection.d_in}
        items: list[Encoded] = []
        for item in batch.encodings:
            items += [item] * (self.contexts + 1)
        return [batch_need(view, items, self.contexts + 1, layer, parts, epochs=self.steps)]


@dataclass
class Memory:
    """A side memory while it is written.

    Args:
        shards: ``[shards, d_out, d_in]`` changes that are not merged yet; the last is written to.
        merged: ``[memories, d_out, d_in]``.
        keys: ``[edits, d_in]``, each edit's key where its subject ends.
        owner: ``[edits]`` which of merged memories and shards, in this order, holds the edit.
        unit: length of the layer's output at the first edit, which activations are measured in.
        opened: shards begun so far.
        layer: the layer of the value projection.
    """

    shards: Tensor
    merged: Tensor
    keys: Tensor
    owner: Tensor
    unit: float = 0.0
    opened: int = 0
    layer: int = field(default=0)

    @classmethod
    def of(cls, view: ModelView, layer: int, state: Mapping[str, Tensor]) -> Memory:
        """Return the memory that earlier edits left, or an empty one.

        Raises:
            ConfigError: it is at another layer.
        """
        projection = view.layers[layer].block
        d_out, d_in = projection.d_out, projection.d_in
        if not state:
            no_deltas = torch.zeros(0, d_out, d_in)
            no_keys, no_owner = torch.zeros(0, d_in), torch.zeros(0, dtype=torch.long)
            return cls(shards=no_deltas, merged=no_deltas, keys=no_keys, owner=no_owner, layer=layer)
        session_layer, opened = int(state["layer"]), int(state["opened"])
        if session_layer != layer:
            raise ConfigError(
                f"the side memory of this session is at layer {session_layer}, not {layer}; revert its edits first"
            )
        tensors = {name: state[name].clone() for name in _TENSORS}
        return cls(**tensors, unit=float(state["unit"]), opened=opened, layer=layer)

    def state(self) -> dict[str, Tensor]:
        """Return everything as tensors, for the session's state."""
        tensors: dict[str, Tensor] = {name: getattr(self, name) for name in _TENSORS}
        return {
            **tensors,
            "unit": torch.tensor(self.unit, dtype=torch.float64),
            "opened": torch.tensor(self.opened),
            "layer": torch.tensor(self.layer),
        }

    def make_room(self, config: WiseConfig) -> None:
        """Begin another shard where the last is full, and merge first where all of them are (Algorithm 1)."""
        if len(self.shards) and int((self.owner == self.last).sum()) < config.shard_edits:
            return
        if len(self.shards) == config.shards:
            self._merge_shards(config)
        self.shards = torch.cat([self.shards, torch.zeros(1, *self.shards.shape[1:])])
        self.opened += 1

    def _merge_shards(self, config: WiseConfig) -> None:
        """Merge all shards into one memory; in the mode ``merge``, together with what was merged before."""
        finished = len(self.merged)  # memories that stay as they are
        if config.mode == "merge":
            finished = 0
        merged = ties(torch.cat([self.merged[finished:], self.shards]), config.density)[None]  # [1, d_out, d_in]
        self.owner = self.owner.clamp(max=finished)
        self.merged = torch.cat([self.merged[:finished], merged])
        self.shards = self.shards[:0]

    @property
    def last(self) -> int:
        """The owner index of the shard that is written to."""
        return len(self.merged) + len(self.shards) - 1

    def mask(self, ratio: float, seed: int) -> Tensor:
        """Return the random mask of the shard that is written to, ``[d_out, d_in]`` (eq. 7)."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self.opened)
        return (torch.rand(self.shards.shape[1:], generator=generator) < ratio).float()

    def module(self, path: str, config: WiseConfig) -> SideMemories:
        """Return a side module with the merged memories and the shards, each with its threshold."""
        deltas = torch.cat([self.merged, self.shards])  # [memories, d_out, d_in]
        module = SideMemories(path, *deltas.shape)
        module.deltas.copy_(deltas)
        for index, delta in enumerate(deltas):
            least = float((self.keys[self.owner == index] @ delta.t()).norm(dim=-1).min())
            # Irrelevant prompts were trained to stay below alpha, so no threshold goes below it.
            module.thresholds[index] = max(config.threshold_ratio * least, config.alpha * self.unit)
        return module


class Wise:
    """Tune a side memory on each fact, and keep it out of the way of everything else."""

    name = "wise"
    Config = WiseConfig
    capabilities = Capabilities(kind="modules", sequential=True)
    reference = (
        "Wang et al., WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models, "
        "NeurIPS 2024, arXiv:2405.14768"
    )
    api = (2, 2)
    effect = SideMemories

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Tune the side memory on the requests one after another; the model is as before when this returns."""
        config: WiseConfig = context.config
        layer = choose_layer(view, config.layer, config.depth)
        memory = Memory.of(view, layer, context.state)
        losses: list[float] = []
        with view.frozen(), suspended(view.model):
            with context.stages("contexts"):
                prefixes = contexts.of_session(view, context, config.contexts, config.context_tokens)
            with context.stages("tune"):
                for index in range(len(batch)):
                    memory.make_room(config)
                    losses.append(_Writer(view, context, memory, batch.select([index]), prefixes).write())
        context.state.update(memory.state())
        path = view.layers[layer].block.name
        notes = {"layers": [layer], "memories": len(memory.merged) + len(memory.shards), "loss": losses}
        return side_edit(memory.module(path, config), view, context, self.name, batch.requests, notes)


class _Writer:
    """One request, and the shard that it is written to.

    Args:
        view: the model, frozen.
        context: of the edit.
        memory: the side memory; its last shard has room.
        batch: the one request.
        prefixes: what stands before its prompt, the empty one first.
    """

    def __init__(
        self,
        view: ModelView,
        context: MethodContext,
        memory: Memory,
        batch: RequestBatch,
        prefixes: Sequence[str],
    ) -> None:
        self.view, self.context, self.memory = view, context, memory
        self.config: WiseConfig = context.config
        encoder, layer = context.encoder, memory.layer
        (request,) = batch.requests
        items = list(chain.from_iterable(batch.located(prefix) for prefix in prefixes))
        self.batch = Targets(view, encoder, items, layer, "target_new")
        # The query's activation is taken where its subject ends: the only tokens that tell it from its neighbours.
        lookup = [item.lookup for item in items]
        keys, length = _read_keys(view, self.batch.rows, layer)
        self.request_keys = keys[torch.arange(len(items)), lookup]  # [prefixes, d_in]
        # What stands before it is below the threshold, and so what it reads is not the side memory's when it acts.
        columns = torch.arange(keys.shape[1], device=keys.device)
        acts = columns >= torch.tensor(lookup, device=keys.device)[:, None]
        self.acts = acts.float().unsqueeze(-1)  # [rows, width, 1]
        ids = [encoder.encode(text).ids for text in self._irrelevant_prompts(request)]
        rows = encoder.rows(ids)
        self.irrelevant_keys, _ = _read_keys(view, rows, layer)  # [prompts, width, d_in]
        self.irrelevant_mask = view.tokens_read(rows).to(self.irrelevant_keys)
        if not memory.unit:
            memory.unit = 1.0 if self.config.absolute_margins else length
        self.shard_keys = memory.keys[memory.owner == memory.last].to(self.irrelevant_keys.device)  # [edits, d_in]

    def _irrelevant_prompts(self, request: EditRequest) -> list[str]:
        """Return openings of passages, and the request's prompt about others than its subject if these are wanted."""
        generator = torch.Generator().manual_seed(self.context.seed + len(self.memory.keys))
        passages = load_passages()
        order = torch.randperm(len(passages), generator=generator)
        chosen = [passages[i] for i in order[: self.config.irrelevant]]
        count = len(chosen) // 2 if self.config.about_others else len(chosen)
        openings = [" ".join(words[:_OPENING_WORDS]) for words in chosen[:count]]
        return [*openings, *prompts_about_others(request, chosen[count:])]

    def write(self) -> float:
        """Tune the shard and return the last loss."""
        memory, config = self.memory, self.config
        block = self.view.layers[memory.layer].block
        base = memory.shards[-1].to(block.device)
        mask = memory.mask(config.mask_ratio, self.context.seed).to(block.device)
        step = torch.zeros_like(base, requires_grad=True)
        rate = config.learning_rate
        if rate is None:
            rate = config.relative_learning_rate * block.weight_size()

        def loss(batch: Targets) -> Tensor:
            delta = base + mask * step  # the gradient reaches what the mask lets through (eq. 7)
            side = batch.loss({memory.layer: lambda keys: self.acts * (keys.to(delta.dtype) @ delta.t())})
            return side + self.routing_loss(delta)

        @torch.no_grad()
        def bound(_updates: int) -> None:
            if config.norm_constraint is not None:
                step.clamp_(-config.norm_constraint - base, config.norm_constraint - base)

        losses = train(
            self.context,
            parameters=[step],
            rate=rate,
            epochs=config.steps,
            batches=lambda _: [self.batch],
            loss=loss,
            stop=config.stop_loss,
            after=bound,
            optimizer=config.optimizer,
        )
        delta = (base + mask * step).detach()
        memory.shards[-1] = delta.cpu()
        memory.keys = torch.cat([memory.keys, self.request_keys[:1].cpu()])  # the bare prompt's
        memory.owner = torch.cat([memory.owner, torch.tensor([memory.last])])
        return losses[-1]

    def routing_loss(self, delta: Tensor) -> Tensor:
        """Return the margins of eq. 5, in units of the layer's output.

        Earlier edits of the shard stay above beta as well.

        Args:
            delta: ``[d_out, d_in]``, the change of the shard as it is now.
        """
        config, unit = self.config, self.memory.unit
        request = _length(self.request_keys @ delta.t()) / unit  # [prefixes]
        earlier = _length(self.shard_keys @ delta.t()) / unit  # [edits]
        irrelevant_tokens = _length(self.irrelevant_keys @ delta.t()) * self.irrelevant_mask  # [prompts, width]
        irrelevant = irrelevant_tokens.amax(1) / unit  # [prompts]
        terms = (
            (irrelevant - config.alpha).relu().mean(),
            (config.beta - torch.cat([request, earlier])).relu().mean(),
            (config.gamma - (request[:, None] - irrelevant)).relu().mean(),  # every pair
        )
        return config.margin_weight * sum(terms, torch.zeros(()).to(delta))


def _read_keys(view: ModelView, rows: Rows, layer: int) -> tuple[Tensor, float]:
    """Return ``[rows, width, d_in]`` keys at the layer, which no side memory changes, and the output's mean length."""
    with torch.no_grad():
        out = view.run(rows, taps=[Key(layer), Value(layer)], last=layer)
    length = out[Value(layer)].float().norm(dim=-1)[view.tokens_read(rows)].mean()
    return out[Key(layer)].float(), float(length)


def _length(x: Tensor) -> Tensor:
    """Return the length of each vector, with a gradient also at zero."""
    return (x.square().sum(-1) + _TINY).sqrt()
