"""Edits in sequence equal one edit: the recursion against least squares over everything, in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kecore.engine.accumulate import Past, append, fold, gathered
from kecore.engine.keys import Keys
from kecore.engine.solve import least_squares
from kecore.model import SiteId

D_IN, D_OUT, FACTS, CONTEXTS = 24, 10, 6, 3


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def moment(random: torch.Generator) -> Tensor:
    """Second moment of preserved keys."""
    rows = torch.randn(200, D_IN, generator=random, dtype=torch.float64)
    return rows.t() @ rows / len(rows)


def keys_of(rows: Tensor) -> Keys:
    """``CONTEXTS`` keys a fact, of which the first counts half."""
    weight = torch.zeros(len(rows) // CONTEXTS, len(rows))
    for fact in range(len(weight)):
        weight[fact, fact * CONTEXTS : (fact + 1) * CONTEXTS] = torch.tensor([0.5, 0.25, 0.25])
    return Keys(rows, weight)


def one_shot(moment: Tensor, rows: Tensor, values: Tensor, ridge: float) -> Tensor:
    """Weighted least squares by the normal equations of MEMIT (eq. 14), ``[D_OUT, D_IN]`` float64."""
    weight = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).repeat(FACTS)
    k = rows.double().t()
    v = values.double().repeat_interleave(CONTEXTS, 1)
    return (v * weight) @ k.t() @ torch.linalg.inv(ridge * moment + (k * weight) @ k.t())


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 2, 3), (1, 1, 1, 1, 1, 1)])
def test_steps_add_up_to_one_edit(
    random: torch.Generator, moment: Tensor, sizes: tuple[int, ...], absolute: bool
) -> None:
    factor = torch.linalg.inv(torch.linalg.cholesky(moment)).float()
    rows = torch.randn(FACTS * CONTEXTS, D_IN, generator=random)
    values = torch.randn(D_OUT, FACTS, generator=random)
    state: dict[str, Tensor] = {}
    total, begin = torch.zeros(D_OUT, D_IN), 0
    for size in sizes:
        end = begin + size
        part = rows[begin * CONTEXTS : end * CONTEXTS]
        # What the value of each context still lacks differs, so each is a group of its own here.
        keys = keys_of(part)
        columns, shares = keys.each()
        root = shares.max(1).values
        lacking = values[:, begin:end].repeat_interleave(CONTEXTS, 1) - total @ part.t()
        alone = Keys(columns.t(), torch.eye(len(root)))
        past = Past(state, SiteId(0), [f"{begin} {i}" for i in range(len(root))])
        found = least_squares(alone, lacking * root, factor, 0.3, absolute=absolute, each=False, past=past)
        total += found.U @ found.V.t()
        begin = end
    ridge = float(state["past/0/weight"])
    assert ridge == 0.3 if absolute else ridge > 0.3
    torch.testing.assert_close(total.double(), one_shot(moment, rows, values, ridge), rtol=1e-3, atol=1e-4)


def test_without_the_past_they_do_not(random: torch.Generator, moment: Tensor) -> None:
    """The test above would notice."""
    factor = torch.linalg.inv(torch.linalg.cholesky(moment)).float()
    rows = torch.randn(FACTS * CONTEXTS, D_IN, generator=random)
    values = torch.randn(D_OUT, FACTS, generator=random)
    total = torch.zeros(D_OUT, D_IN)
    for i in range(FACTS):
        keys = keys_of(rows[i * CONTEXTS : (i + 1) * CONTEXTS])
        lacking = values[:, i : i + 1] - total @ keys.mean()
        found = least_squares(keys, lacking, factor, 0.3, absolute=True)
        total += found.U @ found.V.t()
    expected = one_shot(moment, rows, values, 0.3)
    assert float((total.double() - expected).norm() / expected.norm()) > 0.05


def test_columns_know_their_group(random: torch.Generator, moment: Tensor) -> None:
    state: dict[str, Tensor] = {}
    keys = keys_of(torch.randn(2 * CONTEXTS, D_IN, generator=random))
    least_squares(
        keys, torch.randn(D_OUT, 2, generator=random), None, 0.3, past=Past(state, SiteId(4), ["France", "Anna"])
    )
    owner = gathered(state, "past/4/owner")
    assert (owner == owner[[0, 0, 0, 3, 3, 3]]).all()
    assert owner[0] != owner[3]


def test_a_later_request_about_a_subject_takes_precedence(random: torch.Generator) -> None:
    state: dict[str, Tensor] = {}

    def write(subjects: list[str], rows: Tensor, values: Tensor) -> Any:
        keys = Keys(rows, torch.eye(len(rows)))
        return least_squares(keys, values, None, 1e-6, absolute=True, each=False, past=Past(state, SiteId(0), subjects))

    france, anna = torch.randn(2, D_IN, generator=random)
    old, new = torch.randn(2, D_OUT, 1, generator=random)
    write(["France", "Anna"], torch.stack([france, anna]), torch.cat([old, old], 1))
    again = write(["France"], france[None], new)
    delta = again.U @ again.V.t()
    torch.testing.assert_close(delta @ france, new[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(delta @ anna, torch.zeros(D_OUT), rtol=0, atol=1e-3)
    assert gathered(state, "past/0/keys").shape == (D_IN, 2)


def test_parts_are_kept_once(random: torch.Generator) -> None:
    """The states of a hundred edits share their keys instead of each holding all that came before."""
    parts = torch.randn(12, D_IN, 3, generator=random)
    states: list[dict[str, Tensor]] = [{}]
    for part in parts:
        state = dict(states[-1])
        append(state, "keys/1", part)
        append(state, "keys/10", -part)
        states.append(state)
    for i, state in enumerate(states[1:], 1):
        for name, sign in (("keys/1", 1), ("keys/10", -1)):
            assert torch.equal(gathered(state, name), sign * torch.cat(list(parts[:i]), 1))
    assert len({id(tensor) for state in states for tensor in state.values()}) == 2 * len(parts)


def test_folded_keys_have_the_same_second_moment_and_stay_as_large(random: torch.Generator) -> None:
    state: dict[str, Tensor] = {}
    everything: list[Tensor] = []
    for size in (10, 10, 10, 40, 5):  # of rows there are 24
        part = torch.randn(D_IN, size, generator=random)
        everything.append(part)
        fold(state, "keys")
        append(state, "keys", part)
        keys = torch.cat(everything, 1).double()
        kept = gathered(state, "keys").double()
        torch.testing.assert_close(kept @ kept.t(), keys @ keys.t(), rtol=1e-5, atol=1e-4)
    assert gathered(state, "keys").shape == (D_IN, D_IN + 5)
    assert sorted(state) == ["keys/0", "keys/1"]


def test_the_past_of_a_long_sequence_stays_as_large_and_gives_the_same(random: torch.Generator, moment: Tensor) -> None:
    """Sixty edits of two facts in a space of 24 dimensions are one least-squares problem, folded or not."""
    factor = torch.linalg.inv(torch.linalg.cholesky(moment)).float()
    rows = torch.randn(120, D_IN, generator=random)
    values = torch.randn(D_OUT, 120, generator=random)
    state: dict[str, Tensor] = {}
    total = torch.zeros(D_OUT, D_IN)
    sizes: list[int] = []
    for begin in range(0, 120, 2):
        part = rows[begin : begin + 2]
        past = Past(state, SiteId(0), [f"subject {begin}", f"subject {begin + 1}"])
        lacking = values[:, begin : begin + 2] - total @ part.t()
        keys = Keys(part, torch.eye(2))
        found = least_squares(keys, lacking, factor, 0.3, absolute=True, each=False, past=past)
        total += found.U @ found.V.t()
        sizes.append(gathered(state, "past/0/keys").shape[1])
    k, v = rows.double().t(), values.double()
    expected = v @ k.t() @ torch.linalg.inv(0.3 * moment + k @ k.t())
    assert float((total.double() - expected).norm() / expected.norm()) < 1e-4
    assert max(sizes) <= 2 * D_IN + 2


def test_a_folded_subject_is_written_anew(random: torch.Generator) -> None:
    """Its new value gets at least what it would get had its old key been taken out by itself."""
    state: dict[str, Tensor] = {}
    rows = torch.randn(60, D_IN, generator=random)

    def write(subject: str, row: Tensor, value: Tensor) -> float:
        past, keys = Past(state, SiteId(0), [subject]), Keys(row[None], torch.eye(1))
        found = least_squares(keys, value, None, 1e-3, absolute=True, each=False, past=past)
        return float(((found.U @ found.V.t()) @ row).norm() / value.norm())

    for number, row in enumerate(rows):
        write(f"subject {number}", row, torch.randn(D_OUT, 1, generator=random))
    assert "past/0/folded" in state
    value, row = torch.randn(D_OUT, 1, generator=random), rows[3].double()
    others = torch.cat([rows[:3], rows[4:]]).double()
    system = 1e-3 * torch.eye(D_IN, dtype=torch.float64) + others.t() @ others + torch.outer(row, row)
    alone = float(row @ torch.linalg.solve(system, row))  # share of its value that it would get
    kept = dict(state)
    assert write("subject 3", rows[3], value) >= alone - 1e-3
    state.clear()
    state.update(kept)
    assert write("somebody else", rows[3], value) < alone - 1e-3  # the old key must stay where it is
