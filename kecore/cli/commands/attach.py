"""``kecore attach`` and ``kecore revert`` put edits into a checkpoint and take them out again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.api.errors import ArtifactError, KecoreWarning, RequestConflictError
from kecore.checkpoint import NamedEdit, check_out, digest, read_record, write_checkpoint
from kecore.cli import options
from kecore.cli.console import Screen, count_noun, make_fields
from kecore.cli.loading import Loading
from kecore.cli.machine import measure_cost, show_cost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kecore.models import LoadedModel

__all__ = ["attach", "revert"]


def attach(
    context: typer.Context,
    model: options.Model,
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT", help="Edit files or folders.", show_default=False)],
    out: options.Out,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Write MODEL with edits on it as a checkpoint.

    Any program that reads Hugging Face checkpoints can load --out. It also carries what `kecore revert` needs.
    MODEL may itself be such a checkpoint: its edits stay, and new ones for the same base join them; those that were
    made for the edited checkpoint take it for their base.
    """
    screen = Screen.of(context)
    check_out(out)
    named = [NamedEdit.read(path) for path in edits]
    record = read_record(model)
    if record is not None and dtype != "auto":
        raise typer.BadParameter(f"{model} carries edits, so its weights keep their type; leave out --dtype")
    loaded = Loading(model, device, dtype, trust_remote_code, seed).load(screen)
    ref = model
    if record is not None and not _made_for(loaded.model, named):
        with screen.stage("restore", f"finding the base of {model}"):
            ref, named = record.model, record.load_edits() + named
            record.restore(loaded.model)
    _write(screen, loaded, named, out, ref)


def _made_for(model: PreTrainedModel, edits: Sequence[NamedEdit]) -> bool:
    """Return whether edits were planned on the model just as it is."""
    from kecore.api.identity import Identity

    identity, dtype = Identity(model), next(model.parameters()).dtype
    return not any(named.edit.base.differs(identity, dtype) for named in edits)


def revert(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A directory that `kecore attach` wrote.", show_default=False)
    ],
    out: options.Out,
    number: Annotated[
        list[int] | None,
        typer.Option(
            "--edit",
            metavar="NUMBER",
            help="Take off only this edit (repeatable); `kecore inspect CHECKPOINT` numbers them.",
            show_default="all",
        ),
    ] = None,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Take edits off a checkpoint, bit for bit.

    The result is proven by fingerprint. Edits can be taken off in any order; a checkpoint that was changed since is
    left alone.
    """
    screen = Screen.of(context)
    check_out(out)
    record = read_record(checkpoint)
    if record is None:
        raise ArtifactError(
            f"{checkpoint} carries no record of edits, so there is nothing to take off; expected a directory that "
            "`kecore attach` wrote. MODEL itself is never changed by kecore"
        )
    named = record.load_edits()
    numbers = range(1, len(named) + 1)
    removed = set(number or numbers)
    if unknown := sorted(removed - set(numbers)):
        raise ArtifactError(f"{checkpoint} carries edits 1 to {len(named)}, there is no edit {unknown[0]}")
    remaining = [edit for number, edit in zip(numbers, named, strict=True) if number not in removed]
    loaded = Loading(str(checkpoint), device).load(screen)
    with screen.stage("restore", "putting the base weights back"):
        record.restore(loaded.model)
    screen.show(f"The base weights of '{record.model}' are back, bit for bit (fingerprint {record.base[:12]}).")
    _write(screen, loaded, remaining, out, record.model, taken_off=sorted(removed))


def _write(screen: Screen, loaded: LoadedModel, edits: Sequence[NamedEdit], out: Path, ref: str, **more: Any) -> None:
    """Put edits on an unedited model, write it, and report what was written."""
    from kecore.api.identity import Identity

    model = loaded.model
    with screen.stage("attach", f"attaching {count_noun(len(edits), 'edit')}" if edits else "no edits left to attach"):
        identity = Identity(model)
        before = identity.of()
        names = list(dict.fromkeys(name for named in edits for name in named.edit.updates))
        parameters = dict(model.named_parameters())
        base = {name: parameters[name].data for name in names if name in parameters}
        _warn_of_conflicts(edits)
        for named in edits:
            named.edit.attach(model, base=identity)
    with screen.stage("save", f"writing {out}"):
        write_checkpoint(model, loaded.tokenizer, out, ref=ref, edits=edits, base=base, base_digest=before)
    device = next(model.parameters()).device
    facts = sum(len(named.edit.requests) for named in edits)
    summary = {
        "checkpoint": str(out),
        "edits": f"{count_noun(len(edits), 'edit')} with {count_noun(facts, 'fact')}",
        "changed": ", ".join(names) or "-",
    }
    screen.show(make_fields(summary))
    spent = measure_cost(screen, device)
    show_cost(screen, spent)
    screen.finish(
        {
            "checkpoint": str(out),
            "model": ref,
            "edits": [named.to_json(named.source) for named in edits],
            "parameters": names,
            "base": before,
            "edited": digest(model),
            **more,
            **spent,
            "warnings": screen.warnings,
        }
    )


def _warn_of_conflicts(edits: Sequence[NamedEdit]) -> None:
    from kecore.api.types import check_conflicts

    requests = [request for named in edits for request in named.edit.requests]
    if not requests:
        return
    try:
        check_conflicts(requests)
    except RequestConflictError as error:
        warnings.warn(f"{error} (both edits are attached all the same)", KecoreWarning, stacklevel=2)
