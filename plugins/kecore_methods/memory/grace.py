"""GRACE: a codebook of keys and values beside one feed-forward block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import ModuleEdit, SideModule, suspended
from kecore.engine.passes import Passes, hook_projection
from kecore.engine.side import side_edit
from kecore.engine.tuning import Targets, batch_need, choose_layer, train
from kecore.memory import Need
from kecore.model import ModelView
from kecore.model.sites import Key, Value
from kecore.text import Encoded
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published

__all__ = ["Codebook", "Entries", "Grace", "GraceConfig", "nearest"]

Replace = Literal["last", "prompt", "all"]

_SAME = 0.1  # of the initial radius: a query that near to a key is that key's own
_SLACK = 1.01  # a radius grown to a query holds it also after the rounding of another batch


class GraceConfig(Published):
    """Configuration of GRACE; the published set-ups are for Llama-2-7B (EasyEdit) and GPT2-XL (the paper)."""

    preset_file: ClassVar[str] = "grace"
    hparams_table: ClassVar[HparamsTable | None] = hparams.GRACE

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
        """Return the layer, chosen by depth unless given; by depth never the last: above it no token sees another."""
        index = choose_layer(view, self.layer, self.depth)
        if self.layer is not None:
            return index
        return min(index, max(0, len(view.layers) - 2))

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of one request at a time, and of its value with gradient and moments."""
        return [
            batch_need(view, batch.encodings, 1, self.edited_layer(view), {"value": 16 * view.width}, epochs=self.steps)
        ]


def nearest(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distance to the nearest key, and which one that is.

    Args:
        keys: ``[entries, d]``, at least one.
        queries: ``[..., d]``.

    Returns:
        Two ``[...]`` tensors. A query's result does not depend on the other queries, not even by rounding.
    """
    flat = queries.reshape(-1, queries.shape[-1])  # [n, d]
    # By a matrix product, which rounds by batch, an entry's own query could miss its radius in another batch.
    distance = torch.cdist(flat, keys.to(flat), compute_mode="donot_use_mm_for_euclid_dist")  # [n, entries]
    least, index = distance.min(1)
    return least.reshape(queries.shape[:-1]), index.reshape(queries.shape[:-1])


class Codebook(SideModule):
    """Keys, values, deferral radii and labels at one value projection (arXiv 2211.11031, section 3).

    Every token is decided for itself: where its key lies within the radius of the nearest entry, that entry's value
    stands in for the projection's output. A causal model's key at a token depends on the tokens up to it alone, so
    the answer is the same in a padded batch, under teacher forcing, and while a text is written with a cache.

    Args:
        place: module path of the value projection.
        entries: number of entries.
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
        """Return the arguments of the class."""
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
        """Apply the paper's equation of a GRACE layer: an entry's value within its radius, else the layer's own."""
        entries = self.choose_entries(keys, mask, passes)
        values = self.values.to(out.device, out.dtype)[entries.clamp(min=0)]  # [rows, width, d_out]
        return torch.where((entries >= 0).unsqueeze(-1), values, out)

    def choose_entries(self, keys: Tensor, mask: Tensor, passes: Passes) -> Tensor:
        """Return which entry stands in at each token, -1 for none: ``[rows, width]``."""
        distance, index = nearest(self.keys, keys)  # [rows, width] each
        hit = mask & (distance <= self.radii.to(distance)[index])
        token_entry = torch.where(hit, index, -1)
        if self.replace == "last":
            return token_entry
        # A row's first hit decides for the row, in this pass and in those that go on with its cache.
        first_column = hit.int().argmax(1, keepdim=True)  # [rows, 1]; 0 where there is no hit
        first_entry = token_entry.gather(1, first_column)  # [rows, 1]; -1 where there is no hit
        earlier_entry = passes.text_state.get("entry")
        if earlier_entry is None:
            earlier_entry = torch.full_like(first_entry, -1)
        earlier_entry = earlier_entry.to(first_entry)
        row_entry = torch.where(earlier_entry >= 0, earlier_entry, first_entry)
        passes.text_state["entry"] = row_entry
        if self.replace == "prompt":
            column = torch.arange(mask.shape[1], device=mask.device)
            return torch.where((earlier_entry < 0) & mask & (column <= first_column), first_entry, -1)
        return torch.where(mask, row_entry, -1)


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
        """Return a codebook without entries."""
        return cls(torch.zeros(0, d_in), torch.zeros(0, d_out), torch.zeros(0), torch.zeros(0, 0, dtype=torch.long))

    def make_room(self, key: Tensor, label: Sequence[int], radius: float) -> tuple[str, int]:
        """Make room for a key (Algorithm 1): the radii and labels change, the value is still to be learnt.

        Args:
            key: ``[d_in]``, the query of the edit.
            label: its target tokens.
            radius: the initial radius.

        Returns:
            Which rule applied, and the index of the entry whose value has to give the label.
        """
        width = max(self.labels.shape[1], len(label))
        self.labels = nn.functional.pad(self.labels, (0, width - self.labels.shape[1]), value=-1)  # [entries, width]
        padded_label = torch.tensor([*label, *[-1] * (width - len(label))])
        if not len(self.keys):
            return "new", self._append(key, padded_label, radius)
        nearest_distance, nearest_index = nearest(self.keys, key)
        distance, entry = float(nearest_distance), int(nearest_index)
        if distance > float(self.radii[entry]) + radius:  # both balls are apart
            return "new", self._append(key, padded_label, radius)
        if torch.equal(self.labels[entry], padded_label):
            self.radii[entry] = max(float(self.radii[entry]), distance * _SLACK)
            return "expand", entry
        if distance <= _SAME * radius:
            self.labels[entry] = padded_label
            return "replace", entry
        # Another label: both entries end half-way between their keys.
        self.radii[entry] = min(float(self.radii[entry]), distance / 2)
        return "split", self._append(key, padded_label, distance / 2)

    def _append(self, key: Tensor, label: Tensor, radius: float) -> int:
        self.keys = torch.cat([self.keys, key[None]])
        self.values = torch.cat([self.values, torch.zeros(1, self.values.shape[1])])
        self.radii = torch.cat([self.radii, torch.tensor([radius])])
        self.labels = torch.cat([self.labels, label[None]])
        return len(self.keys) - 1

    def tensors(self) -> dict[str, Tensor]:
        """Return all four tensors by name."""
        return {"keys": self.keys, "values": self.values, "radii": self.radii, "labels": self.labels}

    def codebook(self, path: str, replace: Replace) -> Codebook:
        """Return a side module with these entries, for the value projection at a module path."""
        entries, d_in = self.keys.shape
        codebook = Codebook(
            path, entries, d_in, d_out=self.values.shape[1], label_tokens=self.labels.shape[1], replace=replace
        )
        codebook.load_state_dict(self.tensors())
        return codebook


class Grace:
    """Cache the activation of a prompt, and the value that turns it into the answer."""

    name = "grace"
    Config = GraceConfig
    capabilities = Capabilities(kind="modules", sequential=True, needs_subject=False)
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
        entries = _open_entries(view, layer, context)
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
    return view.layers[layer].block.name


def _open_entries(view: ModelView, layer: int, context: MethodContext) -> Entries:
    """Return the entries that earlier edits left, or none.

    Raises:
        ConfigError: they are at another layer.
    """
    if not context.state:
        projection = view.layers[layer].block
        return Entries.empty(projection.d_in, projection.d_out)
    session_layer = int(context.state["layer"])
    if session_layer != layer:
        raise ConfigError(
            f"the codebook of this session is at layer {session_layer}, not {layer}; revert its edits first"
        )
    return Entries(**{name: context.state[name].clone() for name in ("keys", "values", "radii", "labels")})


def _write(view: ModelView, context: MethodContext, layer: int, entries: Entries, item: Encoded) -> tuple[str, float]:
    """Write one request into the codebook: make room for its key, and learn its value.

    Returns:
        The rule that applied, and the last loss.
    """
    config: GraceConfig = context.config
    batch = Targets(view, context.encoder, [item], layer, "target_new")
    column = item.start - 1
    with torch.no_grad():
        run = view.run(batch.rows, taps=[Key(layer), Value(layer)], first=batch.first, last=layer)
    key = run[Key(layer)][0, column].float().cpu()
    out = run[Value(layer)][0, column].float().cpu()  # [d_out], what the value replaces
    radius = config.radius
    if radius is None:
        radius = config.relative_radius * float(key.norm())
    rule, entry = entries.make_room(key, item.ids[item.start :], radius)
    size = float(out.square().mean().sqrt())
    if rule != "expand":  # an expanded entry goes on from its value
        if config.value_init == "warm":
            entries.values[entry] = out
        else:
            entries.values[entry] = size * torch.randn_like(out)
    codebook = entries.codebook(_path(view, layer), config.replace).to(view.device)
    value = nn.Parameter(codebook.values[entry].clone())
    row = torch.tensor([entry], device=value.device)

    def loss(_: Targets) -> Tensor:
        codebook.values = codebook.values.detach().index_copy(0, row, value[None])
        return batch.loss()

    with codebook.on(view.model):
        rate = config.learning_rate
        if rate is None:
            rate = config.relative_learning_rate * size
        losses = train(context, [value], rate, config.steps, lambda _: [batch], loss, stop=config.stop_loss)
    entries.values[entry] = value.detach().cpu()
    return rule, losses[-1]
