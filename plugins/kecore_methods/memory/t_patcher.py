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
from kecore.engine.tuning import Targets, batch_need, chosen_layer, train
from kecore.memory import Need, forward_bytes
from kecore.model import ModelView
from kecore.text import Encoded
from kecore_methods.memory.neurons import Activation, Block, Neurons, queries
from kecore_methods.memory.unrelated import ROWS, Scale, at_tokens, unrelated

__all__ = ["Patches", "TPatcher", "TPatcherConfig", "locality_loss"]

_LEAST = 0.1  # distance that a patch is made to tell apart, in units of that between its query and the mean
_SAME = 0.1  # of a query's length: an earlier edit's query that near is that of the same input


class TPatcherConfig(MethodConfig):
    """What may be chosen; "tried" means records 60 to 63 of CounterFact (docs/methods/t-patcher.md)."""

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
        """The unrelated queries, some passages at a time, and one request at a time."""
        layer = chosen_layer(view, self.layer, self.depth)
        tokens = ROWS * self.passage_tokens
        numbers = 2 * self.passages * self.passage_tokens * view.width + 3 * view.width**2
        parts = {"unrelated queries and their covariance": 4 * numbers}
        return [
            Need("memory", parts, forward_bytes(view), tokens, tokens),
            batch_need(view, batch.encodings, 1, layer, parts),
        ]


@dataclass
class Patches:
    """The patches of a session while they are written.

    Args:
        block: where they are.
        keys: ``[patches, d_in]``.
        biases: ``[patches]``.
        values: ``[patches, d_out]``.
        queries: ``[patches, d_in]``, of each the input that it was made for.
    """

    block: Block
    keys: Tensor
    biases: Tensor
    values: Tensor
    queries: Tensor

    @classmethod
    def of(cls, block: Block, context: MethodContext) -> Patches:
        """Those that earlier edits left, or none.

        Raises:
            ConfigError: they are at another layer.
        """
        state = context.state
        if not state:
            none = torch.zeros(0, block.d_in)
            return cls(block, none, torch.zeros(0), torch.zeros(0, block.d_out), none)
        old = int(state["layer"])
        if old != block.layer:
            raise ConfigError(
                f"the patches of this session are at layer {old}, not {block.layer}; revert its edits first"
            )
        return cls(block, *(state[name].clone() for name in ("keys", "biases", "values", "queries")))

    def state(self) -> dict[str, Tensor]:
        """All of them as tensors."""
        names = ("keys", "biases", "values", "queries")
        return {"layer": torch.tensor(self.block.layer), **{name: getattr(self, name) for name in names}}

    def add(self, *parts: Tensor) -> None:
        """Put further keys, biases, values and queries behind the others."""
        for name, part in zip(("keys", "biases", "values", "queries"), parts, strict=True):
            setattr(self, name, torch.cat([getattr(self, name), part.detach().cpu()]))

    def with_more(self, keys: Tensor, biases: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, biases and values as :class:`Neurons` has them, with further ones behind."""
        old, new = (self.keys, self.biases, self.values), (keys, biases, values)
        k, b, v = (torch.cat([a.to(more), more])[None] for a, more in zip(old, new, strict=True))
        return k, b, v

    def neurons(self, activation: Activation) -> Neurons:
        """A side module of them."""
        return Neurons.at([self.block], self.keys[None], self.biases[None], self.values[None], activation)


def locality_loss(unrelated: Tensor, own: Tensor, beta: float, gamma: float, hardest: int) -> Tensor:
    """The memory loss ``l_m1 + l_m2`` (section 4.2), where ``S`` is the mean of ``exp`` over the top k.

    Args:
        unrelated: ``[m, patches]``: what each patch reads at each unrelated query, ``q·k + b``.
        own: ``[patches]``: what it reads at its own.
        beta: bound of the one, ``l_m1 = S(M·k + b - β)``.
        gamma: bound of the difference, ``l_m2 = S((M - q)·k - γ)``.
        hardest: k.
    """
    top = unrelated.topk(min(hardest, len(unrelated)), dim=0).values
    return (top - beta).exp().mean() + (top - own - gamma).exp().mean()


class TPatcher:
    """Add a neuron for each mistaken token, which is active for that input and silent for all others."""

    name = "t-patcher"
    Config = TPatcherConfig
    capabilities = Capabilities(kind="modules", sequential=True)
    reference = "Huang et al., Transformer-Patcher: One Mistake worth One Neuron, ICLR 2023, arXiv:2301.09785"
    api = (2, 2)
    effect = Neurons

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Patch the mistakes of one request after another; the model is as before when this returns."""
        config: TPatcherConfig = context.config
        requests, items = batch.requests, batch.encodings
        layer = chosen_layer(view, config.layer, config.depth)
        added: list[int] = []
        losses: list[float | None] = []
        with view.frozen(), suspended(view.model):
            with context.stages("memory"):
                block = Block.of(view, layer)
                generic, scale = unrelated(view, context, block, config.passages, config.passage_tokens, config.ridge)
            patches = Patches.of(block, context)
            with context.stages("tune"):
                for request, item in zip(requests, items, strict=True):
                    before = len(patches.keys)
                    losses.append(_Writer(view, context, patches, request, item, generic, scale).write())
                    added.append(len(patches.keys) - before)
        context.state.update(patches.state())
        notes = {"layers": [layer], "patches": len(patches.keys), "added": added, "loss": losses}
        return side_edit(patches.neurons(config.activation), view, context, self.name, requests, notes)


class _Writer:
    """One request, the tokens that the model gets wrong, and what their patches must not read."""

    def __init__(
        self,
        view: ModelView,
        context: MethodContext,
        patches: Patches,
        request: EditRequest,
        item: Encoded,
        generic: Tensor,
        scale: Scale,
    ) -> None:
        self.view, self.context, self.patches, self.scale = view, context, patches, scale
        self.config: TPatcherConfig = context.config
        encoder, block, layer = context.encoder, patches.block, patches.block.layer
        self.batch = Targets(view, encoder, [item], layer, "target_new")
        place = (self.batch.row, self.batch.column)
        with torch.no_grad(), patches.neurons(self.config.activation).on(view.model):
            out = view.forward(self.batch.rows, resume=self.batch.resume, at=place, hidden=[layer], values=[layer])
        wrong = out.logits.argmax(-1) != self.batch.token  # type: ignore[union-attr]
        column = self.batch.column[wrong]
        self.own = queries(view, self.batch.rows, block, self.batch.resume)[0, column]
        self.unit = residual_stream(view, layer, out)[0, column].float().square().mean(-1, keepdim=True).sqrt()
        texts = prompts_about_others(request, load_passages()[: self.config.others])
        parts = [generic]
        if texts:
            parts.append(at_tokens(view, encoder, [encoder.encode(text, request.target).ids for text in texts], block))
        parts.append(self._others_queries())
        self.unrelated = scale.coordinates(torch.cat([part.to(self.own) for part in parts]))

    def _others_queries(self) -> Tensor:
        """Queries of earlier edits, but for those of the same input, which may be corrected anew."""
        earlier = self.patches.queries.to(self.own)
        apart = torch.cdist(earlier, self.own) > _SAME * self.own.norm(dim=-1)
        return earlier[apart.all(1)]

    def write(self) -> float | None:
        """Train the patches of all mistaken tokens together; the last loss, or None where there was no mistake."""
        if not len(self.own):
            return None
        config, own = self.config, self.scale.coordinates(self.own)
        key = own / own.square().sum(-1, keepdim=True)  # such a key reads 1 at its own query
        # Stretched about that until it reads β at the hardest: a patch that is silent at its own query learns nothing.
        hardest = (self.unrelated @ key.t()).topk(min(config.hardest, len(self.unrelated)), dim=0).values.mean(0)
        stretch = (1 - config.beta) / (1 - hardest).clamp(min=_LEAST)
        key, bias = stretch[:, None] * key, 1 - stretch
        unit = 1 / (own.norm(dim=-1, keepdim=True) * own.shape[1] ** 0.5)
        steps = [
            torch.zeros(shape, device=own.device, requires_grad=True)
            for shape in (key.shape, (len(own),), (len(own), self.patches.block.d_out))
        ]

        def patch() -> tuple[Tensor, Tensor, Tensor]:
            return *self.scale.key(key + unit * steps[0], bias + steps[1]), self.unit * steps[2]

        neurons = self.patches.neurons(config.activation)

        def loss(batch: Targets) -> Tensor:
            neurons.keys, neurons.biases, neurons.values = self.patches.with_more(*patch())
            keys, biases = key + unit * steps[0], bias + steps[1]
            read = (own * keys).sum(-1) + biases
            memory = locality_loss(self.unrelated @ keys.t() + biases, read, config.beta, config.gamma, config.hardest)
            active = (-read).exp().mean()
            return batch.loss() + config.activation_weight * active + config.memory_weight * memory

        with neurons.on(self.view.model):
            losses = train(self.context, steps, config.learning_rate, config.steps, lambda _: [self.batch], loss)
        self.patches.add(*patch(), self.own)
        return losses[-1]
