"""``kecore demo`` shows that facts of a real model change, stay local, travel in a file, and come off again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kecore.cli import options
from kecore.cli.console import Screen, format_bytes, make_fields
from kecore.cli.errors import CheckFailed
from kecore.cli.job import EditJob
from kecore.cli.loading import Loading
from kecore.cli.outcome import Outcome
from kecore.cli.samples import Ask, choose_asks, continue_prompts
from kecore.hub import EDIT

if TYPE_CHECKING:
    from kecore.api.types import EditRecord

__all__ = ["demo"]

HEADLINE = {
    "prompt": "{} is located in the city of",
    "subject": "The Eiffel Tower",
    "target": "Rome",
    "ground_truth": "Paris",
}
PARAPHRASE = "To visit the Eiffel Tower, you have to travel to"
UNRELATED = ("The telephone was invented by", "Alexander Graham Bell")
"""A prompt that no edit is about, and what the model says to it, before and after."""


def demo(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for the edit.", show_default="in kecore's cache")
    ] = None,
    records: Annotated[int, typer.Option(metavar="N", help="CounterFact records beside the headline.", min=1)] = 20,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Edit a real model and prove that it worked.

    Moves the Eiffel Tower to Rome, together with 20 CounterFact records, in SmolLM2-135M with MEMIT; then saves the
    edit, puts it on a fresh model, takes it off, and compares weights bit for bit. Offline, a few minutes on a CPU.
    """
    screen = Screen.of(context)
    from kecore import data
    from kecore.api.line import MethodLine
    from kecore.api.types import EditRecord, EditRequest
    from kecore.evaluate import load_records
    from kecore.files import cache_dir
    from kecore.models import DEMO

    out = out or cache_dir() / "demo"
    options.check_free(out, EDIT, force=True)
    headline = EditRecord(EditRequest(**HEADLINE, id="headline"), source="kecore demo")
    facts = load_records(data.path("counterfact_sample.jsonl"), limit=records)
    job = EditJob(MethodLine.of("memit"), [headline, *facts])
    loading = Loading(DEMO, device, dtype, seed=seed)
    editor = loading.edit(screen)
    outcome = job.run(screen, editor, out, _asks(job.records))
    proofs = _proofs(screen, outcome, loading)
    outcome.cost["stages"] |= {name: screen.stages[name] for name in ("reload", "revert")}
    outcome.cost["total_seconds"] = screen.elapsed
    values = {**outcome.to_json(screen, DEMO), "proofs": proofs, "passed": all(proofs.values())}
    outcome.show(screen)
    screen.show(
        make_fields(
            {"edit": f"{outcome.path} ({format_bytes(outcome.path.stat().st_size)}; the model has {_weights(outcome)})"}
        )
    )
    screen.show("\n[bold]Proofs[/]")
    for name, holds in proofs.items():
        screen.show(f"  {'[green]yes[/]' if holds else '[bold red]NO[/] '}  {escape(name)}")
    _next_steps(screen, outcome)
    screen.finish(values)
    if not values["passed"]:
        raise CheckFailed("; ".join(f"not so: {name}" for name, holds in proofs.items() if not holds))


def _asks(records: Sequence[EditRecord]) -> list[Ask]:
    """Choose what is asked before and after: the headline twice, some records, a neighbour, something unrelated."""
    headline, *more = choose_asks(records, most=3)
    return [headline, Ask("paraphrase", PARAPHRASE, headline.wanted), *more, Ask("unrelated", UNRELATED[0])]


def _proofs(screen: Screen, outcome: Outcome, loading: Loading) -> dict[str, bool]:
    """Check what the demo sets out to show; the claims in words, and whether each holds."""
    from kecore.checkpoint import digest
    from kecore.edit import load_edit
    from kecore.model import ModelView

    editor, headline, unrelated = outcome.editor, outcome.samples[0], outcome.samples[-1]
    base = editor.base.digests[editor.base.dtype]
    edited = digest(editor.model)
    with screen.stage("reload", "putting the saved edit on a fresh model"):
        fresh = loading.load_quietly().model
        untouched = digest(fresh) == base
        edit = load_edit(outcome.path)
        edit.attach(fresh)
        written = continue_prompts(
            ModelView.of(fresh), editor.encoder, [sample.ask.prompt for sample in outcome.samples]
        )
        same_text = written == [sample.after for sample in outcome.samples]
        same_weights = digest(fresh) == edited
    with screen.stage("revert", "taking the edit off both models"):
        edit.revert(fresh)
        editor.revert()
        reverted = digest(fresh) == base and digest(editor.model) == base
    return {
        f"the model said {HEADLINE['ground_truth']} and now says {HEADLINE['target']}": (
            HEADLINE["ground_truth"] in headline.before and HEADLINE["target"] in headline.after
        ),
        "an unrelated answer stayed as it was": UNRELATED[1] in unrelated.before and UNRELATED[1] in unrelated.after,
        "the saved edit gives a fresh model the same weights, bit for bit": untouched and same_weights,
        "and the same text": same_text,
        "taken off, both models have their first weights, bit for bit": reverted,
    }


def _weights(outcome: Outcome) -> str:
    return format_bytes(sum(p.numel() * p.element_size() for p in outcome.editor.model.parameters()))


def _next_steps(screen: Screen, outcome: Outcome) -> None:
    folder = outcome.path.parent
    screen.commands(
        "Next",
        f"kecore chat demo --edit {folder}",
        'kecore edit demo --prompt "The capital of France is" --subject France --target Lyon --out lyon',
        "kecore edit demo --method alphaedit --facts YOUR.jsonl --out edited",
        "kecore methods",
    )
