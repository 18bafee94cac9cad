"""EvoEdit against the paper's recursion with whole projectors, in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.model import SiteId
from kecore.testing import tiny_tokenizer
from kecore.text import Encoder
from kecore_methods.locate.alphaedit import Projected
from kecore_methods.locate.evoedit import EvoEdit

D_IN, D_OUT, SIZES, RIDGE = 20, 7, (3, 2, 4), 0.3


def edits(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Keys ``[D_IN, n]`` and residuals ``[D_OUT, n]`` of each edit; a part of every key is common to all."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(D_IN, 1, generator=random)
    return [
        (0.5 * common + torch.randn(D_IN, n, generator=random), torch.randn(D_OUT, n, generator=random)) for n in SIZES
    ]


def recursion(parts: list[tuple[Tensor, Tensor]], limit: float) -> list[Tensor]:
    """``Δ_t = R_t K_tᵀ P_{t-1} (K_t K_tᵀ P_{t-1} + λI)⁻¹``, then ``P_t = P_{t-1} - Q_t Q_tᵀ``."""
    projector, found = torch.eye(D_IN, dtype=torch.float64), []
    for keys, residuals in parts:
        k, r = keys.double(), residuals.double()
        found.append(r @ k.t() @ projector @ torch.linalg.inv(k @ k.t() @ projector + RIDGE * torch.eye(D_IN).double()))
        u, s, _ = torch.linalg.svd(projector @ k, full_matrices=False)
        q = u[:, s.square() > limit]
        projector = projector - q @ q.t()
    return found


def written(parts: list[tuple[Tensor, Tensor]], limit: float, subjects: list[list[str]]) -> list[Tensor]:
    method: Any = EvoEdit()
    context = MethodContext(config=EvoEdit.Config(occupied=limit), encoder=Encoder(tiny_tokenizer()))
    out: list[Tensor] = []
    for (keys, residuals), names in zip(parts, subjects, strict=True):
        # The size of a key is 1, so that ``occupied`` is the limit itself.
        solution = method.write(Projected(SiteId(5), names, keys, None, residuals, 1.0), RIDGE, context)
        out.append((solution.U @ solution.V.t()).double())
    return out


OTHERS = [[f"{t} {i}" for i in range(n)] for t, n in enumerate(SIZES)]


@pytest.mark.parametrize("limit", [1e-6, 20.0])
def test_updates_are_those_of_the_papers_recursion(limit: float) -> None:
    parts = edits(seed=1)
    expected = recursion(parts, limit)
    for found, want in zip(written(parts, limit, OTHERS), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    whole = recursion(parts, 1e-6)[-1]
    # The larger limit leaves something out, and something in.
    assert torch.allclose(expected[-1], whole) == (limit < 1)
    assert not torch.allclose(expected[-1], recursion(parts, 1e6)[-1])


def test_without_truncation_no_earlier_output_moves() -> None:
    """Theorem of the paper: the null space of ``P_t`` is the span of all keys so far."""
    parts = edits(seed=2)
    before = torch.cat([keys for keys, _ in parts[:2]], 1).double()
    last = written(parts, 1e-9, OTHERS)[-1]
    assert float((last @ before).norm()) < 1e-5 * float(last.norm() * before.norm())


def test_a_subject_that_is_edited_again_is_let_go() -> None:
    """The recursion then runs over what is left of the keys."""
    parts = edits(seed=3)
    again = [OTHERS[0], OTHERS[1], [OTHERS[0][1], *OTHERS[2][1:]]]
    left = [(parts[0][0][:, [0, 2]], parts[0][1][:, [0, 2]]), *parts[1:]]
    torch.testing.assert_close(written(parts, 1e-6, again)[-1], recursion(left, 1e-6)[-1], rtol=1e-4, atol=1e-5)
