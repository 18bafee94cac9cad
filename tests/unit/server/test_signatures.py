"""Signed edit files: whose they are, and that a changed one is nobody's."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from ledger_edits import fingerprint, random_edit, small_module

from kecore.api.errors import ArtifactError, ConfigError
from kecore_serve.signatures import check_signature, read_public_key, sign, signature_path


def _key(folder: Path, name: str) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_signature_says_whose_a_file_is(tmp_path: Path) -> None:
    (mine, mine_public), (_, other_public) = _key(tmp_path, "mine"), _key(tmp_path, "other")
    path = random_edit(fingerprint(small_module()), 1).save(tmp_path / "edit.safetensors")
    trusted = [read_public_key(other_public), read_public_key(mine_public)]
    with pytest.raises(ArtifactError, match=r"has no signature; expected edit\.safetensors\.sig"):
        check_signature(path, trusted)
    assert sign(path, mine) == signature_path(path)
    check_signature(path, trusted)
    check_signature(path, trusted, signature_path(path).read_text())
    with pytest.raises(ArtifactError, match="by none of the 1 trusted keys"):
        check_signature(path, trusted[:1])
    with pytest.raises(ArtifactError, match="no base64"):
        check_signature(path, trusted, "é")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ArtifactError, match="or the file was changed since"):
        check_signature(path, trusted)


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    mine, public = _key(tmp_path, "mine")
    path = random_edit(fingerprint(small_module()), 1).save(tmp_path / "edit.safetensors")
    for not_private in (public, tmp_path / "none.pem", path):
        with pytest.raises(ConfigError, match="is no private key"):
            sign(path, not_private)
    with pytest.raises(ConfigError, match="is no public key"):
        read_public_key(mine)
    assert not signature_path(path).exists()
