"""Factors in the place of their matrices, against torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kecore.statistics import triangular
from kecore.statistics.triangular import action_change, cholesky_, invert_, pack_triangle, symmetrise_, unpack_triangle


@pytest.fixture(autouse=True, params=[1, 7, 512])
def panels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Panels of one row, of some, and one panel for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triangular, "_PANEL", request.param)
        yield


@pytest.fixture
def matrix() -> Tensor:
    """Positive definite with eigenvalues over four orders of magnitude."""
    x = torch.randn(60, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(0, -2, 30, dtype=torch.float64)
    return x.t() @ x / 60


def test_a_triangle_is_half_and_comes_back(matrix: Tensor) -> None:
    triangle = pack_triangle(matrix)
    assert triangle.numel() == 30 * 31 // 2
    assert torch.equal(triangle, matrix[torch.tril_indices(30, 30).unbind()])
    assert triangular.triangle_width(triangle) == 30
    back = unpack_triangle(triangle)
    assert torch.equal(back, back.t())
    assert torch.equal(back.tril(), matrix.tril())


def test_what_is_above_the_diagonal_is_replaced(matrix: Tensor) -> None:
    given = matrix.tril() + torch.full_like(matrix, 7.0).triu(1)
    assert symmetrise_(given) is given
    assert torch.equal(given, matrix.tril() + matrix.tril(-1).t())


def test_cholesky_is_in_place(matrix: Tensor) -> None:
    expected, place = torch.linalg.cholesky(matrix), matrix.data_ptr()
    lower = cholesky_(matrix)
    assert lower is not None
    assert lower.data_ptr() == place
    torch.testing.assert_close(lower, expected)
    assert torch.equal(lower, lower.tril())


def test_a_matrix_that_is_not_positive_definite_has_no_factor(matrix: Tensor) -> None:
    matrix[3, 3] = -1.0
    assert cholesky_(matrix) is None


def test_inverse_is_in_place(matrix: Tensor) -> None:
    lower = torch.linalg.cholesky(matrix)
    expected = torch.linalg.solve_triangular(lower, torch.eye(30, dtype=torch.float64), upper=False)
    for given in (lower.clone(), lower.t().contiguous().t()):  # by rows, and by columns as the factor comes
        place = given.data_ptr()
        found = invert_(given)
        assert found.data_ptr() == place
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_action_change_is_that_of_the_inverse(matrix: Tensor) -> None:
    half = matrix + 0.01 * torch.diag(torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    ridge = 1e-4 * matrix.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    noise = torch.randn(30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = torch.linalg.cholesky(matrix + ridge) @ noise
    old, new = (torch.linalg.inv(c + ridge) @ keys for c in (half, matrix))
    found = action_change(pack_triangle(half), pack_triangle(matrix))
    assert found == pytest.approx(float((old - new).norm() / new.norm()), rel=1e-6)
    assert action_change(pack_triangle(matrix), pack_triangle(matrix)) == 0.0


def test_overflown_moments_have_no_action(matrix: Tensor) -> None:
    assert action_change(pack_triangle(matrix), pack_triangle(torch.full_like(matrix, float("nan")))) != 0.0
