"""Content fingerprints of a model's weights: what edits and statistics are keyed by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DTYPES", "Fingerprint", "Identity", "type_name"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Weight types that an edit can be carried between."""

_CHUNK = 1 << 24  # elements hashed at once: bounds the copy of a tensor that lives on another device

_FEW = 1 << 22  # elements that are hashed before threads have been started


def _digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
    digest = hashlib.sha256(repr((tuple(tensor.shape), str(dtype))).encode())
    flat = tensor.detach().reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        chunk = flat[begin : begin + _CHUNK].to(dtype).cpu().contiguous()
        digest.update(chunk.view(torch.uint8).numpy().data)
    return digest.digest()


class Identity:
    """Digests of a model's parameters, computed once each from the weights as they are when asked.

    Args:
        model: the model; its parameters must not change while this object is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._digests: dict[tuple[str, torch.dtype], bytes] = {}

    def of(
        self,
        dtype: torch.dtype | None = None,
        keep: Callable[[str], bool] = lambda _: True,
    ) -> str:
        """Return the fingerprint of the parameters that ``keep`` accepts, as 32 hexadecimal digits.

        Args:
            dtype: hash the values rounded to this type, so that a float32 model and its bfloat16 copy
                can be recognised as the same base; by default the type they are stored in.
            keep: which parameter names count.
        """
        names = sorted(name for name in self._parameters if keep(name))
        keys = [(name, dtype or self._parameters[name].dtype) for name in names]
        self._compute([key for key in keys if key not in self._digests])
        digest = hashlib.sha256()
        for name, weight_type in keys:
            digest.update(name.encode() + b"\0" + self._digests[name, weight_type])
        return digest.hexdigest()[:32]

    def _compute(self, keys: Sequence[tuple[str, torch.dtype]]) -> None:
        """Compute the digests of parameters rounded to types."""

        def digest(key: tuple[str, torch.dtype]) -> bytes:
            return _digest(self._parameters[key[0]], key[1])

        if sum(self._parameters[name].numel() for name, _ in keys) < _FEW:
            self._digests.update((key, digest(key)) for key in keys)
            return
        # hashlib releases the GIL, so two threads hash two tensors at once.
        with ThreadPoolExecutor(max_workers=4) as pool:
            self._digests.update(zip(keys, pool.map(digest, keys), strict=True))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Which weights something was made from, recognisable after a change of weight type.

    Args:
        dtype: type the weights were stored in.
        digests: type name to the fingerprint of the weights rounded to that type.
    """

    dtype: str
    digests: Mapping[str, str]

    @classmethod
    def of(cls, identity: Identity, dtype: torch.dtype, keep: Callable[[str], bool] = lambda _: True) -> Fingerprint:
        """Make the fingerprint of the weights in all the types they may later be loaded in."""
        digests = {name: identity.of(kind, keep) for name, kind in DTYPES.items()}
        return cls(type_name(dtype), digests)

    def differs(self, identity: Identity, dtype: torch.dtype, keep: Callable[[str], bool] = lambda _: True) -> str:
        """Return how the weights differ beyond their type, in words; empty if they do not."""
        name = type_name(dtype)
        if name not in self.digests:
            return f"kept for weights in {', '.join(self.digests)}, got weights in {name}"
        expected, actual = self.digests[name], identity.of(DTYPES[name], keep)
        if expected == actual:
            return ""
        return f"expected {expected[:12]}, got {actual[:12]} ({name})"


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a type: ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
