"""NeuralDB: keys and values of locate-then-edit kept as a database, and looked up instead of solved for."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle

from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import LowRank, ModuleEdit, SideModule
from kecore.engine.closed_form import ClosedForm, unsolved
from kecore.engine.config import LocateConfig
from kecore.engine.keys import Keys
from kecore.engine.passes import Passes, hook_projection
from kecore.model import ModelView
from kecore.ops import Solution

__all__ = ["Database", "NeuralDb"]

_OF_VALUES = frozenset({"coupling", "gain", "grouping", "target", "values"})  # what stages may change here
_SAME = 0.99  # cosine above which a new key takes an old one's place


class Database(SideModule):
    """Keys and values at one value projection, with a gate (arXiv 2507.18028, section 4).

    A token whose key lies within the gate's cosine of the nearest stored key has that one's value added to the
    projection's output. For all other tokens the output is the model's own, bit for bit. Nothing is remembered from
    token to token, so padding, batches and caches make no difference.

    Args:
        place: module path of the value projection.
        entries: number of entries.
        d_in: width of the keys.
        d_out: width of the values.
        gate: least cosine.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, place: str, entries: int, d_in: int, d_out: int, gate: float) -> None:
        super().__init__()
        self.place, self.gate = place, gate
        self.register_buffer("keys", torch.zeros(entries, d_in))
        self.register_buffer("values", torch.zeros(entries, d_out))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the class."""
        entries, d_in = self.keys.shape
        return {
            "place": self.place,
            "entries": entries,
            "d_in": d_in,
            "d_out": self.values.shape[1],
            "gate": self.gate,
        }

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Act on the output of the value projection."""
        return hook_projection(model, self.place, self._act)

    def _act(self, keys: Tensor, out: Tensor, _mask: Tensor, _passes: Passes) -> Tensor:
        cosine, entry = self.nearest(keys)  # [rows, width] each
        edited = (out.float() + self.values.to(keys.device)[entry]).to(out.dtype)  # [rows, width, d_out]
        return torch.where((cosine > self.gate).unsqueeze(-1), edited, out)

    def nearest(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosine to the nearest stored key, and which entry that is: ``[...]`` for ``[..., d_in]``."""
        stored = normalize(self.keys.to(keys.device), dim=-1)  # [entries, d_in]
        cosine, entry = (normalize(keys, dim=-1) @ stored.t()).max(-1)
        return cosine, entry


class NeuralDb:
    """Find key and value of each subject as MEMIT does, and store the pair."""

    class Config(LocateConfig):
        """Configuration of NeuralDB; fields of a weight's update have no effect."""

        gate: float = Field(
            default=0.65, gt=-1, lt=1, description="Least cosine of a token's key to a stored one (0.65 in the paper)."
        )
        gain: float = Field(default=1.0, gt=0, description="Factor of the values; they arrive whole.")

    name = "neuraldb"
    capabilities = Capabilities(kind="modules", batch=True, sequential=True)
    reference = (
        "Fei et al., NeuralDB: Scaling Knowledge Editing in LLMs to 100,000 Facts with Neural KV Database, ICLR 2026, "
        "arXiv:2507.18028"
    )
    api = (2, 2)
    effect = Database

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Find keys and values, with the entries of earlier edits in effect; the model is as before on return."""
        config: NeuralDb.Config = context.config
        unsuitable = [name for name in config.all_stages if not _acts_on_values(config, name)]
        if unsuitable:
            raise ConfigError(
                f"neuraldb has no update of a weight that the stages {unsuitable} could change; it takes stages that "
                "act on values, such as 'merge' and 'nas'"
            )
        layer = config.edited_layers(view)[-1]

        def keep_pairs(_layer: int, keys: Keys, values: Tensor) -> Solution:
            return Solution(values, keys.mean(), 0.0, 1.0)  # value and key of each subject, as columns

        projection = view.layers[layer].site.linear
        weight_edit = config.engine((layer,), solve=keep_pairs).plan(view, batch, context, self.name)
        pairs = weight_edit.updates[projection.name]
        if not isinstance(pairs, LowRank):  # guaranteed by the stages that are allowed
            raise TypeError(f"{projection.name}: key and value came back as {type(pairs).__name__}")
        path = projection.name.removesuffix(".weight")
        effect = self._add_entries(path, layer, pairs.V.t(), pairs.U.t(), context)
        context.state.update({"layer": torch.tensor(layer), "keys": effect.keys, "values": effect.values})
        return ModuleEdit(
            effect=effect,
            supersedes=True,
            base=weight_edit.base,
            method=self.name,
            config=weight_edit.config,
            requests=batch.requests,
            seed=context.seed,
            notes={**weight_edit.notes, "entries": len(effect.keys)},
        )

    @staticmethod
    def _add_entries(path: str, layer: int, keys: Tensor, values: Tensor, context: MethodContext) -> Database:
        """Return the database with these entries behind those of earlier edits.

        Args:
            path: module path of the value projection.
            layer: its layer.
            keys: ``[entries, d_in]``.
            values: ``[entries, d_out]``.
            context: of the edit.

        Raises:
            ConfigError: the entries of earlier edits are at another layer.
        """
        gate = context.config.gate
        if not context.state:
            return _make_database(path, keys, values, gate)
        session_layer = int(context.state["layer"])
        if session_layer != layer:
            raise ConfigError(
                f"the database of this session is at layer {session_layer}, not {layer}; revert its edits first"
            )
        earlier = _make_database(path, context.state["keys"], context.state["values"], gate)
        cosine, nearest_entry = earlier.nearest(keys)  # [entries] each
        # A new value was optimised on top of what the database added at its key.
        added = torch.where((cosine > gate)[:, None], earlier.values[nearest_entry], torch.zeros(()))
        values = values + added
        # A new entry takes the place of an earlier one with the same key.
        stays = torch.ones(len(earlier.keys), dtype=torch.bool)
        stays[nearest_entry[cosine > _SAME]] = False
        keys, values = torch.cat([earlier.keys[stays], keys]), torch.cat([earlier.values[stays], values])
        return _make_database(path, keys, values, gate)


def _make_database(path: str, keys: Tensor, values: Tensor, gate: float) -> Database:
    entries, d_in = keys.shape
    database = Database(path, entries, d_in, values.shape[1], gate)
    database.load_state_dict({"keys": keys, "values": values})
    return database


def _acts_on_values(config: NeuralDb.Config, stage: str) -> bool:
    """Return whether a stage leaves alone all that a weight's update is made by."""
    plain = ClosedForm(layers=(0,), contexts=0, context_tokens=0, values=config.value_settings(), solve=unsolved)
    staged = config.apply_stage(plain, stage)
    names = {field.name for field in fields(plain)} - _OF_VALUES
    return all(getattr(staged, name) is getattr(plain, name) for name in names)
