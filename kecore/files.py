"""Writing and reading kecore's files: whole or not at all, checked by digest, never pickles."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kecore.errors import ArtifactError

__all__ = ["read_tensors", "write_atomic", "write_json", "write_tensors"]

_KEY = "kecore"


def write_atomic(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` make a file beside ``path``, then move it into place in one step.

    A full disk or an interrupt leaves what was at ``path`` as it was, and no stray file.
    """
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
    finally:
        temporary.unlink(missing_ok=True)
    return path


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
    head = {"kind": kind, "digest": _digest(stored), **header}
    metadata = {_KEY: json.dumps(head, ensure_ascii=False)}
    # safetensors refuses an empty set of tensors only on reading; a placeholder keeps files uniform.
    payload = stored or {"empty": torch.zeros(0)}
    return write_atomic(path, lambda p: save_file(payload, p, metadata=metadata))


def read_tensors(path: Path, kind: str, *, verify: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file written by :func:`write_tensors`.

    Args:
        path: the file.
        kind: what it must hold.
        verify: check the tensors against the digest in the header.

    Returns:
        The header and the tensors (memory-mapped).

    Raises:
        ArtifactError: missing, truncated, corrupt, foreign, or of another kind.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; expected a kecore {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: truncated or not a safetensors file ({error}); copy it again or make it anew"
        ) from error
    if raw is None:
        raise ArtifactError(f"{path}: a safetensors file without a kecore header; expected a kecore {kind}")
    header: dict[str, Any] = json.loads(raw)
    if header.get("kind") != kind:
        raise ArtifactError(f"{path}: expected a kecore {kind}, got a kecore {header.get('kind')}")
    tensors.pop("empty", None)
    if verify and _digest(tensors) != header.get("digest"):
        raise ArtifactError(f"{path}: the tensors do not match the digest in the header; the file is corrupt")
    return header, tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        h.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        if tensor.numel():
            h.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()[:32]
