"""Reads references to the Hugging Face hub, and fetches files of kecore's that lie there.

Wherever a path of an edit, of key statistics or of a trained editor is taken, ``hf:OWNER/NAME`` is taken too: what
reads such a file asks :func:`artifact_file` where it lies.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kecore.api.errors import ConfigError, HubError, KecoreError

__all__ = [
    "EDIT",
    "HUB",
    "STATISTICS",
    "TRAINED",
    "HubListing",
    "HubReference",
    "artifact_file",
    "download",
    "explain_hub_errors",
    "is_reference",
    "list_files",
]

logger = logging.getLogger(__name__)

EDIT, STATISTICS, TRAINED = "edit.safetensors", "statistics.safetensors", "trained.safetensors"
"""Names of the files of an edit, of key statistics and of a trained editor in a folder or repository."""

HUB = "hf:"
"""What a reference to the hub begins with."""

_FORM = re.compile(
    r"(?P<repository>[^/@:]+/[^/@:]+)(@(?P<revision>refs/(pr|convert)/[^/@:]+|[^/@:]+))?"
    r"(/(?P<inside>[^:]+)|:(?P<config>.+))?"
)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of the hub at one revision, and a place in it.

    Args:
        repository: ``OWNER/NAME``.
        revision: a branch, a tag or a commit; None for the default branch.
        inside: path of a file or folder in the repository; empty for its root.
        config: configuration of a data set; None where none is named.
    """

    repository: str
    revision: str | None = None
    inside: str = ""
    config: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> HubReference:
        """Read ``hf:OWNER/NAME[@REVISION]``, with ``/path/inside`` or, for data sets, ``:CONFIG`` behind it.

        Raises:
            ConfigError: it has another form.
        """
        written = _as_text(text)
        match = _FORM.fullmatch(written.removeprefix(HUB))
        if match is None:
            raise ConfigError(
                f"{written}: expected hf:OWNER/NAME[@REVISION] or hf:OWNER/NAME[@REVISION]/path/inside; for a data "
                "set also hf:OWNER/NAME[@REVISION]:CONFIG"
            )
        return cls(match["repository"], match["revision"], (match["inside"] or "").rstrip("/"), match["config"])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        inside = f"/{self.inside}" if self.inside else ""
        config = f":{self.config}" if self.config else ""
        return f"{HUB}{self.repository}{revision}{inside}{config}"

    def join(self, file: str) -> str:
        """Return the path in the repository of a file below this place."""
        return f"{self.inside}/{file}" if self.inside else file

    def at(self, commit: str) -> HubReference:
        """Return the same place at one commit, which is the same for ever."""
        return replace(self, revision=commit)


@dataclass(frozen=True, slots=True)
class HubListing:
    """The files of a repository at one commit.

    Args:
        commit: the commit that the asked revision stood for.
        digests: path of each file to the SHA-256 that the hub keeps of it; None for a small text file.
    """

    commit: str
    digests: Mapping[str, str | None]


def is_reference(path: str | Path) -> bool:
    """Return whether a path is a reference to the hub."""
    return _as_text(path).startswith(HUB)


def _as_text(path: str | Path) -> str:
    return path.as_posix() if isinstance(path, Path) else path  # pathlib writes backslashes on Windows


def artifact_file(path: str | Path, name: str) -> Path:
    """Return the local file that a path or a reference of the hub leads to; one of the hub is fetched.

    Args:
        path: a file, a folder that holds ``name``, or ``hf:OWNER/NAME[@REVISION][/path]`` of either.
        name: the file's name in a folder.

    Raises:
        ConfigError: a malformed reference.
        HubError: the hub cannot be reached, or has no such repository, revision or file.
    """
    if not is_reference(path):
        path = Path(path)
        return path / name if path.is_dir() else path
    reference = _place_of_files(path)
    inside = reference.inside if reference.inside.endswith(Path(name).suffix) else reference.join(name)
    return download(reference, inside)


def _place_of_files(path: str | Path) -> HubReference:
    reference = HubReference.parse(path)
    if reference.config is not None:
        raise ConfigError(
            f"{reference}: ':{reference.config}' is for data sets; leave it out, or name a file or folder of the "
            "repository as hf:OWNER/NAME/path"
        )
    return reference


def download(reference: HubReference, file: str, *, repo_type: str = "model", folder: Path | None = None) -> Path:
    """Fetch one file, into the hub's own cache or into a folder, and say which commit it is of.

    Args:
        reference: the repository and its revision.
        file: path in the repository.
        repo_type: ``model`` or ``dataset``.
        folder: where to put it, under its path in the repository; by default it stays in the cache of the hub's
            library, from where it is read again without a connection.

    Raises:
        HubError: the hub cannot be reached, or has no such repository, revision or file.
    """
    from huggingface_hub import hf_hub_download

    with explain_hub_errors(f"{replace(reference, inside=file)}"):
        path = Path(
            hf_hub_download(
                reference.repository, file, repo_type=repo_type, revision=reference.revision, local_dir=folder
            )
        )
    commit = _commit_of(path)
    if commit and commit != reference.revision:
        logger.info("read %s at commit %s; %s stays the same", reference, commit[:12], reference.at(commit[:12]))
    return path


def _commit_of(path: Path) -> str:
    """Return the commit that a file in the hub's cache is of; empty where the file lies elsewhere."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else ""


def list_files(reference: HubReference) -> HubListing:
    """Ask the hub for the files of a repository, and for the commit that the revision stands for now.

    Raises:
        HubError: the hub cannot be reached, or has no such repository or revision.
    """
    from huggingface_hub import HfApi

    with explain_hub_errors(str(reference)):
        info: Any = HfApi().model_info(reference.repository, revision=reference.revision, files_metadata=True)
    digests: dict[str, str | None] = {}
    for sibling in info.siblings or []:
        digests[sibling.rfilename] = sibling.lfs.sha256 if sibling.lfs else None
    return HubListing(str(info.sha), digests)


@contextmanager
def explain_hub_errors(
    what: str, further: tuple[type[Exception], ...] = (), *, action: str = "had from"
) -> Iterator[None]:
    """Turn what the hub's library raises in a block, and what its HTTP client does, into a typed error.

    Args:
        what: the reference that was asked for, for the message.
        further: errors of another library that the block calls.
        action: what the block does: what cannot be ``had from`` or ``sent to`` the hub.

    Raises:
        HubError: says what the library said, and the way out.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The library has changed its HTTP client before; the client's own errors are always the base of this class.
    client_errors = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    try:
        yield
    except KecoreError:
        raise
    except (OSError, ValueError, RuntimeError, *client_errors, *further) as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        advice = "check the name and the connection"
        if action == "had from":
            advice += ", or download the file and give its path"
        if isinstance(error, LocalTokenNotFoundError | GatedRepoError) or status in (401, 403):
            advice = f"it may be private, gated or another's: {_LOGIN}"
        elif isinstance(error, RepositoryNotFoundError):
            advice = f"check the name; if it is private, {_LOGIN}"
        elif isinstance(error, RevisionNotFoundError):
            advice = "look up its branches, tags and commits on the hub"
        elif isinstance(error, HFValidationError):
            advice = "write it as hf:OWNER/NAME"
        elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            advice = "look up its files on the hub"
        reason = str(error).strip().partition("\n")[0]
        raise HubError(
            f"{what} cannot be {action} the Hugging Face hub: {type(error).__name__}: {reason}; {advice}"
        ) from error
