"""The result of training: the tensors of a trained editor, with everything that says which editor it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kecore._version import __version__
from kecore.api.errors import ArtifactMismatchError
from kecore.api.identity import Fingerprint
from kecore.files import explain_content_errors, read_tensors, write_tensors
from kecore.hub import TRAINED, artifact_file

if TYPE_CHECKING:
    from kecore.api.config import MethodConfig
    from kecore.api.method import EditMethod
    from kecore.model import ModelView

__all__ = ["TrainedEditor", "model_facts"]

KIND = "trained-editor"
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class TrainedEditor:
    """A method's own parameters, trained on records for one base model.

    Args:
        tensors: by name, as the method's ``prepare`` made them.
        method: name of the method.
        config: the method's configuration as JSON values, complete.
        config_version: ``version`` of its class.
        base: fingerprint of the model that it was trained on.
        model: that model in words; see :func:`model_facts`.
        seed: seed of the training.
        record: how it was trained, as JSON values: data and their digest, schedule, steps, held-out curve.
        created: seconds since the epoch.
        version: kecore that trained it.
    """

    tensors: Mapping[str, Tensor]
    method: str
    config: Mapping[str, Any]
    base: Fingerprint
    model: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)
    config_version: int = 1
    created: float = field(default_factory=time.time)
    version: str = __version__

    def fits(self, base: Fingerprint) -> bool:
        """Return whether the editor was trained on the model with this fingerprint."""
        digest = base.digests.get(base.dtype)
        return digest is not None and self.base.digests.get(base.dtype) == digest

    def check(self, view: ModelView, method: str, base: Fingerprint) -> None:
        """Refuse another method or another base model.

        Args:
            view: the model.
            method: name of the method that is to use the tensors.
            base: fingerprint of the unedited model.

        Raises:
            ArtifactMismatchError: names what differs.
        """
        self._check_method(method)
        if self.fits(base):
            return
        dtype = base.dtype
        expected = self.base.digests.get(dtype, "none")
        actual = base.digests.get(dtype, "none")
        facts = model_facts(view)
        differences = [
            f"{key} {value} against {facts.get(key)}" for key, value in self.model.items() if facts.get(key) != value
        ]
        differences.append(f"fingerprint expected {expected[:12]}, got {actual[:12]} ({dtype})")
        raise ArtifactMismatchError(
            f"the trained editor belongs to another model: {', '.join(differences)}; use it with the model it "
            f"was trained on, or train one for this model with `kecore train {method} MODEL --data FILE --out DIR`"
        )

    def configure(self, cls: type[EditMethod], values: Mapping[str, Any]) -> MethodConfig:
        """Make the configuration of an edit: the one of the training, with the fields that may differ from it.

        Args:
            cls: the method's class.
            values: fields that were asked for.

        Raises:
            ConfigError: a bad field.
            ArtifactMismatchError: the editor is one of another method; or a field decides what was trained and has
                another value there, which is named.
        """
        self._check_method(cls.name)
        trained = cls.Config.make(cls.Config.upgrade(dict(self.config), self.config_version))
        config = cls.Config.make({**trained.to_json(), **values})
        differences: list[str] = []
        for name in sorted(type(config).model_fields.keys() - cls.Config.free):
            at_training, for_edit = getattr(trained, name), getattr(config, name)
            if at_training != for_edit:
                differences.append(f"{name} {at_training!r}, asked {for_edit!r}")
        if differences:
            raise ArtifactMismatchError(
                f"the editor was trained with {'; '.join(differences)}; leave that out, or train one with it "
                f"(`kecore train {cls.name} ... --set KEY=VALUE`)"
            )
        return config

    def _check_method(self, name: str) -> None:
        if self.method != name:
            raise ArtifactMismatchError(
                f"the trained editor is one of method '{self.method}', not of '{name}'; give the one that "
                f"`kecore train {name} MODEL --data FILE --out DIR` makes, if that method needs training"
            )

    def save(self, path: str | Path) -> Path:
        """Write ``trained.safetensors`` into a folder (or to a ``.safetensors`` file), atomically."""
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / TRAINED
        header = {
            "format": _FORMAT,
            "version": self.version,
            "created": self.created,
            "method": self.method,
            "config": dict(self.config),
            "config_version": self.config_version,
            "seed": self.seed,
            "base": {"dtype": self.base.dtype, "digests": dict(self.base.digests)},
            "model": dict(self.model),
            "record": dict(self.record),
        }
        return write_tensors(file, KIND, header, self.tensors)

    @classmethod
    def load(cls, path: str | Path) -> TrainedEditor:
        """Read a trained editor.

        Args:
            path: a file, a folder, or ``hf:OWNER/NAME[@REVISION]`` on the Hugging Face hub.

        Raises:
            ArtifactError: missing, truncated, corrupt, foreign, or from a newer kecore.
            HubError: the hub cannot be reached, or has no such editor.
        """
        header, tensors = read_tensors(artifact_file(path, TRAINED), KIND, newest=_FORMAT)
        with explain_content_errors(path, "trained editor"):
            return cls(
                tensors=tensors,
                method=header["method"],
                config=header["config"],
                config_version=header["config_version"],
                base=Fingerprint(**header["base"]),
                model=header["model"],
                seed=header["seed"],
                record=header["record"],
                created=header["created"],
                version=header["version"],
            )

    def inspect(self) -> dict[str, Any]:
        """Describe what the editor is and how it was trained, as JSON values."""
        return {
            "method": self.method,
            "version": self.version,
            "created": self.created,
            "seed": self.seed,
            "base": {"dtype": self.base.dtype, **self.base.digests},
            "model": dict(self.model),
            "config": dict(self.config),
            "record": dict(self.record),
            "tensors": {name: list(tensor.shape) for name, tensor in self.tensors.items()},
            "numbers": sum(tensor.numel() for tensor in self.tensors.values()),
        }


def model_facts(view: ModelView) -> dict[str, Any]:
    """Describe a model, so that a refusal can say what differs: class, layers, residual and key width."""
    return {
        "class": type(view.model).__name__,
        "layers": len(view.layers),
        "width": view.width,
        "key width": view.layer(0).block.d_in,
    }
