"""The alignment of values with keys, pair by pair in float64."""

from __future__ import annotations

import math

import torch

from kecore_methods.locate.eamet import Alignment

TAU = 0.3


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected(keys: torch.Tensor, values: torch.Tensor, i: int, nearest: int) -> float:
    """EAMET's two terms of group ``i``, by its definition."""

    def cos(x: torch.Tensor, j: int) -> float:
        a, b = x[i].double(), x[j].double()
        return float(a @ b / (a.norm() * b.norm()))

    others = [j for j in range(len(keys)) if j != i and float(values[j].norm()) > 0]
    of_values, of_keys = ([math.exp(cos(x, j) / TAU) for j in others] for x in (values, keys))
    p, q = ([e / sum(x) for e in x] for x in (of_values, of_keys))
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    near = sorted(others, key=lambda j: -cos(keys, j))[:nearest]
    squares = sum((cos(values, j) - cos(keys, j)) ** 2 for j in near) / len(near)
    return 0.5 * divergence + 2.0 * squares


def test_the_loss_is_that_of_every_pair_known_so_far() -> None:
    keys, values = random(6, 5, seed=1), random(6, 4, seed=2)
    align = Alignment(keys, 0.5, 2.0, TAU, nearest=2)
    first, second = torch.tensor([4, 1, 3]), torch.tensor([0, 5, 2])
    known = torch.zeros_like(values)
    for members in (first, second):
        known[members] = values[members]
        loss = align.loss(values[members], members)
        wanted = [expected(keys, known, int(i), 2) for i in members]
        torch.testing.assert_close(loss.double(), torch.tensor(wanted).double(), rtol=1e-4, atol=1e-5)
        align.keep(values[members], members)


def test_a_group_alone_or_without_a_value_has_none() -> None:
    align = Alignment(random(3, 5, seed=1))
    lone = torch.zeros(3, 4)
    lone[1] = 1.0
    lone.requires_grad_(True)
    loss = align.loss(lone, torch.arange(3))
    assert torch.equal(loss, torch.zeros(3))
    pair = lone.detach().clone()
    pair[2] = 2.0
    pair.requires_grad_(True)
    (gradient,) = torch.autograd.grad(align.loss(pair, torch.arange(3)).sum(), pair)
    assert bool(torch.isfinite(gradient).all())


def test_values_like_their_keys_cost_nothing() -> None:
    keys = random(5, 8, seed=3)
    turn = torch.linalg.qr(random(8, 8, seed=4)).Q
    found = Alignment(keys).loss(3 * keys @ turn, torch.arange(5))
    torch.testing.assert_close(found, torch.zeros(5), atol=1e-5, rtol=0)


def test_the_released_form_of_the_terms() -> None:
    """``KL(P_k ‖ P_r)`` and squares weighted by the softmax of the nearest keys' cosines, one value at a time."""
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(5, 6, generator=generator), torch.randn(5, 4, generator=generator)
    tau, nearest = 0.3, 2
    alignment = Alignment(keys, 2.0, 8.0, tau, nearest, released=True)
    alignment.keep(values, torch.arange(5))
    found = alignment.loss(values, torch.arange(5))
    for i in range(5):
        others = [j for j in range(5) if j != i]
        of_keys = torch.stack([torch.cosine_similarity(keys[i], keys[j], dim=0) for j in others])
        of_values = torch.stack([torch.cosine_similarity(values[i], values[j], dim=0) for j in others])
        p, q = (of_keys / tau).softmax(0), (of_values / tau).softmax(0)
        divergence = (p * (p / q).log()).sum()
        top = of_keys.topk(nearest).indices
        squares = ((of_keys[top] / tau).softmax(0) * (of_keys[top] - of_values[top]).square()).sum()
        torch.testing.assert_close(found[i], 2 * divergence + 8 * squares, rtol=1e-4, atol=1e-5)
