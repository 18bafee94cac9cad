"""The post-processing stage against its definitions, entry by entry and by a full decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kecore.edit import Dense, LowRank
from kecore.engine.keys import Keys
from kecore.engine.post import EditedSite, chained, untouched
from kecore.model import SiteId
from kecore_methods.locate.prune import restrained_spectrum
from kecore_methods.locate.rect import largest_relative_changes
from kecore_methods.locate.simie import simulated_ideal
from kecore_methods.locate.sphere import besides_principal_directions


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KEYS = Keys(random(5, 9, seed=8), torch.tensor([[0.5, 0.25, 0.25, 0, 0], [0, 0, 0, 0.5, 0.5]]))


@pytest.fixture
def site() -> EditedSite:
    return EditedSite(SiteId(3), random(6, 9, seed=0), KEYS)


@pytest.mark.parametrize("kept", [0.1, 0.4, 1.0])
def test_rect_keeps_the_largest_relative_changes(site: EditedSite, kept: float) -> None:
    update = LowRank(random(6, 2, seed=1), random(9, 2, seed=2))
    delta = update.matrix()
    found = largest_relative_changes(kept)(site, update).matrix()
    change = {(i, j): abs(float(delta[i, j] / site.weight[i, j])) for i in range(6) for j in range(9)}
    best = sorted(change, key=lambda place: -change[place])[: round(kept * len(change))]
    expected = torch.zeros_like(delta)
    for place in best:
        expected[place] = delta[place]
    assert torch.equal(found, expected)


def test_rect_takes_a_change_of_nothing_for_the_largest(site: EditedSite) -> None:
    site.weight[0, 0] = site.weight[1, 1] = 0
    delta = torch.full((6, 9), 1e-9)
    delta[1, 1] = 0
    found = largest_relative_changes(1 / 54)(site, Dense(delta)).matrix()
    assert found.nonzero().tolist() == [[0, 0]]


def oracle(weight: Tensor, total: Tensor, base: float) -> Tensor:
    """The restrained sum by full decompositions."""
    top = float(torch.linalg.svdvals(weight.double())[0])
    u, s, v = torch.linalg.svd(total.double(), full_matrices=False)
    reduced = [min(x, math.log(x, base) - math.log(top, base) + top) if x > top else x for x in s.tolist()]
    return u @ torch.diag(torch.tensor(reduced, dtype=torch.float64)) @ v


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_prune_restrains_the_sum_after_every_edit(site: EditedSite, scale: float) -> None:
    post, attached, asked = restrained_spectrum(1.2), torch.zeros(6, 9), torch.zeros(6, 9)
    for step in range(3):
        update = LowRank(random(6, 2, seed=10 + step, scale=scale), random(9, 2, seed=20 + step))
        asked += update.matrix()
        now = EditedSite(SiteId(3), site.weight + attached, KEYS, site.state)
        attached += post(now, update).matrix()
        torch.testing.assert_close(attached, oracle(site.weight, asked, 1.2).float(), rtol=1e-4, atol=1e-5)
    top = float(torch.linalg.svdvals(site.weight)[0])
    assert (float(torch.linalg.svdvals(asked)[0]) > top) == (scale > 1)


def test_prune_never_raises_a_singular_value(site: EditedSite) -> None:
    """With a small ``m`` the formula alone would: its slope at ``m`` is ``1 / (m ln base)``."""
    small = EditedSite(SiteId(3), site.weight / 50, KEYS)
    update = LowRank(random(6, 3, seed=1, scale=0.05), random(9, 3, seed=2))
    found = restrained_spectrum(1.2)(small, update).matrix()
    was, now = torch.linalg.svdvals(update.matrix()), torch.linalg.svdvals(found)
    assert float(was[0]) > 1.2 * float(torch.linalg.svdvals(small.weight)[0])
    assert bool((now <= was * (1 + 1e-5)).all())


def test_prune_leaves_small_updates_as_they_are(site: EditedSite) -> None:
    update = LowRank(random(6, 1, seed=1, scale=0.01), random(9, 1, seed=2))
    assert restrained_spectrum(1.2)(site, update) is update


def test_prune_keeps_layers_apart(site: EditedSite) -> None:
    post = restrained_spectrum(1.2)
    update = LowRank(random(6, 1, seed=1, scale=9), random(9, 1, seed=2))
    first = post(site, update)
    second = post(EditedSite(SiteId(4), site.weight, KEYS, site.state), update)
    assert torch.equal(first.matrix(), second.matrix())


def test_prune_takes_a_dense_update(site: EditedSite) -> None:
    delta = random(6, 9, seed=5, scale=4)
    found = restrained_spectrum(1.5)(site, Dense(delta)).matrix()
    torch.testing.assert_close(found, oracle(site.weight, delta, 1.5).float(), rtol=1e-4, atol=1e-5)


def test_posts_run_in_order(site: EditedSite) -> None:
    update = Dense(random(6, 9, seed=5, scale=4))
    rect, prune = largest_relative_changes(0.4), restrained_spectrum(1.5)
    expected = prune(EditedSite(SiteId(3), site.weight, KEYS), rect(site, update)).matrix()
    assert torch.equal(chained([rect, prune])(site, update).matrix(), expected)
    assert chained([]) is untouched
    assert untouched(site, update) is update


@pytest.mark.parametrize("dense", [False, True])
def test_sphere_attenuates_the_principal_directions_of_the_rows(site: EditedSite, dense: bool) -> None:
    low = LowRank(random(6, 2, seed=1), random(9, 2, seed=2))
    found = besides_principal_directions(0.6, 0.7)(site, Dense(low.matrix()) if dense else low)
    rows = site.weight.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.t() @ rows / len(rows))
    values, vectors = values.flip(0), vectors.flip(1)
    count = 1 + int((values.cumsum(0) / values.sum() < 0.6).sum())
    assert 1 < count < 6
    top = vectors[:, :count]
    expected = low.matrix().double() @ (torch.eye(9) - 0.7 * top @ top.t())
    torch.testing.assert_close(found.matrix().double(), expected, rtol=1e-5, atol=1e-6)


def test_sphere_of_a_flat_spectrum_takes_one_direction(site: EditedSite) -> None:
    update = LowRank(random(6, 2, seed=1), random(9, 2, seed=2))
    found = besides_principal_directions(0.0, 1.0)(site, update).matrix()
    assert torch.linalg.matrix_rank(update.matrix() - found) == 1


def test_simie_in_steps_is_ridge_regression_on_what_each_edit_gave() -> None:
    """Two edits of one sequence: the sum solves one least-squares problem over both edits' keys and what they got."""
    ridge, state = 0.3, {}
    weight = random(6, 9, seed=0)
    keys = [Keys(random(3, 9, seed=10 + i), torch.eye(3)) for i in range(2)]
    updates = [LowRank(random(6, 2, seed=20 + i), random(9, 2, seed=30 + i)) for i in range(2)]
    post, total = simulated_ideal(ridge), torch.zeros(6, 9, dtype=torch.float64)
    asked, wanted = [], []
    size = float(keys[0].rows.double().square().sum()) / 3
    for key, update in zip(keys, updates, strict=True):
        k = key.rows.double().t()
        # What the edit asks for at its keys is there in addition to what the edits before have left there.
        asked.append(k)
        wanted.append((total + update.matrix().double()) @ k)
        total = total + post(EditedSite(SiteId(3), weight + total.float(), key, state), update).matrix().double()
    k, v = torch.cat(asked, 1), torch.cat(wanted, 1)
    expected = v @ k.t() @ torch.linalg.inv(k @ k.t() + ridge * size * torch.eye(9))
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
