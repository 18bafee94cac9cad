"""The post-processing stage against its definitions, entry by entry and by a full decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kecore.edit import Dense, LowRank
from kecore.editing.post import Site, chained, largest_relative_changes, restrained_spectrum, untouched


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def site() -> Site:
    return Site(3, random(6, 9, seed=0))


@pytest.mark.parametrize("kept", [0.1, 0.4, 1.0])
def test_rect_keeps_the_largest_relative_changes(site: Site, kept: float) -> None:
    update = LowRank(random(6, 2, seed=1), random(9, 2, seed=2))
    delta = update.matrix()
    found = largest_relative_changes(kept)(site, update).matrix()
    change = {(i, j): abs(float(delta[i, j] / site.weight[i, j])) for i in range(6) for j in range(9)}
    best = sorted(change, key=lambda place: -change[place])[: round(kept * len(change))]
    expected = torch.zeros_like(delta)
    for place in best:
        expected[place] = delta[place]
    assert torch.equal(found, expected)


def test_rect_takes_a_change_of_nothing_for_the_largest(site: Site) -> None:
    site.weight[0, 0] = site.weight[1, 1] = 0
    delta = torch.full((6, 9), 1e-9)
    delta[1, 1] = 0
    found = largest_relative_changes(1 / 54)(site, Dense(delta)).matrix()
    assert found.nonzero().tolist() == [[0, 0]]


def oracle(weight: Tensor, total: Tensor, base: float) -> Tensor:
    """The restrained sum by full decompositions."""
    top = float(torch.linalg.svdvals(weight.double())[0])
    u, s, v = torch.linalg.svd(total.double(), full_matrices=False)
    reduced = [math.log(x, base) - math.log(top, base) + top if x > top else x for x in s.tolist()]
    return u @ torch.diag(torch.tensor(reduced, dtype=torch.float64)) @ v


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_prune_restrains_the_sum_after_every_edit(site: Site, scale: float) -> None:
    post, attached, asked = restrained_spectrum(1.2), torch.zeros(6, 9), torch.zeros(6, 9)
    for step in range(3):
        update = LowRank(random(6, 2, seed=10 + step, scale=scale), random(9, 2, seed=20 + step))
        asked += update.matrix()
        now = Site(3, site.weight + attached, site.state)
        attached += post(now, update).matrix()
        torch.testing.assert_close(attached, oracle(site.weight, asked, 1.2).float(), rtol=1e-4, atol=1e-5)
    top = float(torch.linalg.svdvals(site.weight)[0])
    assert (float(torch.linalg.svdvals(asked)[0]) > top) == (scale > 1)


def test_prune_leaves_small_updates_as_they_are(site: Site) -> None:
    update = LowRank(random(6, 1, seed=1, scale=0.01), random(9, 1, seed=2))
    assert restrained_spectrum(1.2)(site, update) is update


def test_prune_keeps_layers_apart(site: Site) -> None:
    post = restrained_spectrum(1.2)
    update = LowRank(random(6, 1, seed=1, scale=9), random(9, 1, seed=2))
    first = post(site, update)
    second = post(Site(4, site.weight, site.state), update)
    assert torch.equal(first.matrix(), second.matrix())


def test_prune_takes_a_dense_update(site: Site) -> None:
    delta = random(6, 9, seed=5, scale=4)
    found = restrained_spectrum(1.5)(site, Dense(delta)).matrix()
    torch.testing.assert_close(found, oracle(site.weight, delta, 1.5).float(), rtol=1e-4, atol=1e-5)


def test_posts_run_in_order(site: Site) -> None:
    update = Dense(random(6, 9, seed=5, scale=4))
    rect, prune = largest_relative_changes(0.4), restrained_spectrum(1.5)
    expected = prune(Site(3, site.weight), rect(site, update)).matrix()
    assert torch.equal(chained([rect, prune])(site, update).matrix(), expected)
    assert chained([]) is untouched
    assert untouched(site, update) is update
