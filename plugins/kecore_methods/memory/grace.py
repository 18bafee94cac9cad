"""GRACE: a codebook of keys and values beside one feed-forward block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.api.config import MethodConfig
from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import ModuleEdit, SideModule, suspended
from kecore.engine.passes import Passes, hook_projection
from kecore.engine.side import side_edit
from kecore.engine.tuning import Targets, batch_need, chosen_layer, train
from kecore.memory import Need
from kecore.model import ModelView
from kecore.text import Encoded

__all__ = ["Codebook", "Entries", "Grace", "GraceConfig", "nearest"]

Replace = Literal["last", "prompt", "all"]

_SAME = 0.1  # of the initial radius: a query that near to a key is that key's own
_SLACK = 1.01  # a radius grown to a query holds it also after the rounding of another batch


class GraceConfig(MethodConfig):
    """What may be chosen; the published set-ups are for Llama-2-7B (EasyEdit) and GPT2-XL (the paper)."""

    layer: int | None = Field(default=None, ge=0, description="Layer with the codebook; None goes by depth.")
    depth: float = Field(default=0.87, ge=0, le=1, description="Depth of that layer (27 of 32 in EasyEdit).")
    relative_radius: float = Field(default=0.05, gt=0, description="Radius of a new entry, in units of its key's norm.")
    radius: float | None = Field(
        default=None, gt=0, description="Radius of a new entry as a distance (1 in EasyEdit); None: the relative one."
    )
    replace: Replace = Field(
        default="last",
        description="What an entry's value replaces: the output at the token whose key it holds (the paper's choice "
        "for decoders), at it and all tokens before, or at every token of the row.",
    )
    steps: int = Field(default=100, ge=1, description="Gradient steps on a value, at the most (100 in the paper).")
    relative_learning_rate: float = Field(
        default=1.0, gt=0, description="Of Adam, in units of the layer's output: its root mean square at that token."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Of Adam as a number (1 in the paper); None: the relative one."
    )
    value_init: Literal["warm", "cold"] = Field(
        default="warm",
        description="Where a value starts: at what it replaces, or at random numbers of that size (the paper).",
    )
    stop_loss: float = Field(default=1e-2, ge=0, description="A value is finished at a loss below this.")

    def edited_layer(self, view: ModelView) -> int:
        """The layer, chosen by depth unless given; by depth never the last, above which no token sees another."""
        index = chosen_layer(view, self.layer, self.depth)
        return index if self.layer is not None else min(index, max(0, len(view.layers) - 2))

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """One request at a time, and its value with gradient and moments."""
        return [batch_need(view, batch.encodings, 1, self.edited_layer(view), {"value": 16 * view.width})]


def nearest(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance to the nearest key, and which one that is.

    Args:
        keys: ``[entries, d]``, at least one.
        queries: ``[..., d]``.

    Returns:
        Two ``[...]`` tensors. A query's own do not depend on the others, not even by rounding.
    """
    flat = queries.reshape(-1, queries.shape[-1])
    distance = torch.cdist(flat, keys.to(flat), compute_mode="donot_use_mm_for_euclid_dist")
    least, index = distance.min(1)
    return least.reshape(queries.shape[:-1]), index.reshape(queries.shape[:-1])


class Codebook(SideModule):
    """Keys, values, deferral radii and labels at one value projection (arXiv 2211.11031, section 3).

    Every token asks for itself: where its key lies within the radius of the nearest entry, that entry's value stands
    in for the projection's output. A causal model's key at a token depends on the tokens up to it alone, so the
    answer is the same in a padded batch, under teacher forcing, and while a text is written with a cache.

    Args:
        place: path of the value projection.
        entries: how many there are.
        d_in: width of the keys.
        d_out: width of the values.
        label_tokens: most tokens of a label.
        replace: see :class:`GraceConfig`.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: Tensor

    def __init__(self, place: str, entries: int, d_in: int, d_out: int, label_tokens: int, replace: Replace) -> None:
        super().__init__()
        self.place, self.replace = place, replace
        self.register_buffer("keys", torch.zeros(entries, d_in))
        self.register_buffer("values", torch.zeros(entries, d_out))
        self.register_buffer("radii", torch.zeros(entries))
        self.register_buffer("labels", torch.zeros(entries, label_tokens, dtype=torch.long))

    def settings(self) -> dict[str, Any]:
        """Arguments of the class."""
        return {
            "place": self.place,
            "entries": self.keys.shape[0],
            "d_in": self.keys.shape[1],
            "d_out": self.values.shape[1],
            "label_tokens": self.labels.shape[1],
            "replace": self.replace,
        }

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Act on the output of the value projection."""
        return hook_projection(model, self.place, self._act)

    def _act(self, keys: Tensor, out: Tensor, mask: Tensor, passes: Passes) -> Tensor:
        """The paper's equation of a GRACE layer: a value of the codebook within its radius, else the layer's own."""
        chosen = self.chosen(keys, mask, passes)
        values = self.values.to(out.device, out.dtype)[chosen.clamp(min=0)]
        return torch.where((chosen >= 0).unsqueeze(-1), values, out)

    def chosen(self, keys: Tensor, mask: Tensor, passes: Passes) -> Tensor:
        """Which entry stands in at each token, -1 for none: ``[rows, width]``."""
        distance, index = nearest(self.keys, keys)
        hit = mask & (distance <= self.radii.to(distance)[index])
        own = torch.where(hit, index, -1)
        if self.replace == "last":
            return own
        # A row's first hit decides for the row, in this pass and in those that go on with its cache.
        first = hit.int().argmax(1, keepdim=True)
        column = torch.arange(mask.shape[1], device=mask.device)
        before = passes.text_state.get("entry")
        entry = own.gather(1, first)
        old = torch.full_like(entry, -1) if before is None else before.to(entry)
        passes.text_state["entry"] = torch.where(old >= 0, old, entry)
        if self.replace == "prompt":
            return torch.where((old < 0) & mask & (column <= first), entry, -1)
        return torch.where(mask, passes.text_state["entry"], -1)


@dataclass
class Entries:
    """A codebook while it is written.

    Args:
        keys: ``[entries, d_in]``.
        values: ``[entries, d_out]``.
        radii: ``[entries]``.
        labels: ``[entries, tokens]`` target tokens, -1 behind the end.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: Tensor

    @classmethod
    def empty(cls, d_in: int, d_out: int) -> Entries:
        """No entries."""
        return cls(torch.zeros(0, d_in), torch.zeros(0, d_out), torch.zeros(0), torch.zeros(0, 0, dtype=torch.long))

    def place(self, key: Tensor, label: Sequence[int], radius: float) -> tuple[str, int]:
        """Make room for a key (Algorithm 1): the radii and labels change, the value is still to be learnt.

        Args:
            key: ``[d_in]``, the query of the edit.
            label: its target tokens.
            radius: the initial radius.

        Returns:
            Which rule applied, and the index of the entry whose value has to give the label.
        """
        width = max(self.labels.shape[1], len(label))
        self.labels = nn.functional.pad(self.labels, (0, width - self.labels.shape[1]), value=-1)
        own = torch.tensor([*label, *[-1] * (width - len(label))])
        if not len(self.keys):
            return "new", self._add(key, own, radius)
        least, index = nearest(self.keys, key)
        d, i = float(least), int(index)
        if d > float(self.radii[i]) + radius:
            return "new", self._add(key, own, radius)
        if torch.equal(self.labels[i], own):
            self.radii[i] = max(float(self.radii[i]), d * _SLACK)
            return "expand", i
        if d <= _SAME * radius:
            self.labels[i] = own
            return "replace", i
        self.radii[i] = min(float(self.radii[i]), d / 2)
        return "split", self._add(key, own, d / 2)

    def _add(self, key: Tensor, label: Tensor, radius: float) -> int:
        self.keys = torch.cat([self.keys, key[None]])
        self.values = torch.cat([self.values, torch.zeros(1, self.values.shape[1])])
        self.radii = torch.cat([self.radii, torch.tensor([radius])])
        self.labels = torch.cat([self.labels, label[None]])
        return len(self.keys) - 1

    def tensors(self) -> dict[str, Tensor]:
        """All four, by name."""
        return {"keys": self.keys, "values": self.values, "radii": self.radii, "labels": self.labels}

    def codebook(self, place: str, replace: Replace) -> Codebook:
        """A side module that holds them."""
        entries, d_in = self.keys.shape
        made = Codebook(place, entries, d_in, self.values.shape[1], self.labels.shape[1], replace)
        made.load_state_dict(self.tensors())
        return made


class Grace:
    """Cache the activation of a prompt, and the value that turns it into the answer."""

    name = "grace"
    Config = GraceConfig
    capabilities = Capabilities(kind="modules", sequential=True)
    reference = (
        "Hartvigsen et al., Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors, NeurIPS 2023, "
        "arXiv:2211.11031"
    )
    api = (2, 2)
    effect = Codebook

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Write the requests into the codebook one after another; the model is as before when this returns."""
        config: GraceConfig = context.config
        items = batch.encodings
        layer = config.edited_layer(view)
        entries = _opened(view, layer, context)
        rules: list[str] = []
        losses: list[float] = []
        with view.frozen(), suspended(view.model), context.stages("tune"):
            torch.manual_seed(context.seed)
            for item in items:
                rule, loss = _write(view, context, layer, entries, item)
                rules.append(rule)
                losses.append(loss)
        context.state.update({"layer": torch.tensor(layer), **entries.tensors()})
        notes = {"layers": [layer], "entries": len(entries.keys), "rules": rules, "loss": losses}
        codebook = entries.codebook(_path(view, layer), config.replace)
        return side_edit(codebook, view, context, self.name, batch.requests, notes)


def _path(view: ModelView, layer: int) -> str:
    return view.layers[layer].value_projection.name.removesuffix(".weight")


def _opened(view: ModelView, layer: int, context: MethodContext) -> Entries:
    """The entries that earlier edits left, or none."""
    if not context.state:
        projection = view.layers[layer].value_projection
        return Entries.empty(projection.d_in, projection.d_out)
    old = int(context.state["layer"])
    if old != layer:
        raise ConfigError(f"the codebook of this session is at layer {old}, not {layer}; revert its edits first")
    return Entries(**{name: context.state[name].clone() for name in ("keys", "values", "radii", "labels")})


def _write(view: ModelView, context: MethodContext, layer: int, entries: Entries, item: Encoded) -> tuple[str, float]:
    """Place one request in the codebook and learn its value; the rule that applied, and the last loss."""
    config: GraceConfig = context.config
    batch = Targets(view, context.encoder, [item], layer, "target_new")
    column = item.start - 1
    with torch.no_grad():
        found = view.forward(batch.rows, resume=batch.resume, stop=layer, keys=[layer], values=[layer])
    key = found.keys[layer][0, column].float().cpu()
    out = found.values[layer][0, column].float().cpu()
    radius = config.radius or config.relative_radius * float(key.norm())
    rule, i = entries.place(key, item.ids[item.start :], radius)
    size = float(out.square().mean().sqrt())
    if rule != "expand":
        entries.values[i] = out if config.value_init == "warm" else size * torch.randn_like(out)
    book = entries.codebook(_path(view, layer), config.replace).to(view.device)
    value = nn.Parameter(book.values[i].clone())

    def loss(_: Targets) -> Tensor:
        book.values = book.values.detach().index_copy(0, torch.tensor([i], device=value.device), value[None])
        return batch.loss()

    with book.on(view.model):
        rate = config.learning_rate or config.relative_learning_rate * size
        losses = train(context, [value], rate, config.steps, lambda _: [batch], loss, stop=config.stop_loss)
    entries.values[i] = value.detach().cpu()
    return rule, losses[-1]
