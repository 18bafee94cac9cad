"""``kecore export``: an edit as a LoRA adapter for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from kecore.api.errors import UnsupportedCapabilityError
from kecore.cli import options
from kecore.cli.console import Screen, make_fields
from kecore.cli.errors import CheckFailed
from kecore.cli.loading import Loading

if TYPE_CHECKING:
    from kecore.edit import WeightEdit
    from kecore.served import Verification

__all__ = ["export"]

_NOTHING = 1e-6  # share of an update below which nothing was left out


def export(
    context: typer.Context,
    edits: Annotated[
        list[Path],
        typer.Argument(metavar="EDIT", help="Edit files or folders; several become one.", show_default=False),
    ],
    out: options.Out,
    base: Annotated[
        str,
        typer.Option("--base", metavar="MODEL", help="Name of the base model, written into the adapter."),
    ] = "",
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Columns of the adapter, at the most; what they cannot hold is left out, and said.",
            show_default="as few as hold the edit",
        ),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Load the adapter on this model with peft alone, in a fresh process, and compare it with the edit.",
            show_default=False,
        ),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write edits as one LoRA adapter in PEFT's format, of the smallest rank that holds them.

    peft, vLLM, SGLang and llama.cpp load it beside the base model; the commands for them are printed. Edits whose
    updates have full rank can be written with --rank, or as a checkpoint by `kecore attach`.
    """
    screen = Screen.of(context)
    from kecore.edit import WeightEdit, load_edit, merge
    from kecore.edit.adapter import CONFIG, export_adapter

    options.check_free(out, CONFIG, force)
    with screen.stage("export", f"writing {out}"):
        loaded: list[WeightEdit] = []
        for path in edits:
            edit = load_edit(path)
            if not isinstance(edit, WeightEdit):
                raise UnsupportedCapabilityError(
                    f"{path} is an edit by '{edit.method}', which changes no weights, so it cannot become an adapter; "
                    "it acts through kecore alone (`kecore chat MODEL --edit ...`)"
                )
            loaded.append(edit)
        adapter = export_adapter(merge(loaded) if len(loaded) > 1 else loaded[0], out, base=base, rank=rank)
    if adapter.lost > _NOTHING:
        screen.warn(
            f"rank {adapter.rank} leaves out up to {adapter.lost:.1%} of an update; score the edited model as it will "
            "be served"
        )
    fields = {"adapter": str(out), "matrices": str(len(adapter.matrices)), "rank": str(adapter.rank)}
    found = None if verify is None else _verify(screen, verify, loaded, out)
    if found is not None:
        fields["loaded by peft"] = (
            f"{found.same_text} of {found.prompts} edited prompts answered as with the edit, {found.changed_text} "
            f"otherwise than by the base; logits differ by {found.difference:.1e} of the edit's effect"
        )
    screen.show(make_fields(fields))
    screen.commands("Serve it", *_commands(out, base or "BASE", adapter.rank))
    values = {"adapter": out, "matrices": list(adapter.matrices), "rank": adapter.rank, "lost": adapter.lost}
    screen.finish({**values, "verified": found and asdict(found), "warnings": screen.warnings})
    if found is not None and not found.holds and rank is None:
        raise CheckFailed("the adapter that peft loaded does not do what the edit does")


def _verify(screen: Screen, model: str, edits: Sequence[WeightEdit], out: Path) -> Verification:
    from kecore.served import verify_adapter

    loaded = Loading(model, device="cpu", dtype="float32").load(screen)
    with screen.stage("verify", "loading the adapter with peft, in a process without kecore"):
        return verify_adapter(loaded, edits, out)


def _commands(out: Path, base: str, rank: int) -> list[str]:
    """Return what starts the servers of the field with the adapter."""
    from kecore.edit.adapter import served_rank

    served = served_rank(rank)
    folder, model = quote(str(out)), quote(base)
    commands: list[str] = []
    if served is not None:
        commands.append(f"vllm serve {model} --enable-lora --max-lora-rank {served} --lora-modules edited={folder}")
    commands += [
        f"python -m sglang.launch_server --model-path {model} --enable-lora --max-lora-rank {rank} "
        f"--lora-paths edited={folder}",
        f"python convert_lora_to_gguf.py {folder} --base {model}  # of llama.cpp, for llama-server --lora",
    ]
    return commands
