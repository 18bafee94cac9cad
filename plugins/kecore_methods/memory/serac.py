"""SERAC: edits in an explicit memory, a classifier of their scope, and a counterfactual model for what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.api.errors import ConfigError, UnsupportedModelError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities, EditRecord, EditRequest
from kecore.batch import RequestBatch
from kecore.edit import ModuleEdit, SideModule, suspended
from kecore.engine.passes import Passes
from kecore.engine.session_facts import session_facts
from kecore.engine.side import side_edit
from kecore.engine.tuning import choose_layer
from kecore.memory import Need, forward_bytes
from kecore.model import ModelView
from kecore.model.hooks import first_tensor
from kecore.model.sites import Output
from kecore.text import Encoded, Encoder
from kecore.training import Schedule
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.memory.serac_learner import SeracLearner
from kecore_methods.memory.serac_network import Entries, SeracNetwork
from kecore_methods.presets import Published

__all__ = ["EditMemory", "Serac", "SeracConfig"]

_TOGETHER = 32  # edits that are read in one pass
_NOWHERE = 0.5  # attention to nowhere above which an edit has nothing more to say


class SeracConfig(Published):
    """Configuration; all but the threshold is fixed by the training."""

    hparams_table: ClassVar[HparamsTable | None] = hparams.SERAC

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
        """Return both layers that are read, chosen by depth unless given.

        Raises:
            ConfigError: the subject's layer is above the other.
        """
        subject = choose_layer(view, self.subject_layer, self.subject_depth)
        prompt = choose_layer(view, self.layer, self.depth)
        if subject > prompt:
            raise ConfigError(f"subject_layer {subject} is above layer {prompt}; give one that is not")
        return subject, prompt

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of a pass over the edits, and of their keys."""
        items = batch.encodings
        longest = max(len(item.ids) for item in items)
        tokens = longest * min(_TOGETHER, len(items))
        return [Need("read", {"memory": 8 * self.rank * longest * len(items)}, forward_bytes(view), tokens, tokens)]


class EditMemory(SideModule):
    """The edit memory and both networks beside a model (arXiv 2206.06520, equation 1).

    Every token is decided for itself, with the text up to it: if the likeliest of all edits has at least the
    threshold's probability to hold it in its scope, that edit is in force from there on, until another one is, or until
    it has nothing more to say. Where none is in force, the model's output is its own, bit for bit.

    Args:
        subject_layer: module path of the layer where subjects are compared.
        layer: module path of the layer where everything else is read.
        last: module path of the last layer, whose output is changed.
        head: module path of the unembedding.
        threshold: least probability.
        width: of the states.
        rank: of the embeddings.
        entries: number of edits in the memory.
        tokens: most tokens of an edit.
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
        with torch.random.fork_rng(devices=[]):  # its first parameters are overwritten, and shall cost no random number
            self.network = SeracNetwork(width, rank)
        shapes = {"subjects": (entries, rank), "prompts": (entries, rank), "keys": (entries, tokens, rank)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("follows", torch.zeros(entries, tokens, dtype=torch.long))
        self.register_buffer("lengths", torch.zeros(entries, dtype=torch.long))

    @classmethod
    def of(cls, view: ModelView, config: SeracConfig, network: SeracNetwork, entries: Entries) -> EditMemory:
        """Return a memory of these edits, for this model."""
        paths = {module: name for name, module in view.model.named_modules()}
        count, tokens, rank = entries.keys.shape
        lower, upper = config.read_layers(view)
        memory = cls(
            subject_layer=view.layers[lower].name,
            layer=view.layers[upper].name,
            last=view.layers[-1].name,
            head=paths[view.unembedding],
            threshold=config.threshold,
            width=network.width,
            rank=rank,
            entries=count,
            tokens=tokens,
        )
        network_tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        memory.load_state_dict({**network_tensors, **entries.tensors()})
        return memory

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the class."""
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
        passes = Passes(model)
        current: dict[str, Tensor] = {}  # what the layers of the present pass hand to the later ones
        head: Any = model.get_submodule(self.head)

        def begin(_model: nn.Module, _args: Any) -> None:
            current.clear()  # a pass may have ended between two of the layers

        def keep_subject_states(_module: nn.Module, _args: Any, output: Any) -> None:
            states, _ = passes.tokens(first_tensor(output))
            current["subject"] = states.clone()

        def find_edits(_module: nn.Module, _args: Any, output: Any) -> None:
            if "subject" not in current:  # a pass that began above that layer
                return
            upper, mask = passes.tokens(first_tensor(output))
            states = torch.cat([current["subject"].to(upper.device), upper], -1)  # [rows, tokens, 2 · width]
            edits, query = self.in_force(states, mask, passes)
            if bool((edits >= 0).any()):
                current.update(edits=edits, query=query)

        def change_output(_module: nn.Module, _args: Any, output: Any) -> Any:
            if "edits" not in current:
                return None
            changed = self.speak(first_tensor(output), current["edits"], current["query"], head.weight)
            if isinstance(output, Tensor):
                return changed
            return (changed, *output[1:])

        hooks = ((self.subject_layer, keep_subject_states), (self.layer, find_edits), (self.last, change_output))
        try:
            passes.handles.append(model.register_forward_pre_hook(begin))
            for path, hook in hooks:
                passes.handles.append(model.get_submodule(path).register_forward_hook(hook))
        except BaseException:
            for handle in passes.handles:
                handle.remove()
            raise
        return passes.handles

    def in_force(self, states: Tensor, mask: Tensor, passes: Passes) -> tuple[Tensor, Tensor]:
        """Return which edit is in force at each token, -1 for none: ``[rows, tokens]``; and the tokens' queries.

        Args:
            states: ``[rows, tokens, 2 · width]``, of both layers.
            mask: ``[rows, tokens]`` real tokens.
            passes: holds what earlier passes over the same texts decided.
        """
        entries = self.entries
        device = entries.lengths.device
        reading, _ = self.network.read(states.to(device))
        mask = mask.to(device)
        distance = self.network.distance(reading, mask, entries, passes.text_state.get("nearest"))
        least, nearest_edit = distance.each.min(-1)  # [rows, tokens] each
        hit = (-least).exp() >= self.threshold
        column = torch.arange(mask.shape[1], device=mask.device)
        last_hit = torch.where(hit, column, -1).cummax(1).values  # column of the last hit so far, -1 before any
        earlier_edit = passes.text_state.get("edit")  # [rows]
        if earlier_edit is None:
            earlier_edit = torch.full_like(nearest_edit[:, 0], -1)
        hit_edit = nearest_edit.gather(1, last_hit.clamp(min=0))
        edit = torch.where(last_hit >= 0, hit_edit, earlier_edit[:, None])
        # An edit that attends to nowhere has said all that it has to, and stays silent until another hit.
        silent = self._silent(reading.query, edit) & mask & ~hit
        last_silent = torch.where(silent, column, -1).cummax(1).values
        edit = torch.where(last_silent > last_hit, -1, edit)
        passes.text_state.update(nearest=distance.nearest, edit=edit[:, -1])
        return torch.where(mask, edit, -1), reading.query

    def _silent(self, query: Tensor, edits: Tensor) -> Tensor:
        """Return where the edit that would be in force has nothing to say, ``[rows, tokens]``."""
        flat_query, flat_edits = query.flatten(0, 1), edits.flatten()  # [rows · tokens, rank], [rows · tokens]
        silent = torch.zeros_like(flat_edits, dtype=torch.bool)
        for index in flat_edits.unique().tolist():
            if index >= 0:
                tokens = flat_edits == index
                attention = self.network.attention(flat_query[tokens], self.entries, index)
                silent[tokens] = attention[:, 0] > _NOWHERE
        return silent.reshape(edits.shape)

    def speak(self, hidden: Tensor, edits: Tensor, query: Tensor, head: Tensor) -> Tensor:
        """Return the last layer's output, as the counterfactual has it where an edit is in force.

        Args:
            hidden: ``[rows, tokens, width]``, or the same with rows and tokens in one dimension.
            edits: ``[rows, tokens]``, -1 where none is in force.
            query: ``[rows, tokens, rank]``.
            head: the unembedding's weight.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])  # [rows · tokens, width]
        flat_query, flat_edits = query.flatten(0, 1), edits.flatten()
        for index in flat_edits.unique().tolist():
            if index >= 0:
                tokens = (flat_edits == index).nonzero().squeeze(1)
                targets = tokens.to(flat.device)  # the last layer may be on another device than the networks
                changed = self.network.counterfactual(
                    flat[targets], query=flat_query[tokens], entries=self.entries, index=index, head=head
                )
                flat = flat.index_copy(0, targets, changed)
        return flat.reshape(hidden.shape)


class Serac:
    """Keep edits in a memory, and let a model of its own speak where one of them applies."""

    name = "serac"
    Config = SeracConfig
    capabilities = Capabilities(
        kind="modules", batch=True, sequential=True, needs_training=True, variant="pointer head"
    )
    reference = "Mitchell et al., Memory-Based Model Editing at Scale, ICML 2022, arXiv:2206.06520"
    api = (2, 2)
    effect = EditMemory
    schedule = Schedule(steps=400, batch_size=8)

    def prepare(self, view: ModelView, records: Sequence[EditRecord], context: MethodContext) -> SeracLearner:
        """Return a learner of both networks for this model.

        Raises:
            UnsupportedModelError: the subject is read by an encoder, which these networks do not see.
        """
        if view.handover is not None:
            raise UnsupportedModelError(
                f"{type(view.model).__name__} is an encoder-decoder: serac compares subjects and prompts token by "
                "token in the edited layers, and the decoder's layers read neither; use another method that acts "
                "beside the model, such as grace"
            )
        config: SeracConfig = context.config
        network = SeracNetwork(view.width, config.rank).to(view.device)
        return SeracLearner(network, config.read_layers(view), view, records, context)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Put the facts into the memory, beside those of earlier edits; the model is as before when this returns."""
        config: SeracConfig = context.config
        tensors = context.need_trained(view, self.name)
        facts = session_facts(batch, context)
        with view.frozen(), suspended(view.model), torch.no_grad(), context.stages("read"):
            network = SeracNetwork(view.width, config.rank)
            network.load_state_dict(dict(tensors))
            network.to(view.device)
            entries = _earlier_entries(network, context)
            new = [fact for fact in facts if fact not in entries]
            items = [context.encoder.encode(fact.text, fact.target) for fact in new]
            layers = config.read_layers(view)
            for begin in range(0, len(new), _TOGETHER):
                context.progress("read", begin, len(new))
                chunk = slice(begin, begin + _TOGETHER)
                new_entries = _read_entries(view, context.encoder, network, layers, new[chunk], items[chunk])
                entries |= dict(zip(new[chunk], new_entries, strict=True))
            context.progress("read", len(new), len(new))
        memory = EditMemory.of(view, config, network.cpu(), Entries.stack([entries[fact] for fact in facts]))
        return side_edit(memory, view, context, self.name, facts, notes={"entries": len(facts)})


def _earlier_entries(network: SeracNetwork, context: MethodContext) -> dict[EditRequest, Entries]:
    """Return the entries of earlier edits that this very network has made, by request."""
    entries: dict[EditRequest, Entries] = {}
    for edit in context.earlier:
        if not isinstance(edit, ModuleEdit) or not isinstance(edit.effect, EditMemory):
            continue
        memory = edit.effect
        if _is_same_network(memory.network, network):
            entries |= {request: memory.entries.one(i) for i, request in enumerate(edit.requests)}
    return entries


def _is_same_network(earlier: SeracNetwork, network: SeracNetwork) -> bool:
    """Return whether an earlier edit's network, on the CPU, has every tensor of a network, bit for bit."""
    earlier_tensors = earlier.state_dict()
    for name, tensor in network.state_dict().items():
        if name not in earlier_tensors or not torch.equal(tensor.cpu(), earlier_tensors[name]):
            return False
    return True


def _read_entries(
    view: ModelView,
    encoder: Encoder,
    network: SeracNetwork,
    layers: tuple[int, int],
    facts: Sequence[EditRequest],
    items: Sequence[Encoded],
) -> list[Entries]:
    """Read the facts in one pass and return a memory of each alone, on the CPU.

    Args:
        view: the model, frozen.
        encoder: its tokenizer.
        network: the trained network.
        layers: both layers that are read.
        facts: the facts.
        items: each fact's prompt with its target.
    """
    rows = encoder.rows([item.ids for item in items]).to(view.device)
    out = view.run(rows, taps=[Output(layer) for layer in sorted({*layers})], last=layers[1])
    states = torch.cat([out[Output(layer)] for layer in layers], -1)  # [facts, tokens, 2 · width]
    entries: list[Entries] = []
    for fact, item, state in zip(facts, items, states, strict=True):
        subject = item.last_token_of(fact.subject_span)
        entry = network.entry(state[: len(item.ids)], subject=subject, prompt=item.start - 1, ids=item.ids)
        entries.append(entry.cpu())
    return entries
