"""A process that dies while it edits and appends leaves the ledger whole; the full figures by the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_kills_at_random_moments_lose_nothing(root: Path) -> None:
    script = root / "benchmarks" / "ledger_kills.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "12", "--seed", "3"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count = json.loads(done.stdout)
    assert count["kills"] == 12
    assert count["accepted"] > 0
    assert count["leftovers"] <= 4  # of one writer at a time: the next one removes them
