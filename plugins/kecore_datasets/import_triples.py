"""``kecore import-triples``: facts of a knowledge graph in, a facts file out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kecore.cli import options
from kecore.cli.console import Screen, count_noun, make_table
from kecore.cli.plugins import help_group

if TYPE_CHECKING:
    from kecore_datasets.triples import Imported

__all__ = ["import_triples"]

_SHOWN = 20  # unknown relations and skipped triples, before "and so on"

Source = Annotated[
    Path,
    typer.Argument(
        metavar="TRIPLES",
        help="TSV, CSV, JSON or JSONL of subject, relation and object, plain or .gz, or a folder.",
        show_default=False,
    ),
]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="The facts file to write.", show_default=False)]
Templates = Annotated[
    list[Path] | None,
    typer.Option(
        "--templates",
        metavar="FILE",
        help="Prompts of relations, beside kecore's own: JSON {relation: 'The capital of {} is'}, or TSV.",
        show_default=False,
    ),
]
Labels = Annotated[
    list[Path] | None,
    typer.Option("--labels", metavar="FILE", help="Texts of ids: TSV of id and text.", show_default=False),
]


def _list_relations(context: typer.Context, value: bool) -> None:
    """Show the relations that kecore has templates for, and end the command."""
    if not value:
        return
    from kecore_datasets.triples import read_templates

    screen = Screen.of(context)
    known = {relation: templates[0] for relation, templates in sorted(read_templates().items())}
    screen.show(make_table("relation", "template", rows=list(known.items())))
    screen.finish({"relations": known})
    raise typer.Exit


@help_group("Prepare")
def import_triples(
    context: typer.Context,
    triples: Source,
    out: OutFile,
    templates: Templates = None,
    labels: Labels = None,
    list_relations: Annotated[
        bool,
        typer.Option(
            "--list-relations",
            help="List the relations that have a template, and do nothing else.",
            is_eager=True,
            callback=_list_relations,
        ),
    ] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first so many triples.", min=1)] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Make edits of triples, such as an information-extraction tool or a knowledge graph gives.

    Each relation needs a template; relations without one are listed and counted. `kecore edit --facts` takes the file.
    """
    from kecore.api.errors import DataFormatError
    from kecore_datasets import triples as library

    screen = Screen.of(context)
    options.check_free_file(out, "--out", force)
    known = library.read_templates(templates or ())
    chosen = library.read_triples(triples)[:limit]
    imported = library.import_triples(chosen, known, library.read_labels(labels or ()))
    _show(screen, imported, known)
    if not imported.records:
        raise DataFormatError(
            f"none of {count_noun(len(chosen), 'triple')} of {triples} makes an edit; give templates for their "
            f"relations with --templates: {', '.join(list(imported.unknown)[:_SHOWN]) or 'see what was left out'}"
        )
    library.write_records(out, imported.records)
    screen.show(f"{count_noun(len(imported.records), 'edit')} written to {out}")
    screen.finish(
        {
            "out": out,
            "triples": len(chosen),
            "edits": len(imported.records),
            "unknown_relations": dict(imported.unknown),
            "skipped": [item._asdict() for item in imported.skipped],
            "warnings": screen.warnings,
        }
    )


def _show(screen: Screen, imported: Imported, known: Mapping[str, Sequence[str]]) -> None:
    """List what makes no edit."""
    from kecore_datasets import triples as library

    if imported.unknown:
        total = sum(imported.unknown.values())
        first = list(imported.unknown.items())[:_SHOWN]
        rows = [(relation, str(number), library.nearest_relation(relation, known)) for relation, number in first]
        title = f"Relations without a template: {len(imported.unknown)}, with {count_noun(total, 'triple')}"
        screen.show(make_table("relation", "triples", "most like", rows=rows, title=title, right=(1,)))
    if imported.skipped:
        rows = [(item.reason,) for item in imported.skipped[:_SHOWN]]
        screen.show(make_table("reason", rows=rows, title=f"Left out: {count_noun(len(imported.skipped), 'triple')}"))
    hidden = max(0, len(imported.unknown) - _SHOWN) + max(0, len(imported.skipped) - _SHOWN)
    if hidden:
        screen.show(f"and {hidden} more; --json lists all")
    if imported.unknown:
        screen.show("Give these a template with --templates; --list-relations shows those that have one.")
