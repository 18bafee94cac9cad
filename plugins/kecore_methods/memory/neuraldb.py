"""NeuralDB: keys and values of locate-then-edit kept as a database, and looked up instead of solved for."""

from __future__ import annotations

from typing import Any, ClassVar

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
from kecore.engine.config import LocateConfig
from kecore.engine.keys import Keys
from kecore.engine.passes import Passes, hook_projection
from kecore.model import ModelView
from kecore.ops import Solution

__all__ = ["Database", "NeuralDb"]

_STAGES = frozenset({"merge", "nas"})  # those that act on values; the others act on the update of a weight
_SAME = 0.99  # cosine above which a new key takes an old one's place


class Database(SideModule):
    """Keys and values at one value projection, with a gate (arXiv 2507.18028, section 4).

    A token whose key lies within the gate's cosine of the nearest stored key has that one's value added to the
    projection's output. For all other tokens the output is the model's own, bit for bit. Nothing is remembered from
    token to token, so padding, batches and caches make no difference.

    Args:
        place: path of the value projection.
        entries: how many there are.
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
        """Arguments of the class."""
        entries, d_in = self.keys.shape
        return {
            "place": self.place, "entries": entries, "d_in": d_in, "d_out": self.values.shape[1], "gate": self.gate,
        }  # fmt: skip

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Act on the output of the value projection."""
        return hook_projection(model, self.place, self._act)

    def _act(self, keys: Tensor, out: Tensor, _mask: Tensor, _passes: Passes) -> Tensor:
        cosine, index = self.nearest(keys)
        found = (out.float() + self.values.to(keys.device)[index]).to(out.dtype)
        return torch.where((cosine > self.gate).unsqueeze(-1), found, out)

    def nearest(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine to the nearest stored key, and which one that is: two ``[...]`` tensors for ``[..., d_in]``."""
        cosine, index = (normalize(keys, dim=-1) @ normalize(self.keys.to(keys.device), dim=-1).t()).max(-1)
        return cosine, index


class NeuralDb:
    """Find key and value of each subject as MEMIT does, and store the pair."""

    class Config(LocateConfig):
        """Configuration of NeuralDB; fields of a weight's update have no effect."""

        preset_key: ClassVar[str] = "neuraldb"

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
        unfit = sorted(set(config.every_stage) - _STAGES)
        if unfit:
            raise ConfigError(
                f"neuraldb has no update of a weight that the stages {unfit} could change; it takes "
                f"{', '.join(sorted(_STAGES))}"
            )
        layer = config.edited_layers(view)[-1]

        def as_they_are(_layer: int, keys: Keys, values: Tensor) -> Solution:
            return Solution(values, keys.mean(), 0.0, 1.0)  # value and key of each subject, as columns

        found = config.engine((layer,), solve=as_they_are).plan(view, batch, context, self.name)
        projection = view.layers[layer].value_projection
        pairs = found.updates[projection.name]
        if not isinstance(pairs, LowRank):  # guaranteed by the stages that are allowed
            raise TypeError(f"{projection.name}: key and value came back as {type(pairs).__name__}")
        place = projection.name.removesuffix(".weight")
        effect = self._added(place, layer, pairs.V.t(), pairs.U.t(), context)
        context.state.update({"layer": torch.tensor(layer), "keys": effect.keys, "values": effect.values})
        return ModuleEdit(
            effect=effect,
            supersedes=True,
            base=found.base,
            method=self.name,
            config=found.config,
            requests=batch.requests,
            seed=context.seed,
            notes={**found.notes, "entries": len(effect.keys)},
        )

    @staticmethod
    def _added(place: str, layer: int, keys: Tensor, values: Tensor, context: MethodContext) -> Database:
        """The database with these entries added to those of earlier edits."""
        gate = context.config.gate
        if context.state:
            if int(context.state["layer"]) != layer:
                raise ConfigError(
                    f"the database of this session is at layer {int(context.state['layer'])}, not {layer}; revert its "
                    "edits first"
                )
            old = _database(place, context.state["keys"], context.state["values"], gate)
            cosine, index = old.nearest(keys)
            # A value was found on top of what the database gave there.
            values = values + torch.where((cosine > gate)[:, None], old.values[index], torch.zeros(()))
            kept = torch.ones(len(old.keys), dtype=torch.bool)
            kept[index[cosine > _SAME]] = False
            keys, values = torch.cat([old.keys[kept], keys]), torch.cat([old.values[kept], values])
        return _database(place, keys, values, gate)


def _database(place: str, keys: Tensor, values: Tensor, gate: float) -> Database:
    made = Database(place, keys.shape[0], keys.shape[1], values.shape[1], gate)
    made.load_state_dict({"keys": keys, "values": values})
    return made
