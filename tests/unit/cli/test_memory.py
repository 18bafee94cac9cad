"""How a plan of memory is shown."""

from __future__ import annotations

import pytest
from rich.console import Console

from kecore.cli.console import Screen
from kecore.cli.machine import plan_table, show_plans
from kecore.memory import MemoryPlan, Need

MIB = 1 << 20


def shown(*plans: MemoryPlan) -> str:
    console = Console(width=200, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(plan_table(plans))
    return captured.get()


def test_parts_and_micro_batches_are_named() -> None:
    parts = {"sums": 40 * MIB, "factor": 30 * MIB, "keys": 20 * MIB, "rest": 2 * MIB, "nothing": 0}
    needs = (Need("first", parts, mapped=("factor",)), Need("second", token=MIB, tokens=2000, least=10))
    plan = MemoryPlan(4096 * MIB, {"weights": 500 * MIB, "program": 200 * MIB}, 1234 * MIB, needs)
    text = shown(plan)
    assert "budget 4.00 GiB; there already: weights 500.0 MiB, program 200.0 MiB" in text
    first, second = (
        next(line for line in text.splitlines() if line.strip().startswith(n)) for n in ("first", "second")
    )
    assert "sums 40.0 MiB, factor 30.0 MiB from disk, keys 20.0 MiB, other 2.0 MiB" in first
    assert "792.0 MiB" in first
    assert "1,234 of 2,000 tokens, 1.21 GiB" in second
    assert "1.89 GiB" in second


def test_no_limit_is_said() -> None:
    assert "no limit known" in shown(MemoryPlan(None, {"weights": MIB}, MIB, (Need("edit"),)))


def test_a_table_is_shown_only_where_it_was_asked_for_or_memory_is_tight(capsys: pytest.CaptureFixture[str]) -> None:
    roomy = MemoryPlan(4096 * MIB, {"weights": 500 * MIB}, MIB, (Need("edit"),))
    tight = MemoryPlan(550 * MIB, {"weights": 500 * MIB}, MIB, (Need("edit"),))
    show_plans(Screen(), [roomy], asked=False)
    assert capsys.readouterr().err == "memory: 500.0 MiB at the peak expected of 4.00 GiB that may be taken\n"
    for plan, asked in ((roomy, True), (tight, False)):
        show_plans(Screen(), [plan], asked=asked)
        assert "Memory: budget" in capsys.readouterr().err
