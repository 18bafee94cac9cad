"""T-Patcher: one further neuron in the last feed-forward block for every mistaken token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.config import MethodConfig
from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities, EditRequest
from kecore.batch import RequestBatch
from kecore.edit import ModuleEdit, suspended
from kecore.engine.passes import residual_stream
from kecore.engine.side import side_edit
from kecore.engine.texts import load_passages, prompts_about_others
from kecore.engine.tuning import Targets, batch_need, choose_layer, train
from kecore.memory import Need, forward_bytes
from kecore.model import ModelView
from kecore.model.sites import Output, Value
from kecore.text import Encoded
from kecore_methods.memory.neurons import Activation, Block, Neurons, read_queries
from kecore_methods.memory.unrelated import ROWS, Unrelated, read_token_queries, unrelated_queries

__all__ = ["Patches", "TPatcher", "TPatcherConfig", "locality_loss"]

_LEAST_DISTANCE = 0.1  # that a patch is made to tell apart, in units of that between its query and the mean
_SAME = 0.1  # of a query's length: an earlier edit's query that near is that of the same input
_TENSORS = ("keys", "biases", "values", "queries")


class TPatcherConfig(MethodConfig):
    """Configuration of T-Patcher; "tried" means records 60 to 63 of CounterFact (docs/methods/t-patcher.md)."""

    layer: int | None = Field(
        default=None, ge=0, description="Layer whose block is patched; None goes by depth (kecore's choice)."
    )
    depth: float = Field(default=1.0, ge=0, le=1, description="Depth of that layer (the last one in the paper).")
    activation: Activation = Field(
        default="relu",
        description="Of a patch; with relu it is silent, exactly, where it is not active (kecore's choice).",
    )
    activation_weight: float = Field(
        default=1.0, ge=0, description="Weight a of the activation loss (kecore's choice, tried)."
    )
    memory_weight: float = Field(default=1.0, ge=0, description="Weight m of the memory loss (kecore's choice, tried).")
    beta: float = Field(
        default=-3.0,
        le=0,
        description="Most that a patch may read at an unrelated query, before its activation function. It begins by "
        "reading this much there, and 1 at its own (kecore's choice, tried).",
    )
    gamma: float = Field(
        default=-3.0,
        le=0,
        description="Most that it may read there, less what it reads at its own query (kecore's choice, tried).",
    )
    hardest: int = Field(
        default=32,
        ge=1,
        description="Unrelated queries that count, those that it reads most at (the paper's k; kecore's choice).",
    )
    passages: int = Field(
        default=64,
        ge=1,
        le=64,
        description="Wikipedia passages that unrelated queries are from (kecore's choice: all that are packaged; the "
        "model's training data in the paper).",
    )
    passage_tokens: int = Field(default=24, ge=1, description="Tokens of each passage (kecore's choice).")
    others: int = Field(
        default=16,
        ge=0,
        le=64,
        description="Further subjects of the request's own prompt, for unrelated queries (kecore's choice, tried: with "
        "none, neighbours suffer).",
    )
    steps: int = Field(default=50, ge=1, description="Gradient steps of an edit (kecore's choice).")
    ridge: float = Field(
        default=0.1,
        gt=0,
        description="Added to the covariance that queries are standardised by, in units of their mean variance "
        "(kecore's choice).",
    )
    learning_rate: float = Field(
        default=0.1,
        gt=0,
        description="Of Adam, where what a patch reads and the layer's output are units (kecore's choice).",
    )

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of the unrelated queries, some passages at a time, and of one request at a time."""
        layer = choose_layer(view, self.layer, self.depth)
        tokens = ROWS * self.passage_tokens
        numbers = 2 * self.passages * self.passage_tokens * view.width + 3 * view.width**2
        parts = {"unrelated queries and their covariance": 4 * numbers}
        return [
            Need("memory", parts, forward_bytes(view), tokens, tokens),
            batch_need(view, batch.encodings, 1, layer, parts, epochs=self.steps),
        ]


@dataclass
class Patches:
    """The patches of a session while they are written.

    Args:
        block: the feed-forward block that they stand beside.
        keys: ``[patches, d_in]``.
        biases: ``[patches]``.
        values: ``[patches, d_out]``.
        queries: ``[patches, d_in]``, the input that each was made for.
    """

    block: Block
    keys: Tensor
    biases: Tensor
    values: Tensor
    queries: Tensor

    @classmethod
    def of(cls, block: Block, context: MethodContext) -> Patches:
        """Return the patches that earlier edits left, or none.

        Raises:
            ConfigError: they are at another layer.
        """
        state = context.state
        if not state:
            no_keys = torch.zeros(0, block.d_in)
            return cls(block, no_keys, torch.zeros(0), torch.zeros(0, block.d_out), queries=no_keys)
        session_layer = int(state["layer"])
        if session_layer != block.layer:
            raise ConfigError(
                f"the patches of this session are at layer {session_layer}, not {block.layer}; revert its edits first"
            )
        return cls(block, **{name: state[name].clone() for name in _TENSORS})

    def state(self) -> dict[str, Tensor]:
        """Return all patches as tensors, for the session's state."""
        tensors: dict[str, Tensor] = {name: getattr(self, name) for name in _TENSORS}
        return {"layer": torch.tensor(self.block.layer), **tensors}

    def add(self, keys: Tensor, biases: Tensor, values: Tensor, queries: Tensor) -> None:
        """Put further patches behind the others."""
        self.keys = torch.cat([self.keys, keys.detach().cpu()])
        self.biases = torch.cat([self.biases, biases.detach().cpu()])
        self.values = torch.cat([self.values, values.detach().cpu()])
        self.queries = torch.cat([self.queries, queries.detach().cpu()])

    def with_more(self, keys: Tensor, biases: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``[1, patches, ...]`` keys, biases and values as :class:`Neurons` has them, further ones behind."""
        return (
            torch.cat([self.keys.to(keys), keys])[None],
            torch.cat([self.biases.to(biases), biases])[None],
            torch.cat([self.values.to(values), values])[None],
        )

    def neurons(self, activation: Activation) -> Neurons:
        """Return a side module with these patches."""
        return Neurons.at([self.block], self.keys[None], self.biases[None], self.values[None], activation)


def locality_loss(unrelated: Tensor, own: Tensor, beta: float, gamma: float, hardest: int) -> Tensor:
    """Return the memory loss ``l_m1 + l_m2`` (section 4.2), where ``S`` is the mean of ``exp`` over the top k.

    Args:
        unrelated: ``[m, patches]``: what each patch reads at each unrelated query, ``q·k + b``.
        own: ``[patches]``: what each patch reads at the query that it was made for.
        beta: bound of the former, ``l_m1 = S(M·k + b - β)``.
        gamma: bound of their difference, ``l_m2 = S((M - q)·k - γ)``.
        hardest: k.
    """
    top = unrelated.topk(min(hardest, len(unrelated)), dim=0).values  # [k, patches]
    return (top - beta).exp().mean() + (top - own - gamma).exp().mean()


class TPatcher:
    """Add a neuron for each mistaken token, which is active for that input and silent for all others."""

    name = "t-patcher"
    Config = TPatcherConfig
    capabilities = Capabilities(kind="modules", sequential=True, needs_subject=False, variant="own losses")
    reference = "Huang et al., Transformer-Patcher: One Mistake worth One Neuron, ICLR 2023, arXiv:2301.09785"
    api = (2, 2)
    effect = Neurons

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Patch the mistakes of one request after another; the model is as before when this returns."""
        config: TPatcherConfig = context.config
        requests, items = batch.requests, batch.encodings
        layer = choose_layer(view, config.layer, config.depth)
        added: list[int] = []
        losses: list[float | None] = []
        with view.frozen(), suspended(view.model):
            with context.stages("memory"):
                block = Block.of(view, layer)
                unrelated = unrelated_queries(
                    view,
                    context,
                    block,
                    passages=config.passages,
                    tokens=config.passage_tokens,
                    ridge=config.ridge,
                )
            patches = Patches.of(block, context)
            with context.stages("tune"):
                for request, item in zip(requests, items, strict=True):
                    before = len(patches.keys)
                    losses.append(_Writer(view, context, patches, request, item, unrelated).write())
                    added.append(len(patches.keys) - before)
        context.state.update(patches.state())
        notes = {"layers": [layer], "patches": len(patches.keys), "added": added, "loss": losses}
        return side_edit(patches.neurons(config.activation), view, context, self.name, requests, notes)


class _Writer:
    """One request, the tokens that the model gets wrong, and what their patches must not read.

    Args:
        view: the model, frozen.
        context: of the edit.
        patches: those of the session, which the request's are added to.
        request: the fact.
        item: its prompt with its target.
        unrelated: inputs of the block at packaged passages.
    """

    def __init__(
        self,
        view: ModelView,
        context: MethodContext,
        patches: Patches,
        request: EditRequest,
        item: Encoded,
        unrelated: Unrelated,
    ) -> None:
        self.view, self.context, self.patches, self.scale = view, context, patches, unrelated.scale
        self.config: TPatcherConfig = context.config
        encoder, block, layer = context.encoder, patches.block, patches.block.layer
        self.batch = Targets(view, encoder, [item], layer, "target_new")
        targets = (self.batch.row, self.batch.column)
        with torch.no_grad(), patches.neurons(self.config.activation).on(view.model):
            out = view.run(self.batch.rows, taps=[Output(layer), Value(layer)], first=self.batch.first, at=targets)
        mistaken = out.logits.argmax(-1) != self.batch.token
        columns = self.batch.column[mistaken]
        # One patch for each mistaken token: its query, and the size of what its value has to outweigh.
        self.queries = read_queries(view, self.batch.rows, block, self.batch.first)[0, columns]  # [patches, d_in]
        stream = residual_stream(view, layer, out)[0, columns]  # [patches, d_out]
        self.value_unit = stream.float().square().mean(-1, keepdim=True).sqrt()  # [patches, 1]
        self.unrelated = self._unrelated_coordinates(request, unrelated.queries)  # [m, d_in]

    def _unrelated_coordinates(self, request: EditRequest, passage_queries: Tensor) -> Tensor:
        """Return what patches must not read: passages, the prompt about others, and earlier edits."""
        encoder, block = self.context.encoder, self.patches.block
        chunks = [passage_queries]
        texts = prompts_about_others(request, load_passages()[: self.config.others])
        if texts:
            ids = [encoder.encode(text, request.target).ids for text in texts]
            chunks.append(read_token_queries(self.view, encoder, ids, block))
        chunks.append(self._earlier_queries())
        return self.scale.coordinates(torch.cat([chunk.to(self.queries) for chunk in chunks]))

    def _earlier_queries(self) -> Tensor:
        """Return the queries of earlier edits, but for those of the same input, which may be corrected anew."""
        earlier = self.patches.queries.to(self.queries)
        different = torch.cdist(earlier, self.queries) > _SAME * self.queries.norm(dim=-1)  # [earlier, patches]
        return earlier[different.all(1)]

    def write(self) -> float | None:
        """Train the patches of all mistaken tokens together.

        Returns:
            The last loss, or None where the model made no mistake.
        """
        if not len(self.queries):
            return None
        config, queries = self.config, self.scale.coordinates(self.queries)
        first_key, first_bias = self._first_patch(queries)
        # In these units a step of Adam changes what a patch reads, and the layer's output, by the learning rate.
        key_unit = 1 / (queries.norm(dim=-1, keepdim=True) * queries.shape[1] ** 0.5)
        key_steps = torch.zeros(first_key.shape, device=queries.device, requires_grad=True)
        bias_steps = torch.zeros((len(queries),), device=queries.device, requires_grad=True)
        values_shape = (len(queries), self.patches.block.d_out)
        value_steps = torch.zeros(values_shape, device=queries.device, requires_grad=True)

        def patch() -> tuple[Tensor, Tensor, Tensor]:
            key, bias = self.scale.key(first_key + key_unit * key_steps, first_bias + bias_steps)
            return key, bias, self.value_unit * value_steps

        neurons = self.patches.neurons(config.activation)

        def loss(batch: Targets) -> Tensor:
            neurons.keys, neurons.biases, neurons.values = self.patches.with_more(*patch())
            keys, biases = first_key + key_unit * key_steps, first_bias + bias_steps
            own_reading = (queries * keys).sum(-1) + biases  # [patches]
            unrelated_reading = self.unrelated @ keys.t() + biases  # [m, patches]
            memory_loss = locality_loss(
                unrelated_reading, own_reading, beta=config.beta, gamma=config.gamma, hardest=config.hardest
            )
            activation_loss = (-own_reading).exp().mean()  # l_a of section 4.2
            return batch.loss() + config.activation_weight * activation_loss + config.memory_weight * memory_loss

        with neurons.on(self.view.model):
            losses = train(
                self.context,
                parameters=[key_steps, bias_steps, value_steps],
                rate=config.learning_rate,
                epochs=config.steps,
                batches=lambda _: [self.batch],
                loss=loss,
            )
        self.patches.add(*patch(), self.queries)
        return losses[-1]

    def _first_patch(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys ``[patches, d_in]`` and biases ``[patches]`` that read 1 at their query and β at the hardest.

        Args:
            queries: ``[patches, d_in]``, in coordinates.
        """
        config = self.config
        key = queries / queries.square().sum(-1, keepdim=True)  # such a key reads 1 at its own query
        unrelated_reading = self.unrelated @ key.t()  # [m, patches]
        hardest = unrelated_reading.topk(min(config.hardest, len(self.unrelated)), dim=0).values.mean(0)  # [patches]
        # Stretched about that until it reads β at the hardest: a patch that is silent at its own query learns nothing.
        stretch = (1 - config.beta) / (1 - hardest).clamp(min=_LEAST_DISTANCE)
        return stretch[:, None] * key, 1 - stretch
