"""Measures how right and how fast the ops are on this machine, against the best that torch can do and what peers do.

Every competitor is compared with float64 before it is timed, and all of one row run in turn, so that ratios hold
even where other work shares the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import KecoreError
from kecore.ops import loader, reference
from kecore.ops.api import kv_solve, second_moment_

__all__ = ["CASES", "MomentCase", "SolveCase", "is_wrong", "measure_case", "measure_cases", "self_test"]

_LARGEST_ERROR = {"second_moment_": 3e-6, "kv_solve": 1e-5}  # relative errors that a self-test lets pass
_BUDGET = 1.5  # seconds that one competitor may be timed, after its first run
_ROUNDS = 3


@dataclass(frozen=True)
class MomentCase:
    """An accumulation: ``n`` keys of width ``d``.

    Args:
        d: width.
        n: tokens.
        dtype: of the keys.
        device: where.
    """

    d: int
    n: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    op = "second_moment_"

    @cached_property
    def keys(self) -> Tensor:
        """Keys with a mean, as those behind an activation function have one; ``[n, d]``."""
        noise = torch.randn(self.n, self.d, generator=torch.Generator().manual_seed(0))
        return (noise + 0.2).to(self.device, self.dtype)

    def competitors(self) -> dict[str, Callable[[], Tensor]]:
        """Return, by name, functions that add the keys to a moment of their own and return that."""
        x, d = self.keys, self.d
        native = torch.zeros(d, d, dtype=torch.float64, device=self.device)
        panels = torch.zeros(d, d, device=self.device)
        peers = torch.zeros(d, d, device=self.device)
        width = 512 if d < 8192 else 1024

        def as_panels() -> Tensor:
            """Add half of the products: the lower triangle in panels of columns, in place in float32."""
            tensor_cores = x.is_cuda and x.dtype != torch.float32
            y = x if tensor_cores else x.float()
            for begin in range(0, d, width):
                end = begin + width
                panel = panels[begin:, begin:end]  # [d - begin, width]
                left, right = y[:, begin:].t(), y[:, begin:end]
                if tensor_cores:
                    panel += torch.mm(left, right, out_dtype=torch.float32)
                else:
                    panel.addmm_(left, right)
            return panels

        def as_peers() -> Tensor:
            """Run the statement that MEMIT's code and those derived from it share."""
            y = x.float()
            return peers.add_(y.t() @ y)

        return {"native": lambda: second_moment_(native, x), "torch": as_panels, "peers": as_peers}

    def error(self, moment: Tensor) -> float:
        """Return the relative error of a moment to which the keys were added once, over some of its rows."""
        rows = torch.linspace(0, self.d - 1, min(self.d, 64)).long().to(self.device)  # [r]
        keys = self.keys.double()
        exact = keys[:, rows].t() @ keys  # [r, d]
        lower = torch.arange(self.d, device=self.device) <= rows[:, None]  # [r, d]: what the op writes
        return _relative_error(moment[rows].double() * lower, exact * lower)


@dataclass(frozen=True)
class SolveCase:
    """A MEMIT update for ``n`` facts at width ``d``, its covariance factored before.

    The covariance is that of an autoregressive process whose scale falls tenfold over the columns (condition
    about 3e3, as measured on a small language model): its inverse factor is known in closed form.
    """

    d: int
    n: int
    device: str = "cpu"
    op = "kv_solve"
    dtype = torch.float32
    d_out = 1024
    correlation = 0.7

    @cached_property
    def factor(self) -> Tensor:
        """``L⁻¹``, ``[d, d]`` float32."""
        steps = torch.arange(self.d)
        powers = (-self.correlation) ** steps.double()  # [d]
        powers = torch.where(powers.abs() > 1e-30, powers, 0.0)
        # Row i holds the powers i, i - 1, ..., 0 up to the diagonal.
        inverse = powers.float()[(steps[:, None] - steps).clamp(min=0)].tril_()  # [d, d]
        return inverse.div_(self._scales.float()[:, None]).to(self.device)

    @property
    def _scales(self) -> Tensor:
        return torch.logspace(0, -1, self.d, dtype=torch.float64)

    @cached_property
    def covariance(self) -> Tensor:
        """``L Lᵀ``, ``[d, d]`` float64, which has three diagonals."""
        square = self._scales.square()
        beside = self.correlation * square[:-1]  # [d - 1]
        covariance = torch.diag(square)
        covariance.diagonal()[1:] += self.correlation * beside
        for offset in (-1, 1):
            covariance.diagonal(offset).copy_(beside)
        return covariance.to(self.device)

    @cached_property
    def keys(self) -> Tensor:
        """Keys that have this covariance, ``[d, n]`` float32."""
        noise = torch.randn(self.d, self.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        keys = self._scales[:, None] * noise
        keys[1:] += self.correlation * keys[:-1].clone()
        return keys.float().to(self.device)

    @cached_property
    def residuals(self) -> Tensor:
        """``[d_out, n]`` float32."""
        return torch.randn(self.d_out, self.n, generator=torch.Generator().manual_seed(2)).to(self.device)

    def competitors(self) -> dict[str, Callable[[], Tensor]]:
        """Return, by name, functions that return the update's right factor ``[d, n]``."""
        keys, residuals, ridge = self.keys, self.residuals, float(self.d)
        ridges = torch.tensor([ridge], dtype=torch.float64, device=self.device)

        def as_peers() -> Tensor:
            """Run the statement that MEMIT's code and those derived from it share, in float64."""
            k = keys.double()
            return torch.linalg.solve(ridge * self.covariance + k @ k.t(), k)

        return {
            "native": lambda: kv_solve(keys, residuals, ridge, self.factor).V,
            "torch": lambda: reference.kv_solve(keys[None], residuals[None], ridges, self.factor)[0][0],
            "peers": as_peers,
        }

    @cached_property
    def exact(self) -> Tensor:
        """The exact right factor ``[d, n]`` float64, L solved as the two diagonals that it is."""
        keys = self.keys.double().cpu()
        y = keys.clone()
        for i in range(1, self.d):
            y[i] -= self.correlation * y[i - 1]
        w = y / self._scales.square()[:, None]
        for i in range(self.d - 2, -1, -1):
            w[i] -= self.correlation * w[i + 1]
        system = keys.t() @ w + self.d * torch.eye(self.n, dtype=torch.float64)
        return torch.linalg.solve(system, w, left=False).to(self.device)

    def error(self, right: Tensor) -> float:
        """Return the relative error of a right factor."""
        return _relative_error(right.double(), self.exact)


Case = MomentCase | SolveCase

CASES: tuple[Case, ...] = (
    MomentCase(1536, 4096),
    MomentCase(1536, 4096, torch.float32),
    MomentCase(4096, 2048),
    MomentCase(8192, 1024),
    SolveCase(1536, 100),
    SolveCase(4096, 1),
    SolveCase(4096, 100),
)
"""What ``kecore doctor --bench`` measures: about a minute on two cores."""


def measure_cases(progress: Callable[[str], None] = lambda _: None) -> dict[str, list[dict[str, Any]]]:
    """Measure :data:`CASES`.

    Args:
        progress: called with what is measured next.

    Returns:
        ``{op: [{d, n, dtype, native_s, torch_s, peers_s, relative_error}]}``, times in seconds, the error that of the
        native result.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        progress(f"{case.op} d={case.d} n={case.n}")
        rows.setdefault(case.op, []).append(measure_case(case))
    return rows


def measure_case(case: Case) -> dict[str, Any]:
    """Check each competitor's result, then time all of them in turn.

    Returns:
        One row of :func:`measure_cases`.

    Raises:
        KecoreError: a result is wrong.
    """
    competitors = case.competitors()
    errors = {name: case.error(run()) for name, run in competitors.items()}
    wrong = {name: error for name, error in errors.items() if error > 10 * _LARGEST_ERROR[case.op]}
    if wrong:
        raise KecoreError(f"{case} is computed wrongly: relative errors {wrong}")
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(_ROUNDS):
        for name, run in competitors.items():
            if sum(times[name]) < _BUDGET:
                times[name].append(_seconds(run, case.device))
    return {
        "d": case.d,
        "n": case.n,
        "dtype": str(case.dtype).removeprefix("torch."),
        **{f"{name}_s": min(seconds) for name, seconds in times.items()},
        "relative_error": errors["native"],
    }


def _seconds(run: Callable[[], Tensor], device: str) -> float:
    """Return how long a run takes, until its result is there."""
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def self_test() -> list[tuple[str, str, str, float]]:
    """Report which implementation each op uses on each device, and how far it is from float64.

    Returns:
        ``(op, implementation, reason, relative error)``; the op with its device where that is no CPU.

    Raises:
        NativeError: ``KECORE_NATIVE`` asks for native code that cannot be had.
    """
    backend = loader.active_backend()
    checks: list[tuple[str, str, str, float]] = []
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        native = loader.implementation(torch.device(device)) is not reference
        reason = loader.why_no_cuda() if device == "cuda" and not native else backend.reason
        for case in (MomentCase(200, 500, device=device), SolveCase(150, 12, device=device)):
            error = case.error(case.competitors()["native"]())
            name = case.op if device == "cpu" else f"{case.op} on {device}"
            checks.append((name, backend.kind if native else "torch", reason, error))
    return checks


def is_wrong(op: str, error: float) -> bool:
    """Return whether a self-test's error means that something is broken."""
    op_name = op.split()[0]  # "kv_solve on cuda"
    return not error <= _LARGEST_ERROR[op_name]  # NaN is wrong too


def _relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result - exact).norm() / exact.norm())
