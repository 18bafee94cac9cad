"""The check of nvcc's report finds what it is for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["-O3", "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"]


@pytest.fixture
def nvcc_report() -> Any:
    spec = importlib.util.spec_from_file_location("nvcc_report", Path(__file__).with_name("nvcc_report.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(kernels: dict[str, tuple[int, int]], *, registers: int = 100, stack: int = 0, spilled: int = 0) -> str:
    """As ptxas writes it, for every instance of every kernel."""
    lines = []
    for name, (instances, _) in kernels.items():
        for i in range(instances):
            lines += [
                f"ptxas info    : Compiling entry function '_Z1{name}{i}' for 'sm_90a'",
                f"    {stack} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads",
                f"ptxas info    : Used {registers} registers, used 1 barriers",
            ]
    return "\n".join(lines)


def test_within_the_budget(nvcc_report: Any) -> None:
    assert nvcc_report.problems(report(nvcc_report.KERNELS), FLAGS) == []


@pytest.mark.parametrize("used", [{"registers": 251}, {"stack": 8}, {"spilled": 4}])
def test_over_the_budget(nvcc_report: Any, used: dict[str, int]) -> None:
    assert len(nvcc_report.problems(report(nvcc_report.KERNELS, **used), FLAGS)) == 6


def test_a_kernel_or_an_architecture_that_is_missing(nvcc_report: Any) -> None:
    few = {name: (instances - 1, most) for name, (instances, most) in nvcc_report.KERNELS.items()}
    assert len(nvcc_report.problems(report(few), FLAGS)) == 3
    more = [*FLAGS, "-gencode=arch=compute_100,code=sm_100"]
    assert len(nvcc_report.problems(report(nvcc_report.KERNELS), more)) == 3
    assert nvcc_report.problems(report(nvcc_report.KERNELS), ["-O3"]) == ["the flags name no architecture"]
