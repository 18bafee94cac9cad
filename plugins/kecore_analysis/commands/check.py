"""``kecore check``: what will be read of a file of facts, before anything is edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen, count_noun, make_fields, make_table
from kecore.cli.errors import CheckFailed
from kecore.cli.groups import ReadingOptions, take_groups
from kecore.cli.loading import Loading
from kecore.cli.plugins import help_group

if TYPE_CHECKING:
    from kecore.editor import Editor
    from kecore.evaluate import RecordSet
    from kecore.evaluate.mapping import FieldMap
    from kecore_analysis.doubts import Doubt

__all__ = ["check"]

_SHOWN = 20  # facts in the table, before "and so on"

Source = Annotated[
    str, typer.Argument(metavar="FACTS", help="A file, a folder or hf:OWNER/NAME of facts.", show_default=False)
]
OfModel = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="Counts tokens, and asks which facts it knows already.", show_default=False),
]


@help_group("Edit facts")
@take_groups
def check(
    context: typer.Context,
    *,
    facts: Source,
    model: OfModel = None,
    save_map: Annotated[
        bool, typer.Option("--save-map", help="Keep --map in kecore.toml beside FACTS, for every later command.")
    ] = False,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="OUT.jsonl", help="Write the facts in kecore's own layout.", show_default=False),
    ] = None,
    accept_subjects: Annotated[
        bool, typer.Option("--accept-subjects", help="Put the proposed subjects into --fix OUT.jsonl; needs MODEL.")
    ] = False,
    limit: options.Limit = None,
    reading: ReadingOptions,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what is read of a file of facts, and what is doubtful about it.

    Prompt, subject and target of each fact, where they were read from, facts that repeat or contradict each other, and
    what each method needs. With MODEL also the tokens, and the facts that it knows already.
    """
    screen = Screen.of(context)
    mapping = reading.field_map
    _check_usage(facts, model, mapping, save_map, fix, accept_subjects, force)
    from kecore.evaluate.mapping import save_map as keep
    from kecore_analysis.doubts import find_doubts, find_target_doubts

    records = reading.load(facts, limit)
    if mapping is not None and save_map:
        screen.log(f"the map is kept in {keep(Path(facts), mapping)}")
    doubts = find_doubts(records.records)
    values: dict[str, Any] = records.to_json()
    _show_source(screen, records)
    if model is None:
        _show_facts(screen, records)
    else:
        loading = Loading(model, device, dtype, trust_remote_code, seed)
        editor = loading.edit(screen)
        doubts = sorted(
            [*find_target_doubts(editor.encoder, records.requests), *doubts], key=lambda doubt: not doubt.stops
        )
        values |= _check_with_model(screen, editor, records, accept=accept_subjects, fix=fix)
    values["doubts"] = [_doubt_to_json(doubt) for doubt in doubts]
    _show_doubts(screen, doubts)
    values["methods"] = _show_methods(screen, records)
    if fix is not None and not accept_subjects:
        _write(screen, fix, records)
    screen.finish(values)
    if any(doubt.stops for doubt in doubts):
        raise CheckFailed("; ".join(f"{doubt.kind}: {doubt.example}" for doubt in doubts if doubt.stops))


def _check_usage(
    facts: str,
    model: str | None,
    mapping: FieldMap | None,
    save_map: bool,
    fix: Path | None,
    accept_subjects: bool,
    force: bool,
) -> None:
    """Refuse options that need others, and an output that is there already."""
    if save_map and mapping is None:
        raise typer.BadParameter("--save-map keeps --map; give it")
    if save_map and not Path(facts).is_file():
        raise typer.BadParameter("--save-map keeps the map of a file, beside it; FACTS is none")
    if accept_subjects and (model is None or fix is None):
        raise typer.BadParameter("--accept-subjects needs MODEL, which proposes them, and --fix OUT.jsonl to hold them")
    if fix is not None and fix.absolute() == Path(facts).absolute():
        raise typer.BadParameter("--fix must not be FACTS itself; name another file")
    if fix is not None:
        options.check_free_file(fix, "--fix", force)


def _show_source(screen: Screen, records: RecordSet) -> None:
    from kecore_analysis.facts import count_notes

    fields = {"facts": f"{count_noun(len(records), 'record')} of {records.path}, layout '{records.format}'"}
    if records.variant:
        fields["edited by"] = f"{records.variant} (--variant chooses another way of the layout)"
    if records.origins:
        fields["read from"] = ", ".join(f"{own}: {name}" for own, name in records.origins.items())
    notes = count_notes(records)
    if notes:
        fields["kept as notes"] = ", ".join(f"{name} ({count})" for name, count in notes.items())
    if records.skipped:
        fields["left out"] = f"{len(records.skipped)}; the first: {records.skipped[0].reason}"
    screen.show(make_fields(fields))


def _show_facts(screen: Screen, records: RecordSet) -> None:
    rows: list[tuple[str, ...]] = []
    for record in records[:_SHOWN]:
        request = record.request
        probes = len([probe for probe in record.probes if probe.kind != "edit"])
        rows.append(
            (request.text, request.subject or "-", request.target, request.ground_truth or "-", str(probes or "-"))
        )
    headers = ("prompt", "subject", "target", "instead of", "probes")
    screen.show(make_table(*headers, rows=rows, right=(4,)))
    _show_rest(screen, len(records))


def _show_rest(screen: Screen, count: int) -> None:
    if count > _SHOWN:
        screen.show(f"... and {count_noun(count - _SHOWN, 'more fact')}")


def _check_with_model(
    screen: Screen, editor: Editor, records: RecordSet, *, accept: bool, fix: Path | None
) -> dict[str, Any]:
    """Show the facts with their tokens and what the model says of them; propose subjects where there are none."""
    from kecore_analysis.doubts import LONG_TARGET

    with screen.stage("known", "asking the model which facts it knows"):
        known = {request.id for request in editor.check(records.records).known}
    proposals = _propose(screen, editor, records)
    rows: list[tuple[str, ...]] = []
    facts: list[dict[str, Any]] = []
    for record in records:
        request = record.request
        subject = request.subject or proposals.get(request.id, "")
        encoded = editor.encoder.encode(request.text, request.target)
        target_tokens = len(encoded.ids) - encoded.start
        is_known = request.id in known
        facts.append(
            {
                "id": request.id,
                "prompt": request.text,
                "subject": request.subject,
                "proposed_subject": proposals.get(request.id),
                "target": request.target,
                "target_tokens": target_tokens,
                "known": is_known,
            }
        )
        shown = f"{subject} (proposed)" if request.subject is None and subject else subject or "-"
        tokens = f"{target_tokens} (long)" if target_tokens > LONG_TARGET else str(target_tokens)
        rows.append((request.text, shown, request.target, tokens, "yes" if is_known else ""))
    headers = ("prompt", "subject", "target", "its tokens", "known")
    screen.show(make_table(*headers, rows=rows[:_SHOWN], right=(3,)))
    _show_rest(screen, len(records))
    if accept and fix is not None:
        from kecore_analysis.facts import with_subject

        completed = [
            with_subject(record, proposals[record.request.id]) if record.request.id in proposals else record
            for record in records
        ]
        _write(screen, fix, completed)
    elif proposals:
        screen.show(
            f"{count_noun(len(proposals), 'subject')} proposed; look at them, then take them over with "
            "--accept-subjects --fix OUT.jsonl"
        )
    return {"facts": facts}


def _propose(screen: Screen, editor: Editor, records: RecordSet) -> dict[str, str]:
    """Return a subject for each request that names none."""
    without = [record.request for record in records if record.request.subject is None]
    if not without:
        return {}
    from kecore_analysis.facts import propose_subject
    from kecore_analysis.trace import Known
    from kecore_analysis.tracer import Tracer

    spread = Tracer.spread_of(
        editor.view, editor.encoder, [Known(request.text, (0, len(request.text))) for request in without]
    )
    proposals: dict[str, str] = {}
    with screen.stage("subjects", f"looking for the subject of {count_noun(len(without), 'fact')}"):
        for done, request in enumerate(without, 1):
            proposals[request.id] = propose_subject(editor.view, editor.encoder, request, spread)
            screen.progress("subjects", done, len(without))
    return proposals


def _show_doubts(screen: Screen, doubts: Sequence[Doubt]) -> None:
    if not doubts:
        screen.show("Nothing is doubtful about these facts.")
        return
    rows = [(doubt.kind, str(len(doubt.ids)), doubt.example) for doubt in doubts]
    screen.show(make_table("look at", "facts", "such as", rows=rows, right=(1,)))


def _doubt_to_json(doubt: Doubt) -> dict[str, Any]:
    return {"kind": doubt.kind, "ids": list(doubt.ids), "example": doubt.example, "stops": doubt.stops}


def _show_methods(screen: Screen, records: RecordSet) -> Mapping[str, str]:
    """Show which methods can edit the facts, and what they need before; return the needs by method."""
    import warnings

    from kecore.api.errors import KecoreWarning
    from kecore.api.registry import default_registry
    from kecore_analysis.facts import needs_of

    subjects = all(request.subject is not None for request in records.requests)
    needs: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        for method in default_registry().describe():
            if method.capabilities is not None and not method.error:
                needs[method.name] = needs_of(method.capabilities, subjects=subjects)
    by_need: dict[str, list[str]] = {}
    for name, need in needs.items():
        by_need.setdefault(need or "nothing", []).append(name)
    rows = [(need, ", ".join(names)) for need, names in sorted(by_need.items(), key=lambda item: item[0] != "nothing")]
    screen.show(make_table("needs", "methods", rows=rows))
    return needs


def _write(screen: Screen, out: Path, records: Any) -> None:
    """Write records in kecore's own layout, whole or not at all."""
    import json

    from kecore.evaluate import record_to_json
    from kecore.files import write_atomic

    lines = [json.dumps(record_to_json(record), ensure_ascii=False) for record in records]

    def write(path: Path) -> None:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    write_atomic(out, write)
    screen.show(make_fields({"written": str(out)}))
