"""Signatures of edit files: who made a file, which no digest inside it can say.

A signature is a file of its own beside the edit, ``edit.safetensors.sig``, so that edit files stay what they are and
every kecore reads them. It is Ed25519 (RFC 8032) over the SHA-256 of the file's bytes, in base64 on one line. Keys are
PEM files, as ``openssl genpkey -algorithm ed25519`` writes them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kecore.api.errors import ArtifactError, ConfigError, MissingDependencyError
from kecore.files import file_digest, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["check_signature", "read_public_key", "sign", "signature_path"]

_PURPOSE = "kecore signature of a file, 1\n"
"""Stands before the digest, so that what was signed for another purpose is no signature of a file."""

_MAKE_KEY = "`openssl genpkey -algorithm ed25519 -out key.pem` makes one"


def signature_path(path: Path) -> Path:
    """Return where the signature of a file stands."""
    return path.with_name(f"{path.name}.sig")


def sign(path: Path, key_file: Path) -> Path:
    """Sign a file.

    Args:
        path: the file.
        key_file: a private Ed25519 key in PEM.

    Returns:
        The file with the signature.

    Raises:
        ConfigError: the key cannot be read.
        StorageError: the signature cannot be written.
    """
    key = _read_private_key(key_file)
    text = base64.b64encode(key.sign(_message(path))).decode() + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="ascii")

    return write_atomic(signature_path(path), write)


def check_signature(path: Path, trusted: Sequence[Ed25519PublicKey], signature: str | None = None) -> None:
    """Refuse a file that nobody signed who is trusted.

    Args:
        path: the file.
        trusted: public keys, one of which has to have signed.
        signature: in base64; by default that of the file beside it.

    Raises:
        ArtifactError: there is no signature, or it is of other bytes or by another key.
    """
    from cryptography.exceptions import InvalidSignature

    if signature is None:
        beside = signature_path(path)
        if not beside.is_file():
            raise ArtifactError(
                f"{path} has no signature; expected {beside.name} beside it, which `kecore sign` writes"
            )
        signature = beside.read_text(encoding="ascii", errors="replace")
    try:
        content = base64.b64decode(signature.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ArtifactError(f"the signature of {path} is no base64: {error}") from error
    message = _message(path)
    for key in trusted:
        try:
            key.verify(content, message)
        except InvalidSignature:
            continue
        return
    raise ArtifactError(
        f"the signature of {path} is by none of the {len(trusted)} trusted keys, or the file was changed since; get "
        "the file from whoever signed it"
    )


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        ConfigError: it is none.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = _read_key(path, "public")
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is no public Ed25519 key; `openssl pkey -in key.pem -pubout` writes that of a key")
    return key


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = _read_key(path, "private")
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is no private Ed25519 key; {_MAKE_KEY}")
    return key


def _read_key(path: Path, kind: str) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise MissingDependencyError("signatures need cryptography: pip install 'kecore[serve]'") from error
    try:
        content = path.read_bytes()
        return load_pem_public_key(content) if kind == "public" else load_pem_private_key(content, password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no {kind} key in PEM without a password: {error}; {_MAKE_KEY}") from error


def _message(path: Path) -> bytes:
    return f"{_PURPOSE}{file_digest(path)}".encode()
