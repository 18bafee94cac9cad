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

    Every token is decided for itself: where its key lies within the radius of the nearest cluster, the block of the
    cluster's nearest key is active from this token on, until another hit. Tokens before the first hit, and texts
    without one, pass as they were, bit for bit. A causal model's key at a token depends on the tokens up to it alone,
    so the answer is the same in a padded batch, under teacher forcing, and while a text is written with a cache.

    Args:
        place: module path of the value projection whose input is the key.
        maps: module paths of the adapted linear maps.
        shapes: ``[d_out, d_in]`` of each.
        clusters: number of clusters.
        entries: number of keys in all clusters.
        blocks: number of low-rank blocks.
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
        """Return the arguments of the class."""
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
        key_map = model.get_submodule(self.place)
        adapted_maps = [model.get_submodule(path) for path in self.maps]
        passes = Passes(model)
        passes.handles.append(hook_map(passes, key_map, self._read))
        for index, module in enumerate(adapted_maps):
            passes.handles.append(hook_map(passes, module, self._adapt(index)))
        return passes.handles

    def _read(self, keys: Tensor, out: Tensor, mask: Tensor, passes: Passes) -> Tensor:
        passes.text_state["active"] = self.active(
            keys, mask, passes.text_state.get("active"), follows_text=passes.follows_text
        )
        return out

    def active(self, keys: Tensor, mask: Tensor, before: Tensor | None, *, follows_text: bool = False) -> Tensor:
        """Return which block is active at each token, -1 for none: ``[rows, width]``.

        The first token of a text never hits: it has seen nothing, and which token it is hardly shows in its key.

        Args:
            keys: ``[rows, width, d_key]``.
            mask: ``[rows, width]`` real tokens.
            before: what was active at the tokens of an earlier pass over the same cache.
            follows_text: the first token has seen an encoder's text after all, and may hit.
        """
        hit_block = torch.where(mask, self.hits(keys), -1)  # [rows, width]
        if before is None:
            if not follows_text:
                first_token = mask.int().argmax(1, keepdim=True)  # [rows, 1]
                hit_block.scatter_(1, first_token, -1)
        else:
            hit_block = torch.cat([before[:, -1:].to(hit_block), hit_block], 1)  # [rows, 1 + width]
        # A block stays active until the next hit: each token takes the column of the last hit up to it.
        column = torch.arange(hit_block.shape[1], device=hit_block.device)
        last_hit = torch.where(hit_block >= 0, column, 0).cummax(1).values
        return hit_block.gather(1, last_hit)[:, -mask.shape[1] :]

    def hits(self, keys: Tensor) -> Tensor:
        """Return the block of the key that each query is nearest to in its cluster, -1 outside all clusters.

        Args:
            keys: queries ``[..., d_key]``; the result is ``[...]``.
        """
        distance, nearest_cluster = nearest(self.centres, keys)
        inside = distance <= self.radii.to(distance)[nearest_cluster]
        hit_block = torch.full_like(nearest_cluster, -1)
        for cluster in nearest_cluster[inside].unique().tolist():
            queries = inside & (nearest_cluster == cluster)
            members = (self.owner == cluster).nonzero().flatten()  # entries of this cluster
            _, nearest_member = nearest(self.keys[members], keys[queries])
            hit_block[queries] = self.block[members].to(nearest_member.device)[nearest_member]
        return hit_block

    def _adapt(self, index: int) -> Act:
        def act(keys: Tensor, out: Tensor, _mask: Tensor, passes: Passes) -> Tensor:
            active = passes.text_state.get("active")
            if active is None:  # a pass that was begun above the layer of the keys
                return out
            active, out = active.to(out.device), out.clone()
            for block in active[active >= 0].unique().tolist():
                tokens = active == block  # [rows, width]
                down = getattr(self, f"down{index}")[block].to(keys)  # [rank, d_in]
                up = getattr(self, f"up{index}")[block].to(keys)  # [d_out, rank]
                out[tokens] = (out[tokens].float() + keys[tokens] @ down.t() @ up.t()).to(out.dtype)
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
        """Return a database without clusters."""
        no_keys, no_index = torch.zeros(0, d_key), torch.zeros(0, dtype=torch.long)
        no_labels = torch.zeros(0, 0, dtype=torch.long)
        return cls(
            centres=no_keys, radii=torch.zeros(0), labels=no_labels, keys=no_keys, owner=no_index, block=no_index
        )

    def entry_of(self, key: Tensor, radius: float) -> int | None:
        """Return the entry whose key this is, up to a tenth of the radius; None if there is none."""
        if not len(self.keys):
            return None
        distance, entry = nearest(self.keys, key)
        if float(distance) > _SAME * radius:
            return None
        return int(entry)

    def put(self, key: Tensor, label: Sequence[int], radius: float, block: int) -> str:
        """Put a key into the database.

        Args:
            key: ``[d_key]``.
            label: target tokens of its edit.
            radius: the initial radius.
            block: the block that is to be active for it.

        Returns:
            Which rule applied.
        """
        width = max(self.labels.shape[1], len(label))
        self.labels = nn.functional.pad(self.labels, (0, width - self.labels.shape[1]), value=-1)  # [clusters, width]
        padded_label = torch.tensor([*label, *[-1] * (width - len(label))])
        entry = self.entry_of(key, radius)
        if entry is not None:
            self.block[entry] = block
            self.labels[self.owner[entry]] = padded_label
            return "replace"
        if not len(self.centres):
            self._append_cluster(key, padded_label, radius, block)
            return "new"
        nearest_distance, nearest_index = nearest(self.centres, key)
        distance, cluster = float(nearest_distance), int(nearest_index)
        if distance > float(self.radii[cluster]):
            self._append_cluster(key, padded_label, radius, block)
            return "new"
        if torch.equal(self.labels[cluster], padded_label):
            self._append_key(key, cluster, block)
            return "join"
        # Another label inside the cluster: both end half-way between their centres.
        self.radii[cluster] = distance / 2
        self._append_cluster(key, padded_label, distance / 2, block)
        return "split"

    def _append_cluster(self, key: Tensor, label: Tensor, radius: float, block: int) -> None:
        self._append_key(key, len(self.centres), block)
        self.centres = torch.cat([self.centres, key[None]])
        self.radii = torch.cat([self.radii, torch.tensor([radius])])
        self.labels = torch.cat([self.labels, label[None]])

    def _append_key(self, key: Tensor, cluster: int, block: int) -> None:
        self.keys = torch.cat([self.keys, key[None]])
        self.owner = torch.cat([self.owner, torch.tensor([cluster])])
        self.block = torch.cat([self.block, torch.tensor([block])])

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {
            "centres": self.centres,
            "radii": self.radii,
            "labels": self.labels,
            "keys": self.keys,
            "owner": self.owner,
            "block": self.block,
        }
