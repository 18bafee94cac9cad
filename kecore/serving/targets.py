"""Writes edits in the form that a program serves: everything that ``kecore export`` does, without its screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import ArtifactError, ConfigError, KecoreError, UnsupportedCapabilityError
from kecore.api.progress import ShowStage, show_nothing
from kecore.checkpoint import NamedEdit, attach_edits
from kecore.edit import Edit, WeightEdit, load_edit, merge, updated
from kecore.files import replace_files, write_folder
from kecore.model import MatrixName
from kecore.models import LoadedModel, gguf_file, load_model, load_model_type, load_tokenizer, resolve, save_tokenizer
from kecore.serving import commands
from kecore.serving.adapter import Factors, factor_edit, write_adapter
from kecore.serving.gguf_file import TENSOR_TYPES, GgufFile, Packed, copy_with_tensors, default_type, pack
from kecore.serving.gguf_lora import write_lora
from kecore.serving.gguf_names import TensorNames, architecture_of, find_interleaving, interleave
from kecore.serving.ollama import write_modelfile

__all__ = ["TARGETS", "Export", "export_edits"]

TARGETS = ("peft", "merged", "gguf-lora", "gguf", "ollama")
"""What an edit can be exported to."""

ADAPTER, MODEL = "adapter.gguf", "model.gguf"

_NOTHING = 1e-6  # share of an update below which nothing was left out
_LOUD = 0.5  # rounding as a share of an update, above which a type of few bits may drown the edit


@dataclass(frozen=True, slots=True)
class Export:
    """What was written.

    Args:
        target: one of :data:`TARGETS`.
        folder: where it is.
        files: names of the files in it.
        matrices: names of the weights that the edit changes.
        model: reference of the base model; empty where it is not known.
        base: the base model as other programs find it; empty where it is not known.
        base_gguf: the base model as a GGUF file, where there is one.
        rank: columns of an adapter; None where no adapter was written.
        lost: the largest share of an update's Frobenius norm that the rank left out; 0 where it holds all.
        types: type of each matrix of a GGUF model that was written anew, by its name there.
        rounding: the largest share of an update's Frobenius norm by which these types round the new matrix.
        warnings: what a user should know.
        commands: what serves it.
    """

    target: str
    folder: Path
    files: tuple[str, ...]
    matrices: tuple[str, ...]
    model: str
    base: str
    base_gguf: Path | None
    rank: int | None = None
    lost: float = 0.0
    types: Mapping[str, str] = field(default_factory=dict)
    rounding: float = 0.0
    warnings: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def is_gguf_adapter(self) -> bool:
        """Whether llama.cpp loads it beside the base model."""
        return ADAPTER in self.files


def export_edits(
    edits: Sequence[Edit | str | Path],
    out: str | Path,
    to: str = "peft",
    *,
    model: str = "",
    base: str = "",
    rank: int | None = None,
    tensor_type: str | None = None,
    base_gguf: str | Path | None = None,
    force: bool = False,
    show: ShowStage = show_nothing,
) -> Export:
    """Write edits of weights, together, as what a program serves; it appears whole or not at all.

    Args:
        edits: one edit or several for the same base, or their files or folders.
        out: a directory that is not there yet, or empty.
        to: one of :data:`TARGETS`. ``peft`` is an adapter in PEFT's format, ``merged`` a checkpoint in the type that
            the model is stored in, ``gguf-lora`` an adapter of llama.cpp, ``gguf`` the base model's GGUF file with the
            edited matrices rewritten, and ``ollama`` such a file, or with ``rank`` such an adapter, with a Modelfile.
        model: reference of the base model, as :func:`kecore.load_model` takes it; by default what the edit remembers.
        base: what an adapter calls its base model; by default its Hub id or folder.
        rank: columns of an adapter, at the most; what they cannot hold is left out. None for all that the edit holds.
        tensor_type: type of rewritten matrices, of :data:`~kecore.serving.gguf_file.TENSOR_TYPES`; by default the
            base file's own where that is a floating-point type, else ``f16``.
        base_gguf: the base model as a GGUF file; not needed where ``model`` is one.
        force: put the files in place of those that are in ``out``.
        show: shows the stages ``load`` and ``export``, and those of :func:`kecore.checkpoint.attach_edits`.

    Raises:
        ConfigError: an unknown target or type, a rank below 1, or an option that the target does not take.
        UnsupportedCapabilityError: an edit changes no weights, or the target cannot hold its changes.
        ArtifactError: ``out`` holds something, no base is known, or a GGUF file cannot be read.
        ArtifactMismatchError: an edit was made for another model.
        ModelLoadError: the model cannot be loaded.
        MissingDependencyError: the target needs a package that is not installed.
        StorageError: the disk is full, or the place is not writable.
    """
    out = Path(out)
    _check_options(to, rank, tensor_type)
    named = _read_edits(edits)
    edit = named[0].edit if len(named) == 1 else merge([item.edit for item in named])
    job = _Job(edit, named, out, model or edit.model, base, rank, tensor_type, base_gguf, show)
    writers = {
        "peft": job.peft,
        "merged": job.merged,
        "gguf": job.gguf,
        "gguf-lora": job.gguf_lora,
        "ollama": job.ollama,
    }
    with _open_folder(out, force) as folder:
        values = writers[to](folder)
        files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
        for path in folder.iterdir():
            path.chmod(path.stat().st_mode | 0o044)
    return Export(target=to, folder=out, files=files, **values)


def _check_options(to: str, rank: int | None, tensor_type: str | None) -> None:
    if to not in TARGETS:
        raise ConfigError(f"unknown target '{to}'; expected one of {', '.join(TARGETS)}")
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank of an adapter must be at least 1, got {rank}")
    if rank is not None and to in ("merged", "gguf"):
        raise ConfigError(f"--to {to} writes the whole matrices, which have no rank to choose; leave out --rank")
    if tensor_type is not None and tensor_type not in TENSOR_TYPES:
        raise ConfigError(f"unknown GGUF type '{tensor_type}'; expected one of {', '.join(TENSOR_TYPES)}")
    if tensor_type is not None and (to not in ("gguf", "ollama") or rank is not None):
        raise ConfigError("--type is the type of rewritten matrices, so it goes with --to gguf and --to ollama alone")


def _read_edits(edits: Sequence[Edit | str | Path]) -> tuple[NamedEdit, ...]:
    """Return edits of weights, each with where it was read from."""
    named: list[NamedEdit] = []
    for number, item in enumerate(edits, 1):
        edit, source = (item, f"edit {number}") if isinstance(item, Edit) else (load_edit(item), str(item))
        if not isinstance(edit, WeightEdit):
            raise UnsupportedCapabilityError(
                f"{source} is an edit by '{edit.method}', which changes no weights, so no other program can serve it; "
                "it acts through kecore alone (`kecore chat MODEL --edit ...`)"
            )
        named.append(NamedEdit(edit, source))
    return tuple(named)


def _open_folder(out: Path, force: bool) -> AbstractContextManager[Path]:
    return replace_files(out) if force else write_folder(out)


@dataclass(frozen=True)
class _Job:
    """One export: what is known before anything is written. Each target is a method that fills a folder.

    The methods return the arguments of :class:`Export` that are theirs.
    """

    edit: WeightEdit
    edits: tuple[NamedEdit, ...]
    out: Path
    model: str
    name: str
    rank: int | None
    tensor_type: str | None
    given_gguf: str | Path | None
    show: ShowStage

    def peft(self, folder: Path) -> dict[str, Any]:
        """Write an adapter in PEFT's format, with the tokenizer."""
        factors = factor_edit(self.edit, self.rank)
        warnings = [*_say_lost(factors), *commands.find_ignored(self.edit, factors.rank)]
        base = self.name
        with self.show("export", f"writing {self.out}"):
            if self.model:
                try:
                    base = base or self._base_name()
                    save_tokenizer(load_tokenizer(self.model), folder)
                except KecoreError as error:  # the adapter itself needs neither
                    warnings.append(f"the adapter has no tokenizer: {error}")
            if not base:
                warnings.append(
                    "the adapter does not say what its base model is, so programs cannot find it: give --model MODEL, "
                    "or --base NAME"
                )
            write_adapter(self.edit, factors, folder, base=base)
        serve = commands.adapter_commands(self.out, base, factors.rank)
        return {**self._common(base), **_of_adapter(factors), "warnings": tuple(warnings), "commands": tuple(serve)}

    def merged(self, folder: Path) -> dict[str, Any]:
        """Write a checkpoint with the edits on it, in the type that the model is stored in."""

        def show(name: str, doing: str) -> AbstractContextManager[None]:
            return self.show(name, doing.replace(str(folder), str(self.out)))  # where it will be

        attach_edits(self._load(), self.edits, folder, show=show)
        return {**self._common(self.model), "commands": tuple(commands.checkpoint_commands(self.out))}

    def gguf(self, folder: Path) -> dict[str, Any]:
        """Write the base model's GGUF file with the edited matrices in place of its own."""
        base = self._need_gguf()
        loaded = self._load()
        with self.show("export", f"writing {self.out / MODEL}"):
            matrices, rounding = self._pack_matrices(base, loaded)
            copy_with_tensors(base, matrices, folder / MODEL)
        warnings: list[str] = []
        types = {name: packed.type_name for name, packed in matrices.items()}
        if rounding > _LOUD:
            warnings.append(
                f"{', '.join(dict.fromkeys(types.values()))} rounds the edited matrices by up to {rounding:.0%} of "
                "what the edit adds to them, and may lose facts; f16 keeps them, and --verify tells"
            )
        return {
            **self._common(self.model),
            "types": types,
            "rounding": rounding,
            "warnings": tuple(warnings),
            "commands": tuple(commands.gguf_commands(self.out / MODEL, is_adapter=False)),
        }

    def gguf_lora(self, folder: Path) -> dict[str, Any]:
        """Write an adapter of llama.cpp."""
        factors = factor_edit(self.edit, self.rank)
        base = self._gguf()
        names = TensorNames(self._architecture(base), self.edit.updates)
        with self.show("export", f"writing {self.out / ADAPTER}"):
            interleaved = self._find_interleaved(base, names)
            write_lora(factors.updates, names, interleaved, folder / ADAPTER, title=f"edit by {self.edit.method}")
        path = None if base is None else base.path
        serve = commands.gguf_commands(self.out / ADAPTER, path, is_adapter=True)
        warnings = _say_lost(factors)
        return {
            **self._common(self.model),
            **_of_adapter(factors),
            "warnings": tuple(warnings),
            "commands": tuple(serve),
        }

    def ollama(self, folder: Path) -> dict[str, Any]:
        """Write a model, or with a rank an adapter, and the Modelfile for it."""
        if self.rank is None:
            export = self.gguf(folder)
            write_modelfile(folder, f"./{MODEL}")
        else:
            base = self._need_gguf()
            export = self.gguf_lora(folder)
            write_modelfile(folder, base.path.resolve(), ADAPTER)
        return {**export, "commands": tuple(commands.ollama_commands(self.out))}

    def _common(self, base: str) -> dict[str, Any]:
        found = self._gguf()
        return {
            "matrices": tuple(self.edit.updates),
            "model": self.model,
            "base": base,
            "base_gguf": None if found is None else found.path,
        }

    def _base_name(self) -> str:
        """Return what peft finds the base model by: a folder, or an id on the Hub."""
        source = resolve(self.model)
        return str(Path(source).resolve()) if Path(source).is_dir() else source

    def _load(self) -> LoadedModel:
        """Load the base model in the type that it is stored in, on the CPU.

        Raises:
            ArtifactError: nobody says which it is.
        """
        if not self.model:
            raise ArtifactError("the edit does not say which model it was made for; name it by --model MODEL")
        with self.show("load", f"loading {self.model}"):
            return load_model(self.model, device="cpu")

    def _gguf(self) -> GgufFile | None:
        path = Path(self.given_gguf) if self.given_gguf is not None else gguf_file(self.model)
        return None if path is None else GgufFile(path)

    def _need_gguf(self) -> GgufFile:
        """Return the base model's GGUF file.

        Raises:
            ArtifactError: there is none.
        """
        found = self._gguf()
        if found is None:
            raise ArtifactError(
                f"a GGUF model is written from the base model's GGUF file, and '{self.model or 'the model'}' is none. "
                "Convert it once by llama.cpp's `python convert_hf_to_gguf.py MODEL --outfile base.gguf`, and give it "
                "by --base-gguf base.gguf"
            )
        return found

    def _architecture(self, base: GgufFile | None) -> str:
        if base is not None:
            return base.architecture
        if not self.model:
            raise ArtifactError(
                "an adapter of llama.cpp names its base's architecture; name the model by --model MODEL or "
                "--base-gguf FILE"
            )
        return architecture_of(load_model_type(self.model))

    def _pack_matrices(self, base: GgufFile, loaded: LoadedModel) -> tuple[dict[str, Packed], float]:
        """Return the edited matrices by the names of their tensors, and how much their types round at the most."""
        self.edit.check_base(loaded.model)
        _refuse_experts(self.edit)
        names = TensorNames(base.architecture, self.edit.updates)
        parameters = dict(loaded.model.named_parameters())
        packed: dict[str, Packed] = {}
        largest = 0.0
        for name, update in self.edit.updates.items():
            tensor, is_transposed = names.of(name), name in self.edit.transposed
            weight = parameters[name].data.float()
            heads = find_interleaving(base, tensor, _oriented(weight, is_transposed), name)
            new = _oriented(updated(name, weight, [update], is_transposed), is_transposed)  # [d_out, d_in]
            kind = self.tensor_type or default_type(base.type_of(tensor))
            packed[tensor] = pack(interleave(new, heads), kind)
            norm = update.norm()
            if norm:
                largest = max(largest, packed[tensor].rounding / norm)
        return packed, largest

    def _find_interleaved(self, base: GgufFile | None, names: TensorNames) -> dict[str, int]:
        """Return how the base's file orders the rows of queries and keys, where the edit changes some."""
        attention = [name for name in self.edit.updates if names.may_be_interleaved(name)]
        if not attention:
            return {}
        if base is None:
            raise ArtifactError(
                f"the edit changes {attention[0]}, whose rows llama.cpp orders in its own way for some models; give "
                "the base model by --base-gguf FILE, so that they can be compared"
            )
        parameters = dict(self._load().model.named_parameters())
        interleaved: dict[str, int] = {}
        for name in attention:
            weight = _oriented(parameters[name].data.float(), name in self.edit.transposed)
            interleaved[name] = find_interleaving(base, names.of(name), weight, name)
        return interleaved


def _refuse_experts(edit: WeightEdit) -> None:
    """Refuse an edit of single experts: a GGUF file keeps those of a layer in one tensor of its own order."""
    stacked = [name for name in edit.updates if MatrixName.parse(name).index is not None]
    if stacked:
        raise UnsupportedCapabilityError(
            f"{stacked[0]} is one of several experts' matrices that a parameter stacks, whose tensors in a GGUF file "
            "kecore does not write; write a checkpoint (--to merged) and convert that with llama.cpp's "
            "convert_hf_to_gguf.py"
        )


def _oriented(weight: Tensor, is_transposed: bool) -> Tensor:
    """Return a stored weight as ``[d_out, d_in]``."""
    return torch.t(weight) if is_transposed else weight


def _of_adapter(factors: Factors) -> dict[str, Any]:
    return {"rank": factors.rank, "lost": factors.lost}


def _say_lost(factors: Factors) -> list[str]:
    if factors.lost <= _NOTHING:
        return []
    return [
        f"rank {factors.rank} leaves out up to {factors.lost:.1%} of an update; with --verify the success that it "
        "costs is measured"
    ]
