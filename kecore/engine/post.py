"""The post-processing stage: what is done to an update before it is used.

A :data:`Post` takes an :class:`EditedSite` and an update and returns another update; :func:`chained` runs several, in
order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kecore.edit import Update
from kecore.engine.keys import Keys
from kecore.model import SiteId

__all__ = ["EditedSite", "Post", "chained", "untouched"]


@dataclass(frozen=True, slots=True)
class EditedSite:
    """Where an update goes.

    Args:
        id: the site's name.
        weight: ``[d_out, d_in]``, the model's own, as it is before the update, with all edits so far on it.
        keys: keys that the update was made for.
        state: tensors that survive to the next edit of the sequence; a stage prefixes its keys with its own name.
    """

    id: SiteId
    weight: Tensor
    keys: Keys
    state: dict[str, Tensor] = field(default_factory=dict)


Post = Callable[[EditedSite, Update], Update]
"""``post(site, update)`` to the update that is used in its place."""


def untouched(_site: EditedSite, update: Update) -> Update:
    """Return the update as it is."""
    return update


def chained(posts: Sequence[Post]) -> Post:
    """Return one stage that runs several, in order."""

    def run(site: EditedSite, update: Update) -> Update:
        for post in posts:
            update = post(site, update)
        return update

    return run if posts else untouched
