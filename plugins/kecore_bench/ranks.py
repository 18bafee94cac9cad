"""The processes that ``torchrun`` has started: which of them this one is, and how it waits for the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

__all__ = ["Ranks", "here", "together"]

_PATIENCE = timedelta(days=30)
"""Ranks have unequal shares, and the first to end waits for the last; torchrun itself ends all where one dies."""


@dataclass(frozen=True)
class Ranks:
    """One process among several.

    Args:
        rank: its number from 0; rank 0 holds the store, and shows the result.
        world: how many processes there are.
    """

    rank: int
    world: int

    def agreed(self, ready: bool) -> bool:
        """Return what the first rank passes, once all ranks have called this; what the others pass does not count."""
        if self.world == 1:
            return ready
        import torch
        from torch.distributed import broadcast

        flag = torch.tensor([int(ready)])
        broadcast(flag, 0)
        return bool(flag.item())

    def meet(self) -> None:
        """Wait until all ranks have called this."""
        if self.world > 1:
            from torch.distributed import barrier

            barrier()


def here() -> Ranks:
    """Return this process among those of ``torchrun``; alone without it."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def together() -> Iterator[Ranks]:
    """Join the other ranks while a block runs. They only wait for each other: results go through the store."""
    ranks = here()
    if ranks.world == 1:
        yield ranks
        return
    from torch.distributed import destroy_process_group, init_process_group

    init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield ranks
    finally:
        destroy_process_group()
