"""Low-rank blocks beside linear maps, and a vector database of keys that says which of them is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.edit import SideModule
from kecore.engine.passes import Act, Passes, hook_map
from kecore_methods.memory.grace import nearest

__all__ = ["Clusters", "DynamicLora"]

_SAME = 0.1  # of the initial radius: a query that near to a key is that key's own


class DynamicLora(SideModule):
    """Clusters of keys at one value projection, and low-rank blocks at others above it (arXiv 2312.11795).

    Every token asks for itself: where its key lies within the radius of the nearest cluster, the block of the
    cluster's nearest key is active from this token on, until another hit. Tokens before the first hit, and texts
    without one, pass as they were, bit for bit. A causal model's key at a token depends on the tokens up to it alone,
    so the answer is the same in a padded batch, under teacher forcing, and while a text is written with a cache.

    Args:
        place: path of the value projection whose input is the key.
        maps: paths of the adapted linear maps.
        shapes: ``[d_out, d_in]`` of each.
        clusters: how many there are.
        entries: keys in all clusters.
        blocks: low-rank blocks.
        rank: of a block in each map.
        d_key: width of the keys.
    """

    centres: Tensor
    radii: Tensor
    keys: Tensor
    owner: Tensor
    block: Tensor

    def __init__(
        self,
        place: str,
        maps: Sequence[str],
        shapes: Sequence[Sequence[int]],
        clusters: int,
        entries: int,
        blocks: int,
        rank: int,
        d_key: int,
    ) -> None:
        super().__init__()
        self.place, self.maps, self.shapes = place, list(maps), [list(shape) for shape in shapes]
        self.rank, self.blocks = rank, blocks
        self.register_buffer("centres", torch.zeros(clusters, d_key))
        self.register_buffer("radii", torch.zeros(clusters))
        self.register_buffer("keys", torch.zeros(entries, d_key))
        self.register_buffer("owner", torch.zeros(entries, dtype=torch.long))
        self.register_buffer("block", torch.zeros(entries, dtype=torch.long))
        for i, (d_out, d_in) in enumerate(self.shapes):
            self.register_buffer(f"down{i}", torch.zeros(blocks, rank, d_in))
            self.register_buffer(f"up{i}", torch.zeros(blocks, d_out, rank))

    def settings(self) -> dict[str, Any]:
        """Arguments of the class."""
        return {
            "place": self.place,
            "maps": self.maps,
            "shapes": self.shapes,
            "clusters": len(self.centres),
            "entries": len(self.keys),
            "blocks": self.blocks,
            "rank": self.rank,
            "d_key": self.keys.shape[1],
        }

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Read keys at the one value projection, and act on the output of the adapted ones."""
        reader, *adapted = (model.get_submodule(path) for path in (self.place, *self.maps))
        passes = Passes(model)
        passes.handles.append(hook_map(passes, reader, self._read))
        passes.handles += [hook_map(passes, module, self._adapt(i)) for i, module in enumerate(adapted)]
        return passes.handles

    def _read(self, keys: Tensor, out: Tensor, mask: Tensor, passes: Passes) -> Tensor:
        passes.text_state["active"] = self.active(keys, mask, passes.text_state.get("active"))
        return out

    def active(self, keys: Tensor, mask: Tensor, before: Tensor | None) -> Tensor:
        """Which block is active at each token, -1 for none: ``[rows, width]``.

        The first token of a text is not asked: it has seen nothing, and what it is hardly shows in its key.

        Args:
            keys: ``[rows, width, d_key]``.
            mask: ``[rows, width]`` real tokens.
            before: what was active at the tokens of an earlier pass over the same cache.
        """
        own = torch.where(mask, self.hits(keys), -1)
        if before is None:
            own.scatter_(1, mask.int().argmax(1, keepdim=True), -1)
        else:
            own = torch.cat([before[:, -1:].to(own), own], 1)
        column = torch.arange(own.shape[1], device=own.device)
        last = torch.where(own >= 0, column, 0).cummax(1).values
        return own.gather(1, last)[:, -mask.shape[1] :]

    def hits(self, keys: Tensor) -> Tensor:
        """The block of the key that each query is nearest to in its cluster, -1 outside all clusters: ``[...]``."""
        distance, index = nearest(self.centres, keys)
        hit = distance <= self.radii.to(distance)[index]
        found = torch.full_like(index, -1)
        for cluster in index[hit].unique().tolist():
            here = hit & (index == cluster)
            member = (self.owner == cluster).nonzero().flatten()
            _, which = nearest(self.keys[member], keys[here])
            found[here] = self.block[member].to(which.device)[which]
        return found

    def _adapt(self, index: int) -> Act:
        def act(keys: Tensor, out: Tensor, _mask: Tensor, passes: Passes) -> Tensor:
            active = passes.text_state.get("active")
            if active is None:  # a pass that was begun above the layer of the keys
                return out
            active, out = active.to(out.device), out.clone()
            for block in active[active >= 0].unique().tolist():
                here = active == block
                down, up = (getattr(self, f"{name}{index}")[block].to(keys) for name in ("down", "up"))
                out[here] = (out[here].float() + keys[here] @ down.t() @ up.t()).to(out.dtype)
            return out

        return act


@dataclass
class Clusters:
    """The vector database while it is written.

    Args:
        centres: ``[clusters, d_key]``.
        radii: ``[clusters]``.
        labels: ``[clusters, tokens]`` target tokens, -1 behind the end.
        keys: ``[entries, d_key]``.
        owner: ``[entries]`` cluster of each key.
        block: ``[entries]`` block of each key.
    """

    centres: Tensor
    radii: Tensor
    labels: Tensor
    keys: Tensor
    owner: Tensor
    block: Tensor

    @classmethod
    def empty(cls, d_key: int) -> Clusters:
        """No clusters."""
        none, index = torch.zeros(0, d_key), torch.zeros(0, dtype=torch.long)
        return cls(none, torch.zeros(0), torch.zeros(0, 0, dtype=torch.long), none, index, index)

    def known(self, key: Tensor, radius: float) -> int | None:
        """The block of a key that is there already, up to a tenth of the radius."""
        if not len(self.keys):
            return None
        distance, index = nearest(self.keys, key)
        return int(self.block[index]) if float(distance) <= _SAME * radius else None

    def place(self, key: Tensor, label: Sequence[int], radius: float, block: int) -> str:
        """Put a key into the database.

        Args:
            key: ``[d_key]``.
            label: target tokens of its edit.
            radius: the initial radius.
            block: that is to be active for it.

        Returns:
            Which rule applied.
        """
        width = max(self.labels.shape[1], len(label))
        self.labels = nn.functional.pad(self.labels, (0, width - self.labels.shape[1]), value=-1)
        own = torch.tensor([*label, *[-1] * (width - len(label))])
        if self.known(key, radius) is not None:
            entry = int(nearest(self.keys, key)[1])
            self.block[entry] = block
            self.labels[self.owner[entry]] = own
            return "replace"
        if not len(self.centres):
            return self._open(key, own, radius, block, "new")
        least, index = nearest(self.centres, key)
        d, i = float(least), int(index)
        if d > float(self.radii[i]):
            return self._open(key, own, radius, block, "new")
        if torch.equal(self.labels[i], own):
            self._add(key, i, block)
            return "join"
        self.radii[i] = d / 2
        return self._open(key, own, d / 2, block, "split")

    def _open(self, key: Tensor, label: Tensor, radius: float, block: int, rule: str) -> str:
        self._add(key, len(self.centres), block)
        self.centres = torch.cat([self.centres, key[None]])
        self.radii = torch.cat([self.radii, torch.tensor([radius])])
        self.labels = torch.cat([self.labels, label[None]])
        return rule

    def _add(self, key: Tensor, cluster: int, block: int) -> None:
        self.keys = torch.cat([self.keys, key[None]])
        self.owner = torch.cat([self.owner, torch.tensor([cluster])])
        self.block = torch.cat([self.block, torch.tensor([block])])

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {name: getattr(self, name) for name in ("centres", "radii", "labels", "keys", "owner", "block")}
