"""The table of scores before and after an edit."""

from __future__ import annotations

import math

from hand_scores import probe
from rich.console import Console

from kecore.cli.scores import scores_table
from kecore.evaluate import Evaluation, Protocol, RecordResult
from kecore.inference import ContinuationScore


def score(chance: float) -> ContinuationScore:
    return ContinuationScore((math.log(chance),), (1,), (1 if chance > 0.5 else 2,))


def evaluation(*chances: float) -> Evaluation:
    probes = [probe("edit", score(chance), answers=("a",), rival=score(0.5)) for chance in chances]
    return Evaluation(Protocol(), tuple(RecordResult(f"r{i}", "", (probe,)) for i, probe in enumerate(probes)))


def shown(before: Evaluation, after: Evaluation) -> list[str]:
    console = Console(width=100)
    with console.capture() as text:
        console.print(scores_table(before, after, "scores"))
    return [" ".join(line.split()) for line in text.get().splitlines()]


def test_core_scores_with_their_intervals() -> None:
    lines = shown(evaluation(0.1, 0.9), evaluation(0.9, 0.9))
    assert "before after 95 % interval n probes" in lines
    assert "edit success (ES) 0.500 1.000 0.342 to 1.000 2 2" in lines, "Wilson's interval of two of two"
    assert not any(line.startswith(("edit magnitude", "paraphrase")) for line in lines)


def test_a_single_record_has_no_interval() -> None:
    assert "before after n probes" in shown(evaluation(0.1), evaluation(0.9))
