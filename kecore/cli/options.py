"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.api.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from kecore.evaluate.mapping import FieldMap

__all__ = [
    "MODEL_HELP",
    "AsJson",
    "Chat",
    "Checksum",
    "Device",
    "Dtype",
    "Edits",
    "Examples",
    "Facts",
    "Force",
    "Format",
    "GroundTruth",
    "Hparams",
    "Limit",
    "Map",
    "Memory",
    "Method",
    "Model",
    "NoEvaluate",
    "Out",
    "Preset",
    "Prompt",
    "RemoteCode",
    "Seed",
    "Settings",
    "Split",
    "Stats",
    "Subject",
    "Target",
    "Texts",
    "Tokens",
    "Trained",
    "Variant",
    "byte_count",
    "check_free",
    "check_free_file",
    "field_map",
    "layer_list",
    "names",
    "settings",
    "spread_files",
]


MODEL_HELP = "A Hub id, a directory, a .gguf file, or 'demo' (SmolLM2-135M)."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seeds everything random.", min=0)]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with MODEL.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Directory for the result.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what an earlier run left in --out.")]
Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Most that the whole process may hold in main memory (with a GPU: on it), such as 4GiB; auto: three "
        "quarters of what is free.",
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="FILE...",
        help="Natural text for key statistics: .txt, .json or .jsonl, plain or .gz, or hf:NAME[:CONFIG[:SPLIT]].",
        show_default=False,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Tokens to collect key statistics from.", min=1, show_default="20 a key column"),
]

Edits = Annotated[
    list[Path] | None,
    typer.Option("--edit", metavar="EDIT", help="An edit file or folder (repeatable).", show_default=False),
]
METHODS_HELP = "`kecore methods` lists them; 'memit + blue' has a stage, ./mine.py:Mine is not installed."
Method = Annotated[str, typer.Option(metavar="NAME", help=f"An editing method; {METHODS_HELP}")]
Facts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Facts: a file, a folder or hf:OWNER/NAME, in any layout of docs/datasets.md."),
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="FIELD=NAME,...",
        help="Which field of the facts is which: prompt=question,target=answer.text,subject=name, or a text with "
        "fields in braces: 'prompt=Where is {name}?' (repeatable).",
        show_default=False,
    ),
]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Only the first so many records.", min=1)]
Format = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="Layout of the facts, if their content does not tell.")
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Split of a folder, a hub data set or a file that holds several; a sheet.",
    ),
]
Variant = Annotated[
    str | None, typer.Option(metavar="NAME", help="How to edit records that can be edited in several ways.")
]
Checksum = Annotated[
    str | None, typer.Option("--sha256", metavar="HEX", help="What the digest of the facts must be, or begin with.")
]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="A single fact: a prompt that holds the subject.")]
Subject = Annotated[str | None, typer.Option(metavar="TEXT", help="The subject of --prompt.")]
Target = Annotated[str | None, typer.Option(metavar="TEXT", help="What should follow --prompt.")]
GroundTruth = Annotated[str | None, typer.Option(metavar="TEXT", help="What follows now; success scores need it.")]
Stats = Annotated[Path | None, typer.Option(metavar="PATH", help="Key statistics made by `kecore stats`.")]
Trained = Annotated[
    Path | None, typer.Option(metavar="PATH", help="An editor trained by `kecore train`, for methods that need it.")
]
Examples = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Facts that demonstrations are taken from, for methods that need examples; as --facts."
    ),
]
Preset = Annotated[str | None, typer.Option(metavar="NAME", help="A published set-up of the method to start from.")]
Hparams = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A hyper-parameter file of EasyEdit (YAML) or of the MEMIT family (JSON) to start from, as it is; it "
        "names the method unless --method does.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A field of the method's configuration; VALUE is JSON or text."),
]
NoEvaluate = Annotated[bool, typer.Option("--no-evaluate", help="Do not ask the model before and after.")]


def byte_count(text: str) -> int | None:
    """Read a size such as ``500MiB``, ``2GB`` or ``4g`` in bytes; units are powers of 1024. None for ``auto``.

    Raises:
        ConfigError: it is not a size.
    """
    if text.strip() == "auto":
        return None
    from kecore.cache import read_bytes

    value = read_bytes(text)
    if value is None:
        raise ConfigError(f"--memory must be a size such as 500MiB or 4GiB, or auto, got '{text}'")
    return value


def field_map(pairs: Sequence[str] | None) -> FieldMap | None:
    """Read ``--map``.

    Raises:
        ConfigError: it is no list of fields and names.
    """
    if not pairs:
        return None
    from kecore.evaluate.mapping import FieldMap

    return FieldMap.of(pairs)


def layer_list(text: str) -> list[int] | None:
    """Read layers such as ``4,5``, ``4-8`` or both together; None for ``auto``.

    Raises:
        ConfigError: it is none of these.
    """
    if text.strip() == "auto":
        return None
    layers: list[int] = []
    for span in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", span)
        if match is None:
            raise ConfigError(f"--layers must be auto, or layers such as 4,5,6 or 4-8, got '{text}'")
        first = int(match[1])
        last = int(match[2] or first)
        layers += range(first, last + 1)
    if not layers:
        raise ConfigError(f"--layers {text} names no layer; write the lower one first")
    return sorted(set(layers))


def names(text: str | None) -> list[str]:
    """Split ``a,b,c`` at its commas; empty for no text."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def settings(pairs: Sequence[str] | None, option: str = "--set") -> dict[str, Any]:
    """Read fields of a configuration from ``key=value``; a value is JSON, or else text.

    Raises:
        ConfigError: there is no ``=``, or a key twice.
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise ConfigError(f"{option} takes key=value, got '{pair}'; VALUE is JSON or text, such as layers=[4,5,6]")
        if key in values:
            raise ConfigError(f"{option} {key} is given twice")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def check_free(out: Path, file: str, force: bool) -> None:
    """Refuse an output folder that holds a result already, is no folder, or cannot be written.

    Args:
        out: what ``--out`` names.
        file: the result's name in it.
        force: an earlier result may be overwritten.

    Raises:
        ArtifactError: it holds a result, or is a file.
        StorageError: it cannot be written.
    """
    from kecore.files import check_writable  # with torch

    check_writable(out)
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"--out {out} is a file; name a directory")
    if (out / file).exists() and not force:
        raise ArtifactError(f"{out / file} exists; choose another --out, or overwrite it with --force")


def check_free_file(out: Path, option: str, force: bool) -> None:
    """Refuse an output file that is there already, or cannot be written.

    Args:
        out: the file.
        option: the option that names it, for messages.
        force: what is there may be overwritten.

    Raises:
        ArtifactError: it is a directory, or may not be overwritten.
        StorageError: it cannot be written.
    """
    from kecore.files import check_writable  # with torch

    check_writable(out)
    if out.is_dir():
        raise ArtifactError(f"{option} {out} is a directory; name a file")
    if out.exists() and not force:
        raise ArtifactError(f"{out} exists; choose another {option}, or overwrite it with --force")


def spread_files(args: list[str]) -> list[str]:
    """Write ``--text a b`` as ``--text a --text b``, and ``--import`` alike, so that ``--text *.txt`` works.

    Only files that are there are taken for further ones: a model that is named after them stays a model.
    """
    is_further_by_option = {"--text": _is_text, "--import": _is_npz}
    spread: list[str] = []
    option = ""  # the option whose values are being read
    values = 0  # how many of them have been read
    for arg in args:
        if arg in is_further_by_option:
            option, values = arg, 0
        elif option and values == 0:
            values = 1
        elif option and is_further_by_option[option](arg):
            spread.append(option)
        else:
            option = ""
        spread.append(arg)
    return spread


def _is_text(arg: str) -> bool:
    return arg.startswith("hf:") or (Path(arg).is_file() and not arg.endswith(".gguf"))


def _is_npz(arg: str) -> bool:
    return arg.endswith(".npz")
