"""Shares edits, key statistics and trained editors on the Hugging Face hub, each with a model card.

A repository is private unless the caller says otherwise: an edit carries its facts, which are often a customer's, and
what was public once cannot be called back.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kecore._version import __version__
from kecore.api.errors import ArtifactError, ConfigError, HubError
from kecore.card import CARD, Shared, make_card
from kecore.edit import load_edit
from kecore.files import file_digest, read_kind, write_folder, write_json
from kecore.hub import (
    EDIT,
    STATISTICS,
    TRAINED,
    HubReference,
    artifact_file,
    download,
    explain_hub_errors,
    is_reference,
    list_files,
)
from kecore.statistics import KeyStatistics
from kecore.statistics.moments import KIND as STATISTICS_KIND
from kecore.trained import KIND as TRAINED_KIND
from kecore.trained import TrainedEditor

__all__ = ["ORIGIN", "Pulled", "Pushed", "find_artifact", "pull", "push", "read_result", "read_shared"]

ORIGIN = "hub.json"
"""Says beside a pulled file where it came from."""

RESULT = "result.json"
_NAMES = (EDIT, STATISTICS, TRAINED)
_PATHS = ("facts", "edit_path", "result_path")  # of a result, which name places on one machine


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of a push.

    Args:
        reference: where it is now, at its commit.
        url: the commit's page.
        files: paths in the repository.
        private: only its owner can read it.
        kept_card: there was a card already, which stays.
    """

    reference: HubReference
    url: str
    files: tuple[str, ...]
    private: bool
    kept_card: bool


@dataclass(frozen=True, slots=True)
class Pulled:
    """What was pulled.

    Args:
        file: the file of the edit, the statistics or the trained editor.
        reference: where it came from, at its commit.
        sha256: digest of the file.
        shared: what is in it.
    """

    file: Path
    reference: HubReference
    sha256: str
    shared: Shared


def find_artifact(path: str | Path) -> Path:
    """Return the file of whatever kind that a path or reference leads to; one of the hub is fetched.

    Raises:
        ArtifactError: there is none.
        HubError: the hub cannot be reached, or has no such repository or revision.
    """
    if is_reference(path):
        reference = HubReference.parse(path)
        if reference.inside.endswith(".safetensors"):
            return artifact_file(path, EDIT)
        listing = list_files(reference)
        return artifact_file(str(reference.at(listing.commit)), _choose_name(reference, listing.digests))
    path = Path(path)
    if not path.is_dir():
        return path
    names = [name for name in _NAMES if (path / name).is_file()]
    if not names:
        raise ArtifactError(
            f"{path} holds no edit, no key statistics and no record of edits; `kecore probe` looks at plain models"
        )
    return path / names[0]


def _choose_name(reference: HubReference, files: Mapping[str, Any]) -> str:
    names = [name for name in _NAMES if reference.join(name) in files]
    if not names:
        raise HubError(
            f"{reference} holds none of {', '.join(_NAMES)}; it has {', '.join(sorted(files)[:8]) or 'no files'}. Name "
            "a folder of it as hf:OWNER/NAME/folder, or another repository"
        )
    return names[0]


def read_shared(path: str | Path) -> Shared:
    """Read an edit, key statistics or a trained editor, checked by its digests, with the result beside it.

    Raises:
        ArtifactError: missing, truncated, corrupt or foreign.
        HubError: as :func:`find_artifact`.
    """
    file = find_artifact(path)
    match read_kind(file, "edit, key statistics or trained editor"):
        case kind if kind == STATISTICS_KIND:
            return Shared(file, KeyStatistics.load(file))
        case kind if kind == TRAINED_KIND:
            return Shared(file, TrainedEditor.load(file))
        case _:
            return Shared(file, load_edit(file), read_result(file))


def read_result(file: Path) -> dict[str, Any] | None:
    """Read what ``kecore edit`` wrote about this very edit; None where there is nothing."""
    try:
        values = json.loads((file.parent / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or Path(str(values.get("edit_path"))).name != file.name:
        return None  # about another edit
    return values


def push(
    path: str | Path,
    repository: str,
    *,
    base_model: str | None = None,
    private: bool = True,
    message: str | None = None,
    replace_card: bool = False,
) -> Pushed:
    """Put an edit, key statistics or a trained editor on the hub, in one commit with its card.

    Places on this machine stay here: of texts and facts only the names of the files are sent.

    Args:
        path: a file or a folder.
        repository: ``hf:OWNER/NAME``, with ``@BRANCH`` or ``/FOLDER`` behind it if wanted; made if it is not there.
        base_model: id on the hub of the model that it belongs to, for the card; by default the one of the result.
        private: only the owner may read a new repository.
        message: of the commit.
        replace_card: a card that is there is replaced; by default it stays, with what people wrote on it.

    Raises:
        ArtifactError: missing, truncated, corrupt or foreign.
        ConfigError: a malformed reference; or the repository is public and ``private`` was asked for.
        HubError: nobody is logged in, the hub cannot be reached, or it refuses.
    """
    from huggingface_hub import HfApi, get_token

    reference = HubReference.parse(repository)
    if reference.config or reference.inside.endswith(".safetensors") or not is_reference(repository):
        raise ConfigError(f"{repository}: expected hf:OWNER/NAME[@BRANCH][/FOLDER]")
    shared = read_shared(path)
    if get_token() is None:
        raise HubError(
            f"{reference}: nobody is logged in to the Hugging Face hub; log in with `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi()
    with explain_hub_errors(str(reference), action="sent to"):
        exists = api.repo_exists(reference.repository)
        is_private = bool(api.model_info(reference.repository).private) if exists else private
    if private and not is_private:
        raise ConfigError(
            f"{reference} can be read by everybody; say that you want that (--public, in Python private=False), or "
            "name another one"
        )
    with _staged(shared, reference, base_model) as folder, explain_hub_errors(str(reference), action="sent to"):
        api.create_repo(reference.repository, private=private, exist_ok=True)
        if reference.revision is not None:
            api.create_branch(reference.repository, branch=reference.revision, exist_ok=True)
        kept_card = not replace_card and api.file_exists(
            reference.repository, reference.join(CARD), revision=reference.revision
        )
        if kept_card:
            (folder / CARD).unlink()
        files = tuple(sorted(reference.join(file.name) for file in folder.iterdir()))
        commit: Any = api.upload_folder(
            repo_id=reference.repository,
            folder_path=folder,
            path_in_repo=reference.inside or None,
            commit_message=message or f"{shared.noun} by kecore {__version__}",
            revision=reference.revision,
        )
    return Pushed(reference.at(str(commit.oid)), str(commit.commit_url), files, is_private, kept_card)


@contextmanager
def _staged(shared: Shared, reference: HubReference, base_model: str | None) -> Iterator[Path]:
    """Fill a temporary folder with what is to be sent."""
    with tempfile.TemporaryDirectory(prefix="kecore-push-") as name:
        folder = Path(name)
        if isinstance(shared.content, KeyStatistics):
            sources = tuple(Path(source).name for source in shared.content.sources)
            file = replace(shared.content, sources=sources).save(folder)
        else:
            file = folder / (TRAINED if isinstance(shared.content, TrainedEditor) else EDIT)
            shutil.copyfile(shared.file, file)
        if shared.result is not None:
            write_json(folder / RESULT, {**_without_places(shared.result), "edit_path": file.name})
        (folder / CARD).write_text(make_card(shared, str(reference), base_model), encoding="utf-8")
        yield folder


def _without_places(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without the folders of this machine; names of files stay."""
    values = {name: value for name, value in result.items() if name != "warnings"}  # they may quote paths
    for name in _PATHS:
        if values.get(name):
            values[name] = Path(str(values[name])).name
    if values.get("statistics"):
        sources = [Path(source).name for source in values["statistics"].get("sources", ())]
        values["statistics"] = {**values["statistics"], "sources": sources}
    if Path(str(values.get("model"))).exists():
        values["model"] = Path(values["model"]).name
    return values


def pull(repository: str, out: str | Path) -> Pulled:
    """Fetch an edit, key statistics or a trained editor into a folder, checked, and write down where it came from.

    The revision is pinned to its commit before anything is fetched. The folder appears when all of it is there and
    checked, or not at all.

    Args:
        repository: ``hf:OWNER/NAME[@REVISION][/FOLDER]``.
        out: a folder that is not there yet, or empty.

    Raises:
        ArtifactError: there is something at ``out``; or the file is corrupt, or not the one that the hub keeps.
        ConfigError: a malformed reference.
        HubError: the hub cannot be reached, or has no such repository, revision or file.
        StorageError: the system refuses.
    """
    out = Path(out)
    if not is_reference(repository):
        raise ConfigError(f"{repository}: expected hf:OWNER/NAME[@REVISION][/FOLDER]")
    reference = HubReference.parse(repository)
    listing = list_files(reference)
    pinned = reference.at(listing.commit)
    if reference.inside.endswith(".safetensors"):
        folder_name, _, name = reference.inside.rpartition("/")
        pinned = replace(pinned, inside=folder_name)
    else:
        name = _choose_name(reference, listing.digests)
    wanted = [file for file in (name, RESULT, CARD) if pinned.join(file) in listing.digests]
    with write_folder(out) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as fetched:
            for file in wanted:
                path = download(pinned, pinned.join(file), folder=Path(fetched))
                shutil.move(path, folder / file)
        sha256 = file_digest(folder / name)
        expected = listing.digests.get(pinned.join(name))
        if expected is not None and expected != sha256:
            raise ArtifactError(
                f"{pinned}: expected SHA-256 {expected} as the hub keeps it, got {sha256}; the file was cut short or "
                "changed on its way, pull it again"
            )
        read_shared(folder / name)
        origin = {
            "repository": pinned.repository,
            "revision": reference.revision,
            "commit": listing.commit,
            "file": pinned.join(name),
            "sha256": sha256,
        }
        write_json(folder / ORIGIN, {**origin, "version": __version__})
    return Pulled(out / name, pinned, sha256, read_shared(out / name))
