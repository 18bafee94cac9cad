"""NAS: the norm of values before they are written."""

from __future__ import annotations

import pytest
import torch

from kecore_methods.locate.nas import norm_anchored


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_values_norm_is_that_of_the_first_edit() -> None:
    state: dict[str, torch.Tensor] = {}
    now, delta = random(4, 8, seed=1), random(4, 8, seed=2)
    nas = norm_anchored()
    first = nas(2, lambda: now, delta, state)
    anchor = (now + delta).norm(dim=1).mean()
    value = now + first
    torch.testing.assert_close(value.norm(dim=1), anchor.expand(4))
    torch.testing.assert_close(torch.cosine_similarity(value, now + delta), torch.ones(4))
    grown = nas(2, lambda: 7 * now, 9 * delta, state)
    torch.testing.assert_close((7 * now + grown).norm(dim=1), anchor.expand(4))


@pytest.mark.parametrize(("count", "left"), [(19, 19), (20, 19), (43, 41)])
def test_the_anchor_leaves_the_longest_twentieth_out(count: int, left: int) -> None:
    """NAS as released: of ``n`` lengths the ``⌊n / 20⌋`` largest do not count."""
    lengths = torch.arange(1.0, count + 1)
    value = torch.nn.functional.normalize(random(count, 6, seed=1), dim=1) * lengths[torch.randperm(count)][:, None]
    state: dict[str, torch.Tensor] = {}
    norm_anchored()(2, lambda: torch.zeros(count, 6), value, state)
    assert float(state["nas/anchor/2"]) == pytest.approx((left + 1) / 2)


def test_an_anchor_may_be_given() -> None:
    """That of a thousand pilot edits, say, which the paper takes."""
    state = {"nas/anchor/2": torch.tensor(99.0)}
    now, delta = random(3, 8, seed=1), random(3, 8, seed=2)
    value = now + norm_anchored(2.5)(2, lambda: now, delta, state)
    torch.testing.assert_close(value.norm(dim=1), torch.full((3,), 2.5))
    assert float(state["nas/anchor/2"]) == 2.5


def test_a_value_of_more_than_twice_the_anchor_may_be_left_out() -> None:
    lengths = torch.tensor([1.0, 1.9, 2.1])
    value = torch.nn.functional.normalize(random(3, 6, seed=1), dim=1) * lengths[:, None]
    scaled = norm_anchored(1.0, longest=2)(2, lambda: torch.zeros(3, 6), value, {})
    torch.testing.assert_close(scaled.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))
