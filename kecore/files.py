"""Writes and reads kecore's files: whole or not at all, checked by digest, never pickles."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kecore.api.errors import ArtifactError, KecoreError, StorageError
from kecore.cache import mark_used, trim_cache

__all__ = [
    "cache_dir",
    "check_new_folder",
    "check_writable",
    "explain_content_errors",
    "explain_write_errors",
    "file_digest",
    "load_or_make",
    "read_kind",
    "read_tensors",
    "replace_files",
    "write_atomic",
    "write_folder",
    "write_json",
    "write_tensors",
]

logger = logging.getLogger(__name__)

_KEY = "kecore"
_HEADER = "header_digest"


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn what the system refuses while a block writes ``path`` into a typed error.

    Raises:
        StorageError: says what the system said.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, KecoreError) and not isinstance(error, StorageError):
            raise
        # A part of what is written may have been refused first: name the whole, and what was said of the part.
        cause = error.__cause__ or error if isinstance(error, StorageError) else error
        reason = getattr(cause, "strerror", None) or cause
        raise StorageError(
            f"{path} cannot be written: {reason}; nothing was left half-written. Make room, or name another place"
        ) from error


def write_atomic(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` make a file in the folder of ``path``, then move it into place in one step.

    A full disk or an interrupt leaves what was at ``path`` as it was, and no stray file.

    Raises:
        StorageError: the system refuses.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _sync_folder(folder: Path) -> None:
    """Let a new name in a folder outlive a loss of power, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path) -> None:
    """Refuse a place where nothing can be written, before the work whose result belongs there.

    A file is made and removed again in ``path``, or in the nearest directory above it that is there; nothing stays.

    Raises:
        StorageError: says what the system said.
    """
    with explain_write_errors(path):
        folder = path.absolute()
        while not folder.exists():
            folder = folder.parent
        if folder == path.absolute() and not folder.is_dir():
            folder = folder.parent  # a file that will be replaced
        with tempfile.TemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass


def check_new_folder(path: Path) -> None:
    """Refuse a place where a folder cannot be written.

    Raises:
        ArtifactError: there is something else than an empty directory.
        StorageError: the system refuses.
    """
    with explain_write_errors(path):
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not is_free:
        raise ArtifactError(f"{path} exists and is not empty; name a new directory or empty this one")
    check_writable(path)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Let a block fill an empty folder, which is moved to ``path`` when the block ends; on failure it is removed.

    Args:
        path: a directory that is not there yet, or empty.

    Raises:
        ArtifactError: there is something else at ``path``.
        StorageError: the system refuses.
    """
    check_new_folder(path)
    with _folder_beside(path) as folder:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        if path.is_dir():
            path.rmdir()  # empty; some systems do not rename onto a directory
        os.replace(folder, path)


@contextmanager
def replace_files(path: Path) -> Iterator[Path]:
    """Let a block fill an empty folder, whose files are moved into ``path`` when the block ends; on failure none is.

    Files of other names stay where they are.

    Args:
        path: a directory, which may hold files.

    Raises:
        ArtifactError: ``path`` is a file.
        StorageError: the system refuses.
    """
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file; name a directory")
    check_writable(path)
    with _folder_beside(path) as folder:
        yield folder
        for file in sorted(item for item in folder.rglob("*") if item.is_file()):
            target = path / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Make an empty folder beside ``path`` for a block, and remove it where it still is behind the block."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, value: Any) -> Path:
    """Write one JSON document atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_atomic(path, lambda p: _write_text(p, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_tensors(path: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a safetensors file with a JSON header.

    Args:
        path: the file.
        kind: what the file holds, such as ``"weight-edit"``.
        header: JSON values.
        tensors: written contiguous, from any device.
    """
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    full_header = {"kind": kind, "digest": _digest(stored), **header}
    signed_header = {**full_header, _HEADER: _header_digest(full_header)}
    metadata = {_KEY: json.dumps(signed_header, ensure_ascii=False)}
    # safetensors refuses an empty set of tensors only on reading; a placeholder keeps files uniform.
    payload = stored or {"empty": torch.zeros(0)}
    return write_atomic(path, lambda p: save_file(payload, p, metadata=metadata))


def read_tensors(
    path: Path, kind: str, *, newest: int | None = None, verify: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file written by :func:`write_tensors`.

    Args:
        path: the file.
        kind: what it must hold.
        newest: the highest ``format`` in the header that the caller can read.
        verify: check header and tensors against the digests in the header.

    Returns:
        The header and the tensors (memory-mapped).

    Raises:
        ArtifactError: missing, truncated, corrupt, foreign, of another kind, or of a newer format.
    """
    header, tensors = _read_unverified(path, kind)
    header_digest = header.pop(_HEADER, None)
    if header.get("kind") != kind:
        raise ArtifactError(f"{path}: expected a kecore {kind}, got a kecore {header.get('kind')}")
    if verify and header_digest not in (None, _header_digest(header)):  # older files have none
        raise ArtifactError(f"{path}: the header does not match its own digest; the file is corrupt")
    file_format = header.get("format", 0)
    if not isinstance(file_format, int):
        raise ArtifactError(f"{path}: the header's format is no number; the file was made by another program")
    if newest is not None and file_format > newest:
        raise ArtifactError(
            f"{path} was written by kecore {header.get('version')} in a newer format; install that version or a "
            "newer one"
        )
    tensors.pop("empty", None)
    if verify and _digest(tensors) != header.get("digest"):
        raise ArtifactError(f"{path}: the tensors do not match the digest in the header; the file is corrupt")
    return header, tensors


@contextmanager
def explain_content_errors(path: str | Path, noun: str) -> Iterator[None]:
    """Turn what goes wrong inside the block, where a file's content is made into an object, into a typed error.

    A digest says that a file is as it was written, and not by whom: another program's or an attacker's file may be
    whole and hold anything.

    Args:
        path: the file.
        noun: what it should hold, such as ``edit``.

    Raises:
        ArtifactError: something was missing, or of another type than it has to be.
    """
    try:
        yield
    except KecoreError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ArtifactError(
            f"{path}: the file is whole and does not hold what a kecore {noun} has ({type(error).__name__}: {error}); "
            "it was made by another program, or changed; make it anew"
        ) from error


def read_kind(path: Path, expected: str = "artifact") -> str:
    """Return what a file written by :func:`write_tensors` says it holds; no tensor is read.

    Args:
        path: the file.
        expected: what an error says it should be.

    Raises:
        ArtifactError: missing, truncated, corrupt or foreign.
    """
    header, _ = _read_unverified(path, expected, with_tensors=False)
    return str(header.get("kind"))


def _read_unverified(
    path: Path, expected: str, *, with_tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors as they stand in a file."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file or directory; expected a kecore {expected}")
    try:
        with safe_open(path, framework="pt") as file:
            raw_header = (file.metadata() or {}).get(_KEY)
            tensors: dict[str, Tensor] = {}
            if with_tensors:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: truncated or not a safetensors file ({error}); copy it again or make it anew"
        ) from error
    if raw_header is None:
        raise ArtifactError(f"{path}: a safetensors file without a kecore header; expected a kecore {expected}")
    try:
        header = dict(json.loads(raw_header))
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: the header is corrupt ({error})") from error
    return header, tensors


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Return the folder of what kecore made from other files: ``$KECORE_CACHE``, or ``~/.cache/kecore``."""
    return Path(os.environ.get("KECORE_CACHE") or Path.home() / ".cache" / "kecore")


def load_or_make(folder: str, name: str, kind: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Load tensors that were made before from kecore's cache, memory-mapped; else make them and store them there.

    Another process that asks for the same tensors waits for this one. A damaged file is made anew. A cache that cannot
    be written costs the time to make them each time, and nothing else.

    Args:
        folder: name of a folder in the cache.
        name: digest of everything that the tensors depend on.
        kind: what they are, as in :func:`write_tensors`.
        make: makes them.
    """
    from filelock import FileLock

    file = cache_dir() / folder / f"{name}.safetensors"
    tensors: dict[str, Tensor] | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if file.is_file():
                try:
                    stored = read_tensors(file, kind)[1]
                    mark_used(file)
                    return stored
                except ArtifactError as error:
                    logger.info("made anew: %s", error)
            tensors = make()
            write_tensors(file, kind, {}, tensors)
            trim_cache(cache_dir())
        return read_tensors(file, kind, verify=False)[1]
    except OSError as error:
        logger.info("not kept in the cache: %s", error)
        return tensors if tensors is not None else make()


def _header_digest(header: Mapping[str, Any]) -> str:
    # Digest the header as it will be read back: JSON has no tuples and no number keys.
    plain = json.loads(json.dumps(dict(header)))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
