"""Edits made of random factors, and a model of two matrices: a ledger asks for no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kecore.api.identity import Fingerprint, Identity
from kecore.api.types import EditRequest
from kecore.edit import LowRank, WeightEdit
from kecore_serve.ledger import Ledger


def small_module(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)).to(dtype)


def fingerprint(model: nn.Module) -> Fingerprint:
    return Fingerprint.of(Identity(model), next(model.parameters()).dtype)


def random_edit(base: Fingerprint, number: int, **fields: Any) -> WeightEdit:
    """One fact, written into both matrices by factors of rank 1."""
    generator = torch.Generator().manual_seed(number)
    updates = {
        "0.weight": LowRank(torch.randn(5, 1, generator=generator), torch.randn(6, 1, generator=generator)),
        "1.weight": LowRank(torch.randn(4, 1, generator=generator), torch.randn(5, 1, generator=generator)),
    }
    request = EditRequest("{} is in", f"Place {number}", f"Town {number}", id=f"fact-{number}")
    return WeightEdit(updates=updates, base=base, method="random", requests=(request,), seed=number, **fields)


def new_ledger(folder: Path, model: nn.Module | None = None) -> Ledger:
    return Ledger.create(folder, "a small module", fingerprint(model or small_module()))
