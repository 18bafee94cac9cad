"""MELO: a vector database of activations that says which low-rank block is active."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.config import MethodConfig
from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import Located, RequestBatch
from kecore.edit import ModuleEdit, suspended
from kecore.engine import contexts
from kecore.engine.layers import at_depth
from kecore.engine.passes import residual_stream
from kecore.engine.side import side_edit
from kecore.engine.tuning import Targets, batch_need, chosen_layer, train
from kecore.memory import Need
from kecore.model import ModelView
from kecore_methods.memory.dynamic_lora import Clusters, DynamicLora

__all__ = ["Melo", "MeloConfig"]


class MeloConfig(MethodConfig):
    """What may be chosen."""

    layer: int | None = Field(default=None, ge=0, description="Layer that keys are read at; None goes by depth.")
    depth: float = Field(default=0.17, ge=0, le=1, description="Depth of that layer.")
    key: Literal["subject", "prompt"] = Field(
        default="subject", description="Token whose activation is the key: where the subject ends, or the prompt."
    )
    layers: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="Layers whose value projections are adapted; None goes by depth."
    )
    first_depth: float = Field(default=0.7, ge=0, le=1, description="Depth of the lowest of them.")
    last_depth: float = Field(default=0.8, ge=0, le=1, description="Depth of the highest of them.")
    rank: int = Field(default=2, ge=1, description="Rank of a block in each layer (EasyEdit: 2).")
    block_edits: int = Field(default=1, ge=1, description="Edits of one batch that share a block.")
    contexts: int = Field(
        default=3,
        ge=0,
        description="Sampled prefixes put before a prompt for a further key of it, the mean over them; 0 for none.",
    )
    context_tokens: int = Field(default=6, ge=1, description="Length of each prefix.")
    relative_radius: float = Field(
        default=0.7, gt=0, description="Radius of a new cluster, in units of its key's norm."
    )
    radius: float | None = Field(default=None, gt=0, description="Radius as a distance; None: the relative one.")
    steps: int = Field(default=50, ge=1, description="Gradient steps of a block, at the most (EasyEdit: 50).")
    learning_rate: float = Field(
        default=0.05, gt=0, description="Of Adam, where a block's inner values and the layer's output are units."
    )
    stop_loss: float = Field(default=1e-2, ge=0, description="A block is finished at a mean loss below this.")

    def adapted_layers(self, view: ModelView) -> tuple[int, ...]:
        """The adapted layers, ascending.

        Raises:
            ConfigError: one of them lies below the layer of the keys.
            LayerError: the model has no such layer.
        """
        chosen = self.layers or at_depth(view, self.first_depth, self.last_depth)
        found = tuple(sorted({view.layer(index).index for index in chosen}))
        read = self.key_layer(view)
        if found[0] < read:
            raise ConfigError(f"layer {found[0]} is to be adapted, and keys are read at layer {read}, above it")
        return found

    def key_layer(self, view: ModelView) -> int:
        """The layer that keys are read at."""
        return chosen_layer(view, self.layer, self.depth)

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """A block with gradient and moments, and the edits that share it."""
        layers = self.adapted_layers(view)
        projections = [view.layers[layer].value_projection for layer in layers]
        numbers = sum(self.rank * (part.d_in + part.d_out) for part in projections)
        parts = {"a block, gradient and moments": 4 * 4 * numbers}
        return [batch_need(view, batch.encodings, self.block_edits, layers[0], parts)]


@dataclass
class Book:
    """All clusters and blocks of a session while they are written.

    Args:
        layer: where keys are read.
        layers: the adapted ones.
        clusters: the vector database.
        down: of each adapted layer ``[blocks, rank, d_in]``.
        up: of each adapted layer ``[blocks, d_out, rank]``.
    """

    layer: int
    layers: tuple[int, ...]
    clusters: Clusters
    down: list[Tensor] = field(default_factory=list)
    up: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, view: ModelView, context: MethodContext) -> Book:
        """Those that earlier edits left, or none.

        Raises:
            ConfigError: they are at other layers, or of another rank.
        """
        config: MeloConfig = context.config
        layer, layers = config.key_layer(view), config.adapted_layers(view)
        projections = [view.layers[i].value_projection for i in layers]
        state = context.state
        if not state:
            down = [torch.zeros(0, config.rank, part.d_in) for part in projections]
            up = [torch.zeros(0, part.d_out, config.rank) for part in projections]
            return cls(layer, layers, Clusters.empty(view.layers[layer].value_projection.d_in), down, up)
        old = int(state["layer"]), tuple(state["layers"].tolist()), int(state["down0"].shape[1])
        if old != (layer, layers, config.rank):
            raise ConfigError(
                f"the blocks of this session have keys at layer {old[0]}, adapt the layers {old[1]} and have rank "
                f"{old[2]}, not {layer}, {layers} and {config.rank}; revert its edits first"
            )
        names = ("centres", "radii", "labels", "keys", "owner", "block")
        clusters = Clusters(**{name: state[name].clone() for name in names})
        parts = ([state[f"{name}{i}"] for i in range(len(layers))] for name in ("down", "up"))
        return cls(layer, layers, clusters, *parts)

    def blocks(self) -> dict[str, Tensor]:
        """The blocks' tensors, by name."""
        return {f"{name}{i}": part for name in ("down", "up") for i, part in enumerate(getattr(self, name))}

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        places = {"layer": torch.tensor(self.layer), "layers": torch.tensor(self.layers)}
        return {**places, **self.clusters.tensors(), **self.blocks()}

    def module(self, view: ModelView) -> DynamicLora:
        """A side module of them."""
        place, *maps = (
            view.layers[i].value_projection.name.removesuffix(".weight") for i in (self.layer, *self.layers)
        )
        shapes = [(up.shape[1], down.shape[2]) for up, down in zip(self.up, self.down, strict=True)]
        blocks, rank, _ = self.down[0].shape
        found = self.clusters.tensors()
        del found["labels"]
        made = DynamicLora(place, maps, shapes, len(self.clusters.centres), len(self.clusters.keys), blocks, rank,
                           self.clusters.keys.shape[1])  # fmt: skip
        made.load_state_dict({**found, **self.blocks()})
        return made


class Melo:
    """Train a low-rank block for some edits at a time, active only where a key of theirs is met."""

    name = "melo"
    Config = MeloConfig
    capabilities = Capabilities(kind="modules", batch=True, sequential=True)
    reference = "Yu et al., MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA, AAAI 2024, arXiv:2312.11795"
    api = (2, 2)
    effect = DynamicLora

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Train blocks for the requests and index them; the model is as before when this returns."""
        config: MeloConfig = context.config
        book = Book.of(view, context)
        rules: list[str] = []
        losses: list[float] = []
        # Which edits share a block must not depend on the order that they come in.
        requests = batch.requests
        order = sorted(range(len(batch)), key=lambda i: (requests[i].text, requests[i].target))
        with view.frozen(), suspended(view.model), context.stages("tune"):
            for begin in range(0, len(order), config.block_edits):
                block = _Block(view, context, book, batch.select(order[begin : begin + config.block_edits]))
                losses.append(block.train())
                rules += block.index()
        context.state.update(book.state())
        notes = {
            "layers": list(book.layers),
            "key_layer": book.layer,
            "clusters": len(book.clusters.centres),
            "blocks": len(book.down[0]),
            "rules": rules,
            "loss": losses,
        }
        return side_edit(book.module(view), view, context, self.name, requests, notes)


class _Block:
    """Edits that share one block."""

    def __init__(self, view: ModelView, context: MethodContext, book: Book, batch: RequestBatch) -> None:
        self.view, self.context, self.book = view, context, book
        self.config: MeloConfig = context.config
        self.items = batch.located()
        self.columns = [self._column(item) for item in self.items]
        before = contexts.of_session(view, context, self.config.contexts, self.config.context_tokens)
        every: list[list[Tensor]] = []
        for prefix in before:
            items = batch.located(prefix)
            columns = [self._column(item) for item in items]
            rows = context.encoder.rows([item.ids for item in items]).to(view.device)
            with torch.no_grad():
                found = view.forward(rows, stop=book.layer, keys=[book.layer]).keys[book.layer]
            every.append(list(found[torch.arange(len(items)), columns].float().cpu()))
        self.keys, *behind = every
        # The mean over prefixes first: it is nearer to other wordings, and the key of the bare prompt often to it.
        means = [torch.stack(keys).mean(0) for keys in zip(*behind, strict=True)]
        self.entries = (
            [[mean, key] for mean, key in zip(means, self.keys, strict=True)] if means else [[key] for key in self.keys]
        )

    def _column(self, item: Located) -> int:
        if self.config.key == "prompt":
            return item.start - 1
        return max(1, item.lookup)  # the first token of a text is not asked

    def _radius(self, key: Tensor) -> float:
        return self.config.radius or self.config.relative_radius * float(key.norm())

    def train(self) -> float:
        """Train the block and put it into the book; the last loss."""
        config, book, layers = self.config, self.book, self.book.layers
        batch = Targets(self.view, self.context.encoder, self.items, layers[0], "target_new")
        with torch.no_grad():
            out = self.view.forward(
                batch.rows, resume=batch.resume, stop=layers[-1], keys=layers, values=layers, hidden=layers
            )
        begin = torch.tensor(self.columns, device=batch.rows.input_ids.device)[:, None]
        column = torch.arange(batch.rows.input_ids.shape[1], device=begin.device)
        active = (column >= begin) & batch.rows.attention_mask.bool()
        generator = torch.Generator().manual_seed(self.context.seed * 1_000_003 + len(book.down[0]))
        begun = self._begun()
        parts: list[_Part] = []
        for i, layer in enumerate(layers):
            here = active.to(out.keys[layer].device)
            length = float(out.keys[layer][here].float().norm(dim=-1).mean())
            beside = residual_stream(self.view, layer, out)[here].float()
            down = torch.randn(config.rank, book.down[i].shape[2], generator=generator) / length
            up = torch.zeros(book.up[i].shape[1], config.rank)
            if begun is not None:
                down, up = book.down[i][begun], book.up[i][begun]
            parts.append(_Part(down.to(beside), up.to(beside), length, float(beside.square().mean().sqrt()), here))
        add = dict(zip(layers, parts, strict=True))
        losses = train(
            self.context, [step for part in parts for step in part.steps], config.learning_rate, config.steps,
            lambda _: [batch], lambda batch: batch.loss(add), stop=config.stop_loss,
        )  # fmt: skip
        for i, part in enumerate(parts):
            down, up = (tensor.detach().cpu()[None] for tensor in part.factors())
            book.down[i], book.up[i] = torch.cat([book.down[i], down]), torch.cat([book.up[i], up])
        return losses[-1]

    def _begun(self) -> int | None:
        """The block that keys of these edits have already, if there is one such block."""
        known = {self.book.clusters.known(key, self._radius(key)) for key in self.keys}
        known.discard(None)
        return known.pop() if len(known) == 1 else None

    def index(self) -> list[str]:
        """Put the keys into the vector database, with the last block; the rules that applied."""
        last = len(self.book.down[0]) - 1
        return [
            self.book.clusters.place(key, item.ids[item.start :], self._radius(key), last)
            for keys, item in zip(self.entries, self.items, strict=True)
            for key in keys
        ]


class _Part:
    """A block in one layer while it is trained.

    Args:
        down: ``[rank, d_in]`` to begin with.
        up: ``[d_out, rank]`` to begin with.
        length: of the layer's keys.
        unit: root mean square of what the block is added to.
        active: ``[rows, width]`` tokens that it is active at.
    """

    def __init__(self, down: Tensor, up: Tensor, length: float, unit: float, active: Tensor) -> None:
        self.down, self.up, self.active = down, up, active
        self.steps = [torch.zeros_like(part, requires_grad=True) for part in (down, up)]
        # In these units a step of Adam changes a block's inner values by about the learning rate.
        self.units = (1 / (length * down.shape[1] ** 0.5), unit)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Both matrices as they are now."""
        return self.down + self.units[0] * self.steps[0], self.up + self.units[1] * self.steps[1]

    def __call__(self, keys: Tensor) -> Tensor:
        """What the block adds: ``[rows, width, d_out]`` for keys ``[rows, width, d_in]``."""
        down, up = self.factors()
        return self.active.unsqueeze(-1) * (keys.to(down.dtype) @ down.t() @ up.t())
