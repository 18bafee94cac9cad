"""MELO: a vector database of activations that says which low-rank block is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import Located, RequestBatch
from kecore.edit import ModuleEdit, suspended
from kecore.engine import contexts
from kecore.engine.layers import at_depth
from kecore.engine.passes import residual_stream
from kecore.engine.side import side_edit
from kecore.engine.tuning import Targets, batch_need, choose_layer, train
from kecore.memory import Need
from kecore.model import ModelView
from kecore.model.sites import Key, Output, Value
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.memory.dynamic_lora import Clusters, DynamicLora
from kecore_methods.presets import Published

__all__ = ["Melo", "MeloConfig"]


class MeloConfig(Published):
    """Configuration of MELO."""

    hparams_table: ClassVar[HparamsTable | None] = hparams.MELO

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
        """Return the adapted layers, ascending.

        Raises:
            ConfigError: one of them lies below the layer of the keys.
            LayerError: the model has no such layer.
        """
        layers = at_depth(view, self.first_depth, self.last_depth)
        if self.layers is not None:
            layers = tuple(sorted({view.layer(index).index for index in self.layers}))
        key_layer = self.key_layer(view)
        if layers[0] < key_layer:
            raise ConfigError(f"layer {layers[0]} is to be adapted, and keys are read at layer {key_layer}, above it")
        return layers

    def key_layer(self, view: ModelView) -> int:
        """Return the layer that keys are read at."""
        return choose_layer(view, self.layer, self.depth)

    def initial_radius(self, key: Tensor) -> float:
        """Return the radius of a new cluster around a key."""
        if self.radius is not None:
            return self.radius
        return self.relative_radius * float(key.norm())

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of a block with gradient and moments, and of the edits that share it."""
        layers = self.adapted_layers(view)
        projections = [view.layers[layer].block for layer in layers]
        numbers = sum(self.rank * (projection.d_in + projection.d_out) for projection in projections)
        parts = {"a block, gradient and moments": 4 * 4 * numbers}
        return [batch_need(view, batch.encodings, self.block_edits, layers[0], parts, epochs=self.steps)]


@dataclass
class Book:
    """The clusters and blocks of a session while they are written.

    Args:
        layer: the layer that keys are read at.
        layers: the adapted layers.
        clusters: the vector database.
        down: for each adapted layer ``[blocks, rank, d_in]``.
        up: for each adapted layer ``[blocks, d_out, rank]``.
    """

    layer: int
    layers: tuple[int, ...]
    clusters: Clusters
    down: list[Tensor] = field(default_factory=list)
    up: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, view: ModelView, context: MethodContext) -> Book:
        """Return the clusters and blocks that earlier edits left, or none.

        Raises:
            ConfigError: they are at other layers, or of another rank.
        """
        config: MeloConfig = context.config
        layer, layers = config.key_layer(view), config.adapted_layers(view)
        projections = [view.layers[i].block for i in layers]
        state = context.state
        if not state:
            down = [torch.zeros(0, config.rank, projection.d_in) for projection in projections]
            up = [torch.zeros(0, projection.d_out, config.rank) for projection in projections]
            return cls(layer, layers, Clusters.empty(view.layers[layer].block.d_in), down, up)
        old_layer, old_layers, old_rank = int(state["layer"]), tuple(state["layers"].tolist()), state["down0"].shape[1]
        if (old_layer, old_layers, old_rank) != (layer, layers, config.rank):
            raise ConfigError(
                f"the blocks of this session have keys at layer {old_layer}, adapt the layers {old_layers} and have "
                f"rank {old_rank}, not {layer}, {layers} and {config.rank}; revert its edits first"
            )
        names = ("centres", "radii", "labels", "keys", "owner", "block")
        clusters = Clusters(**{name: state[name].clone() for name in names})
        down = [state[f"down{i}"] for i in range(len(layers))]
        up = [state[f"up{i}"] for i in range(len(layers))]
        return cls(layer, layers, clusters, down, up)

    def blocks(self) -> dict[str, Tensor]:
        """Return the blocks' tensors by name."""
        down = {f"down{i}": tensor for i, tensor in enumerate(self.down)}
        up = {f"up{i}": tensor for i, tensor in enumerate(self.up)}
        return {**down, **up}

    def state(self) -> dict[str, Tensor]:
        """Return everything as tensors, for the session's state."""
        layers = {"layer": torch.tensor(self.layer), "layers": torch.tensor(self.layers)}
        return {**layers, **self.clusters.tensors(), **self.blocks()}

    def module(self, view: ModelView) -> DynamicLora:
        """Return a side module with these clusters and blocks."""
        key_projection = view.layers[self.layer].block
        paths: list[str] = []
        shapes: list[tuple[int, int]] = []
        for layer in self.layers:
            projection = view.layers[layer].block
            paths.append(projection.name)
            shapes.append((projection.d_out, projection.d_in))
        blocks, rank, _ = self.down[0].shape
        module = DynamicLora(
            place=key_projection.name,
            maps=paths,
            shapes=shapes,
            clusters=len(self.clusters.centres),
            entries=len(self.clusters.keys),
            blocks=blocks,
            rank=rank,
            d_key=self.clusters.keys.shape[1],
        )
        tensors = {**self.clusters.tensors(), **self.blocks()}
        del tensors["labels"]  # needed only to write further keys
        module.load_state_dict(tensors)
        return module

    def add_block(self, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put a block behind the others.

        Args:
            factors: for each adapted layer ``[rank, d_in]`` and ``[d_out, rank]``.
        """
        for i, (down, up) in enumerate(factors):
            self.down[i] = torch.cat([self.down[i], down.detach().cpu()[None]])
            self.up[i] = torch.cat([self.up[i], up.detach().cpu()[None]])


class Melo:
    """Train a low-rank block for some edits at a time, active only where a key of theirs is met."""

    name = "melo"
    Config = MeloConfig
    capabilities = Capabilities(kind="modules", batch=True, sequential=True, variant="own blocks")
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
                members = order[begin : begin + config.block_edits]
                block = _Block(view, context, book, batch.select(members))
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
        self.columns = [self._key_column(item) for item in self.items]  # where the block begins to act
        prefixes = contexts.of_session(view, context, self.config.contexts, self.config.context_tokens)
        bare_keys, *prefixed_keys = [self._read_keys(batch, prefix) for prefix in prefixes]
        self.keys = list(bare_keys)
        self.entries = [[key] for key in self.keys]  # the database's keys for each request
        if prefixed_keys:
            # The mean over prefixes first: it is nearer to other wordings, and the key of the bare prompt often to it.
            means = torch.stack(prefixed_keys).mean(0)  # [requests, d_in]
            self.entries = [[mean, key] for mean, key in zip(means, self.keys, strict=True)]

    def _read_keys(self, batch: RequestBatch, prefix: str) -> Tensor:
        """Return the key of each request behind a prefix, ``[requests, d_in]`` float32 on the CPU."""
        view, book, encoder = self.view, self.book, self.context.encoder
        items = batch.located(prefix)
        columns = [self._key_column(item) for item in items]
        rows = encoder.rows([item.ids for item in items]).to(view.device)
        with torch.no_grad():
            keys = view.run(rows, taps=[Key(book.layer)], last=book.layer)[Key(book.layer)]  # [requests, tokens, d_in]
        return keys[torch.arange(len(items)), columns].float().cpu()

    def _key_column(self, item: Located) -> int:
        """Return the column of a request's key."""
        if self.config.key == "prompt":
            return item.start - 1
        return max(1, item.lookup)  # the first token of a text never hits

    def train(self) -> float:
        """Train the block, put it into the book and return the last loss."""
        config, book, layers = self.config, self.book, self.book.layers
        batch = Targets(self.view, self.context.encoder, self.items, layers[0], "target_new")
        with torch.no_grad():
            taps = [*map(Key, layers), *map(Value, layers), *map(Output, layers)]
            out = self.view.run(batch.rows, taps=taps, first=batch.first, last=layers[-1])
        begin = torch.tensor(self.columns, device=batch.rows.input_ids.device)[:, None]
        column = torch.arange(batch.rows.input_ids.shape[1], device=begin.device)
        active = (column >= begin) & batch.rows.attention_mask.bool()  # [rows, width]
        generator = torch.Generator().manual_seed(self.context.seed * 1_000_003 + len(book.down[0]))
        earlier_block = self._earlier_block()
        layer_blocks: list[_LayerBlock] = []
        for i, layer in enumerate(layers):
            tokens = active.to(out[Key(layer)].device)
            length = float(out[Key(layer)][tokens].float().norm(dim=-1).mean())
            stream = residual_stream(self.view, layer, out)[tokens].float()  # [active tokens, d_out]
            # As in LoRA the block begins without an effect: one factor random, the other zero.
            down = torch.randn(config.rank, book.down[i].shape[2], generator=generator) / length
            up = torch.zeros(book.up[i].shape[1], config.rank)
            if earlier_block is not None:
                down, up = book.down[i][earlier_block], book.up[i][earlier_block]
            unit = float(stream.square().mean().sqrt())
            layer_blocks.append(_LayerBlock(down.to(stream), up.to(stream), length=length, unit=unit, active=tokens))
        add = dict(zip(layers, layer_blocks, strict=True))
        losses = train(
            self.context,
            parameters=[step for block in layer_blocks for step in block.steps],
            rate=config.learning_rate,
            epochs=config.steps,
            batches=lambda _: [batch],
            loss=lambda batch: batch.loss(add),
            stop=config.stop_loss,
        )
        book.add_block([block.factors() for block in layer_blocks])
        return losses[-1]

    def _earlier_block(self) -> int | None:
        """Return the block that these edits' keys have already, if they have one and no more."""
        clusters = self.book.clusters
        blocks: set[int] = set()
        for key in self.keys:
            entry = clusters.entry_of(key, self.config.initial_radius(key))
            if entry is not None:
                blocks.add(int(clusters.block[entry]))
        if len(blocks) != 1:
            return None
        return blocks.pop()

    def index(self) -> list[str]:
        """Put the keys into the vector database, with the last block, and return the rules that applied."""
        last_block = len(self.book.down[0]) - 1
        rules: list[str] = []
        for keys, item in zip(self.entries, self.items, strict=True):
            label = item.ids[item.start :]
            for key in keys:
                rules.append(self.book.clusters.put(key, label, self.config.initial_radius(key), last_block))
        return rules


class _LayerBlock:
    """A block in one layer while it is trained.

    Args:
        down: ``[rank, d_in]`` to begin with.
        up: ``[d_out, rank]`` to begin with.
        length: mean length of the layer's keys.
        unit: root mean square of what the block is added to.
        active: ``[rows, width]`` tokens that it is active at.
    """

    def __init__(self, down: Tensor, up: Tensor, length: float, unit: float, active: Tensor) -> None:
        self.down, self.up, self.active = down, up, active
        self.steps = [torch.zeros_like(factor, requires_grad=True) for factor in (down, up)]
        # In these units a step of Adam changes a block's inner values by about the learning rate.
        self.units = (1 / (length * down.shape[1] ** 0.5), unit)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return both matrices as they are now."""
        return self.down + self.units[0] * self.steps[0], self.up + self.units[1] * self.steps[1]

    def __call__(self, keys: Tensor) -> Tensor:
        """Return what the block adds, ``[rows, width, d_out]`` for keys ``[rows, width, d_in]``."""
        down, up = self.factors()
        return self.active.unsqueeze(-1) * (keys.to(down.dtype) @ down.t() @ up.t())
