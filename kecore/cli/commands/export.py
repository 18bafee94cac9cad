"""``kecore export``: edits as what other programs serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen, make_fields
from kecore.cli.errors import CheckFailed
from kecore.cli.loading import Loading

if TYPE_CHECKING:
    from kecore.edit import WeightEdit
    from kecore.models import LoadedModel
    from kecore.serving import Export, ScoreDrop, Verification

__all__ = ["export"]


def export(
    context: typer.Context,
    edits: Annotated[
        list[Path],
        typer.Argument(metavar="EDIT", help="Edit files or folders; several become one.", show_default=False),
    ],
    out: options.Out,
    to: Annotated[
        str, typer.Option("--to", metavar="TARGET", help="peft, merged, gguf-lora, gguf or ollama.")
    ] = "peft",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base model: a Hub id, a directory, a .gguf file or 'demo'.",
            show_default="what the edit was made on",
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option("--base", metavar="NAME", help="What an adapter calls its base model.", show_default="the model"),
    ] = "",
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Columns of an adapter, at the most; what they cannot hold is left out, and said.",
            show_default="as few as hold the edit",
        ),
    ] = None,
    tensor_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Type of the edited matrices in a GGUF model: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.",
            show_default="as in the base, or f16",
        ),
    ] = None,
    base_gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The base model as a GGUF file, where --model is none.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Load the result with peft, transformers or llama.cpp alone, in a fresh process, and compare it with "
            "the edit.",
        ),
    ] = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write edits as one file or folder that other programs serve, and print the commands that serve it.

    --to peft: a LoRA adapter for peft, vLLM and SGLang, of the smallest rank that holds the edits. merged: a checkpoint
    for any program of Hugging Face's format. gguf: the base model's GGUF file with the edited matrices rewritten.
    gguf-lora: an adapter for llama.cpp. ollama: a GGUF model, or with --rank an adapter, and a Modelfile.
    """
    screen = Screen.of(context)
    from kecore.files import check_writable
    from kecore.serving import export_edits
    from kecore.serving.verify import need_program, program_of

    check_writable(out)
    if verify:
        need_program(program_of(to))  # before anything is written
    exported = export_edits(
        edits,
        out,
        to,
        model=model or "",
        base=base,
        rank=rank,
        tensor_type=tensor_type,
        base_gguf=base_gguf,
        force=force,
        show=screen.stage,
    )
    for warning in exported.warnings:
        screen.warn(warning)
    verification, drop = None, None
    if verify or (exported.lost > 0 and model is not None):
        loaded = Loading(exported.model, device="cpu").load(screen)
        weight_edits = _read(edits)
        drop = _measure_drop(screen, loaded, weight_edits, exported)
        if verify:
            verification = _verify(screen, loaded, weight_edits, exported)
    screen.show(make_fields(_fields(exported, verification, drop)))
    screen.commands("Serve it", *exported.commands)
    screen.finish(_values(screen, exported, verification, drop))
    if verification is not None and not verification.holds and rank is None:
        raise CheckFailed(f"what {verification.program} loaded does not do what the edit does")


def _read(paths: Sequence[Path]) -> list[WeightEdit]:
    from kecore.checkpoint import NamedEdit

    return [NamedEdit.read(path).edit for path in paths]


def _measure_drop(
    screen: Screen, loaded: LoadedModel, edits: Sequence[WeightEdit], exported: Export
) -> ScoreDrop | None:
    """Score what a lower rank costs; None where nothing was left out."""
    from kecore.edit import merge
    from kecore.serving import score_drop

    if exported.lost == 0 or exported.rank is None:
        return None
    with screen.stage("score", f"scoring what rank {exported.rank} leaves of the edit"):
        return score_drop(loaded, merge(edits), exported.rank)


def _verify(screen: Screen, loaded: LoadedModel, edits: Sequence[WeightEdit], exported: Export) -> Verification:
    from kecore.serving import verify_export
    from kecore.serving.verify import program_of

    program = program_of(exported.target)
    with screen.stage("verify", f"loading the result with {program}, in a process without kecore"):
        return verify_export(loaded, edits, exported)


def _fields(exported: Export, verification: Verification | None, drop: ScoreDrop | None) -> dict[str, str]:
    """Return what people read of an export."""
    fields = {"written": str(exported.folder), "matrices": str(len(exported.matrices))}
    if exported.rank is not None:
        fields["rank"] = str(exported.rank)
    if exported.types:
        kinds = ", ".join(dict.fromkeys(exported.types.values()))
        fields["rewritten as"] = f"{kinds}, which rounds by {exported.rounding:.1%} of what the edit adds"
    if drop is not None:
        names = [name for name in ("edit_success", "strict_accuracy") if name in drop.before]
        costs = [f"{name.replace('_', ' ')} {drop.before[name]:.3f} -> {drop.after[name]:.3f}" for name in names]
        fields["cost of the rank"] = ", ".join(costs)
    if verification is not None:
        count = verification.prompts
        fields[f"loaded by {verification.program}"] = (
            f"{verification.said_target} of {count} edited prompts answered with the target, {verification.same_text} "
            f"word for word as with the edit, {verification.changed_text} otherwise than by the base; logits differ by "
            f"{verification.difference:.1e} of the edit's effect"
        )
    return fields


def _values(
    screen: Screen, exported: Export, verification: Verification | None, drop: ScoreDrop | None
) -> dict[str, Any]:
    """Return the result for programs."""
    return {
        **asdict(exported),
        "verified": None if verification is None else {**asdict(verification), "holds": verification.holds},
        "drop": None if drop is None else asdict(drop),
        "warnings": screen.warnings,
    }
