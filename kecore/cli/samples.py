"""What the model writes before and after an edit: the evidence that people trust most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kecore.cli.console import make_table

if TYPE_CHECKING:
    from kecore.api.types import EditRecord
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["Ask", "Sample", "choose_asks", "continue_prompts", "samples_table"]

_LENGTH = 20  # tokens of a sample


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt to be continued before and after.

    Args:
        kind: ``edit``, ``paraphrase``, ``neighbour`` or ``unrelated``.
        prompt: the prompt.
        wanted: what should follow after the edit; empty where nothing should change.
    """

    kind: str
    prompt: str
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """The greedy continuation of a prompt by both models.

    Args:
        ask: the prompt.
        before: what the unedited model writes.
        after: what the edited model writes.
    """

    ask: Ask
    before: str
    after: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, and whether the texts differ."""
        return {**asdict(self.ask), "before": self.before, "after": self.after, "changed": self.before != self.after}


def choose_asks(records: Sequence[EditRecord], most: int = 3) -> list[Ask]:
    """Choose prompts that show the first edits, and a neighbour that should stay."""
    asks = [Ask("edit", record.request.text, record.request.target) for record in records[:most]]
    for record in records[:most]:
        neighbours = record.prompts_of("neighbourhood")
        if neighbours:
            asks.append(Ask("neighbour", neighbours[0]))
            break
    return asks


def continue_prompts(view: ModelView, encoder: Encoder, prompts: Sequence[str], length: int = _LENGTH) -> list[str]:
    """Return the model's greedy continuation of each prompt, up to the end of its line."""
    from kecore.inference import generate

    generations = generate(view, encoder, prompts, max_new_tokens=length, stop_at_newline=True)
    return [generation.text for generation in generations]


def samples_table(samples: Sequence[Sample], title: str = "") -> Table:
    """Make a table of the samples, before and after side by side."""
    rows = [
        (s.ask.prompt, s.ask.wanted or "no change", s.before, s.after if s.after != s.before else "(the same)")
        for s in samples
    ]
    table = make_table("prompt", "wanted", "before", "after", rows=rows, title=title, lines=True)
    table.expand = True
    for column, ratio in zip(table.columns, (3, 2, 4, 4), strict=True):
        column.ratio = ratio
    return table
