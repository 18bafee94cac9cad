"""Shows which facts hold after an edit, and whether the edit is as good as was asked for."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kecore.api.errors import ConfigError
from kecore.cli.console import count_noun, format_score, make_table

if TYPE_CHECKING:
    from kecore.evaluate import Evaluation
    from kecore.evaluate.verdicts import Verdict

__all__ = ["FILE", "failures_table", "read_requirements", "unmet", "write_verdicts"]

FILE = "verdicts.csv"
"""The list of all facts beside an edit, one a row."""

_SHOWN = 20
_SHORT = {"strict": "strict_accuracy", "es": "edit_success", "ps": "paraphrase_success", "ns": "neighbourhood_success",
          "free": "free_generation"}  # fmt: skip


def failures_table(verdicts: Sequence[Verdict]) -> Table | None:
    """Make a table of the facts that failed; None where all hold."""
    failed = [verdict for verdict in verdicts if not verdict.holds]
    if not failed:
        return None
    rows: list[tuple[str, ...]] = []
    for verdict in failed[:_SHOWN]:
        right = f"{verdict.right_tokens} of {verdict.tokens}"
        rows.append((verdict.id, verdict.prompt, verdict.target, verdict.written or "-", right))
    title = f"{len(failed)} of {count_noun(len(verdicts), 'fact')} failed"
    if len(failed) > _SHOWN:
        title += f"; the first {_SHOWN} (all in {FILE})"
    return make_table("id", "prompt", "target", "the model writes", "right tokens", rows=rows, title=title)


def write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> Path:
    """Write all verdicts as CSV, whole or not at all."""
    from kecore.evaluate.verdicts import Verdict
    from kecore.files import write_atomic

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, list(Verdict.__dataclass_fields__))
            rows.writeheader()
            rows.writerows(map(asdict, verdicts))

    return write_atomic(path, write)


def read_requirements(pairs: Sequence[str] | None) -> dict[str, float]:
    """Read ``--require strict=0.95``: the least value that each score must have.

    Raises:
        ConfigError: a text is no such pair, or names no score that an edit is given.
    """
    from kecore.evaluate import Protocol, metrics_of

    required: dict[str, float] = {}
    known = {metric.key for metric in metrics_of(Protocol())} | {"score"}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        key = _SHORT.get(name.strip().casefold(), name.strip())
        if not equals or key not in known:
            raise ConfigError(
                f"--require takes SCORE=VALUE, such as strict=0.95; got '{pair}'; scores: "
                f"{', '.join([*_SHORT, *sorted(known)])}"
            )
        try:
            required[key] = float(text)
        except ValueError:
            raise ConfigError(f"--require {name} must be a number, got '{text}'") from None
    return required


def unmet(required: Mapping[str, float], after: Evaluation) -> list[str]:
    """Return in words which required scores an evaluation does not reach; one that was not taken is not reached."""
    missed: list[str] = []
    for key, least in required.items():
        score: Any = after.scores.get(key)
        if score is None or score.value < least:
            missed.append(f"{key} is {format_score(score.value if score else None)}, {least:g} is required")
    return missed
