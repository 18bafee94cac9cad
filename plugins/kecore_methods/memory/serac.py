"""SERAC: edits in an explicit memory, a classifier of their scope, and a counterfactual model for what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.api.config import MethodConfig
from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities, EditRecord, EditRequest
from kecore.batch import RequestBatch
from kecore.edit import ModuleEdit, SideModule, suspended
from kecore.engine.passes import Passes
from kecore.engine.side import side_edit
from kecore.engine.tuning import chosen_layer
from kecore.memory import Need, forward_bytes
from kecore.model import ModelView
from kecore.model.hooks import first_tensor
from kecore.text import Encoded, Encoder
from kecore.training import Schedule
from kecore_methods.memory.serac_learner import SeracLearner
from kecore_methods.memory.serac_network import Entries, SeracNetwork
from kecore_methods.prompt.wording import remembered

__all__ = ["EditMemory", "Serac", "SeracConfig"]

_TOGETHER = 32  # edits that are read in one pass
_NOWHERE = 0.5  # attention to no place of an edit above which it has said all that it has to


class SeracConfig(MethodConfig):
    """Configuration; all but the threshold is fixed by the training."""

    free: ClassVar[frozenset[str]] = frozenset({"threshold"})

    subject_layer: int | None = Field(
        default=None, ge=0, description="Layer where subjects are compared; None goes by depth (kecore's choice)."
    )
    subject_depth: float = Field(
        default=0.14,
        ge=0,
        le=1,
        description="Depth of that layer (kecore's choice: best of five pairs on zsRE, docs/methods/serac.md).",
    )
    layer: int | None = Field(
        default=None, ge=0, description="Layer where all else is read; None goes by depth (kecore's choice)."
    )
    depth: float = Field(
        default=0.55, ge=0, le=1, description="Depth of that layer (kecore's choice, as subject_depth)."
    )
    rank: int = Field(default=128, ge=1, description="Width of the embeddings (kecore's choice).")
    threshold: float = Field(
        default=0.5, gt=0, lt=1, description="A text is in scope from this probability on (0.5 in the paper)."
    )
    learning_rate: float = Field(
        default=1e-3,
        gt=0,
        description="Of Adam, while the networks are trained (kecore's choice for heads; 1e-5 in the paper, for whole "
        "encoders).",
    )
    scalar_learning_rate: float = Field(
        default=2e-2, gt=0, description="Of Adam, for factors and the one bias (kecore's choice)."
    )
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient (kecore's choice).")

    def read_layers(self, view: ModelView) -> tuple[int, int]:
        """Both layers that are read, chosen by depth unless given; the subject's is not above the other."""
        subject, prompt = (
            chosen_layer(view, layer, depth)
            for layer, depth in ((self.subject_layer, self.subject_depth), (self.layer, self.depth))
        )
        if subject > prompt:
            raise ConfigError(f"subject_layer {subject} is above layer {prompt}; give one that is not")
        return subject, prompt

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """A pass over the edits, and their keys."""
        items = batch.encodings
        longest = max(len(item.ids) for item in items)
        tokens = longest * min(_TOGETHER, len(items))
        return [Need("read", {"memory": 8 * self.rank * longest * len(items)}, forward_bytes(view), tokens, tokens)]


class EditMemory(SideModule):
    """The edit memory and both networks beside a model (arXiv 2206.06520, equation 1).

    Every token asks for itself, with the text up to it: if the likeliest of all edits has at least the threshold's
    probability to hold it in its scope, that edit is in force from there on, until another one is, or until it has
    nothing more to say. Where none is in force, the model's output is its own, bit for bit.

    Args:
        subject_layer: path of the layer where subjects are compared.
        layer: path of the layer where all else is read.
        last: path of the last layer, whose output is changed.
        head: path of the unembedding.
        threshold: least probability.
        width: of the states.
        rank: of the embeddings.
        entries: edits in the memory.
        tokens: most tokens of one of them.
    """

    def __init__(
        self,
        subject_layer: str,
        layer: str,
        last: str,
        head: str,
        threshold: float,
        width: int,
        rank: int,
        entries: int,
        tokens: int,
    ) -> None:
        super().__init__()
        self.subject_layer, self.layer, self.last, self.head = subject_layer, layer, last, head
        self.threshold = threshold
        with torch.random.fork_rng(devices=[]):  # what it begins with is overwritten
            self.network = SeracNetwork(width, rank)
        shapes = {"subjects": (entries, rank), "prompts": (entries, rank), "keys": (entries, tokens, rank)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("follows", torch.zeros(entries, tokens, dtype=torch.long))
        self.register_buffer("lengths", torch.zeros(entries, dtype=torch.long))

    @classmethod
    def of(cls, view: ModelView, config: SeracConfig, network: SeracNetwork, entries: Entries) -> EditMemory:
        """A memory of these edits, for this model."""
        paths = {module: name for name, module in view.model.named_modules()}
        count, tokens, rank = entries.keys.shape
        lower, upper = config.read_layers(view)
        made = cls(
            view.layers[lower].name,
            view.layers[upper].name,
            view.layers[-1].name,
            paths[view.unembedding],
            config.threshold,
            network.width,
            rank,
            count,
            tokens,
        )
        parts = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        made.load_state_dict({**parts, **entries.tensors()})
        return made

    def settings(self) -> dict[str, Any]:
        """Arguments of the class."""
        entries = self.entries
        return {
            "subject_layer": self.subject_layer,
            "layer": self.layer,
            "last": self.last,
            "head": self.head,
            "threshold": self.threshold,
            "width": self.network.width,
            "rank": self.network.rank,
            "entries": entries.keys.shape[0],
            "tokens": entries.keys.shape[1],
        }

    @property
    def entries(self) -> Entries:
        """The edits."""
        buffers: Any = dict(self.named_buffers(recurse=False))
        return Entries(**buffers)

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Read at two layers, and change the output of the last."""
        passes, now = Passes(model), dict[str, Tensor]()
        head: Any = model.get_submodule(self.head)

        def begin(_model: nn.Module, _args: Any) -> None:
            now.clear()  # a pass may have ended between two of the layers

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            now["subject"] = passes.tokens(first_tensor(output))[0].clone()

        def read(_module: nn.Module, _args: Any, output: Any) -> None:
            if "subject" not in now:  # a pass that began above that layer
                return
            upper, mask = passes.tokens(first_tensor(output))
            states = torch.cat([now["subject"].to(upper.device), upper], -1)
            chosen, query = self.in_force(states, mask, passes)
            if bool((chosen >= 0).any()):
                now.update(chosen=chosen, query=query)

        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            if "chosen" not in now:
                return None
            hidden = first_tensor(output)
            new = self.speak(hidden, now["chosen"], now["query"], head.weight)
            return new if isinstance(output, Tensor) else (new, *output[1:])

        try:
            passes.handles.append(model.register_forward_pre_hook(begin))
            for path, hook in ((self.subject_layer, keep), (self.layer, read), (self.last, change)):
                passes.handles.append(model.get_submodule(path).register_forward_hook(hook))
        except BaseException:
            for handle in passes.handles:
                handle.remove()
            raise
        return passes.handles

    def in_force(self, states: Tensor, mask: Tensor, passes: Passes) -> tuple[Tensor, Tensor]:
        """Which edit is in force at each token, -1 for none: ``[rows, tokens]``; and the tokens' queries."""
        entries = self.entries
        device = entries.lengths.device
        reading, _ = self.network.read(states.to(device))
        mask = mask.to(device)
        distance = self.network.distance(reading, mask, entries, passes.text_state.get("nearest"))
        least, index = distance.each.min(-1)
        hit = (-least).exp() >= self.threshold
        column = torch.arange(mask.shape[1], device=mask.device)
        since = torch.where(hit, column, -1).cummax(1).values
        before = passes.text_state.get("edit")
        old = torch.full_like(index[:, :1], -1) if before is None else before[:, None]
        chosen = torch.where(since >= 0, index.gather(1, since.clamp(min=0)), old)
        silent = self._silent(reading.query, chosen) & mask & ~hit
        chosen = torch.where(torch.where(silent, column, -1).cummax(1).values > since, -1, chosen)
        passes.text_state.update(nearest=distance.nearest, edit=chosen[:, -1])
        return torch.where(mask, chosen, -1), reading.query

    def _silent(self, query: Tensor, chosen: Tensor) -> Tensor:
        """Where the edit that would be in force has nothing to say, ``[rows, tokens]``."""
        flat, where = query.flatten(0, 1), chosen.flatten()
        silent = torch.zeros_like(where, dtype=torch.bool)
        for index in where.unique().tolist():
            if index >= 0:
                places = where == index
                silent[places] = self.network.attention(flat[places], self.entries, index)[:, 0] > _NOWHERE
        return silent.reshape(chosen.shape)

    def speak(self, hidden: Tensor, chosen: Tensor, query: Tensor, head: Tensor) -> Tensor:
        """The last layer's output, as the counterfactual has it where an edit is in force.

        Args:
            hidden: ``[rows, tokens, width]``, or the same with rows and tokens in one dimension.
            chosen: ``[rows, tokens]``.
            query: ``[rows, tokens, rank]``.
            head: the unembedding's weight.
        """
        flat, where = hidden.reshape(-1, hidden.shape[-1]), chosen.flatten()
        query = query.flatten(0, 1)
        for index in where.unique().tolist():
            if index >= 0:
                places = (where == index).nonzero().squeeze(1)
                there = places.to(flat.device)
                new = self.network.spoken(flat[there], query[places], self.entries, index, head)
                flat = flat.index_copy(0, there, new)
        return flat.reshape(hidden.shape)


class Serac:
    """Keep edits in a memory, and let a model of its own speak where one of them applies."""

    name = "serac"
    Config = SeracConfig
    capabilities = Capabilities(kind="modules", batch=True, sequential=True, needs_training=True)
    reference = "Mitchell et al., Memory-Based Model Editing at Scale, ICML 2022, arXiv:2206.06520"
    api = (2, 2)
    effect = EditMemory
    schedule = Schedule(steps=400, batch_size=8)

    def prepare(self, view: ModelView, records: Sequence[EditRecord], context: MethodContext) -> SeracLearner:
        """A learner of both networks for this model."""
        config: SeracConfig = context.config
        network = SeracNetwork(view.width, config.rank).to(view.device)
        return SeracLearner(network, config.read_layers(view), view, records, context)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Put the facts into the memory, beside those of earlier edits; the model is as before when this returns."""
        config: SeracConfig = context.config
        tensors = context.need_trained(view, self.name)
        facts = remembered(batch, context)
        with view.frozen(), suspended(view.model), torch.no_grad(), context.stages("read"):
            network = SeracNetwork(view.width, config.rank)
            network.load_state_dict(dict(tensors))
            network.to(view.device)
            known = _known(network, context)
            new = [fact for fact in facts if fact not in known]
            items = [context.encoder.encode(fact.text, fact.target) for fact in new]
            for begin in range(0, len(new), _TOGETHER):
                context.progress("read", begin, len(new))
                part = slice(begin, begin + _TOGETHER)
                found = _entries(view, context.encoder, network, config.read_layers(view), new[part], items[part])
                known |= dict(zip(new[part], found, strict=True))
            context.progress("read", len(new), len(new))
        entries = Entries.stack([known[fact] for fact in facts])
        notes = {"entries": len(facts)}
        return side_edit(EditMemory.of(view, config, network.cpu(), entries), view, context, self.name, facts, notes)


def _known(network: SeracNetwork, context: MethodContext) -> dict[EditRequest, Entries]:
    """The entries of earlier edits that this very network has made."""
    known: dict[EditRequest, Entries] = {}
    own = network.state_dict()
    for edit in context.earlier:
        memory = edit.effect if isinstance(edit, ModuleEdit) else None
        if isinstance(memory, EditMemory):
            theirs = memory.network.state_dict()
            if all(name in theirs and torch.equal(tensor.cpu(), theirs[name]) for name, tensor in own.items()):
                known |= {request: memory.entries.one(i) for i, request in enumerate(edit.requests)}
    return known


def _entries(
    view: ModelView,
    encoder: Encoder,
    network: SeracNetwork,
    layers: tuple[int, int],
    facts: Sequence[EditRequest],
    items: Sequence[Encoded],
) -> list[Entries]:
    """A memory of each fact alone, on the CPU."""
    rows = encoder.rows([item.ids for item in items]).to(view.device)
    found = view.forward(rows, stop=layers[1], hidden=sorted({*layers})).hidden
    states = torch.cat([found[layer] for layer in layers], -1)
    return [
        network.entry(state[: len(item.ids)], item.last_token_of(fact.subject_span), item.start - 1, item.ids).cpu()
        for fact, item, state in zip(facts, items, states, strict=True)
    ]
