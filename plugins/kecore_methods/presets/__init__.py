"""Set-ups that were published for the methods of this package: one file a method, beside this one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, ClassVar

from kecore.api.config import MethodConfig, ModelShape, Preset
from kecore.api.hparams import Translation
from kecore_methods.hparams import HparamsTable

__all__ = ["Published"]


class Published(MethodConfig):
    """A configuration whose published set-ups stand in a file of this folder."""

    preset_file: ClassVar[str] = ""
    """Name of the file, without its ending; empty where nothing was published for the method itself."""

    hparams_table: ClassVar[HparamsTable | None] = None
    """How files of other tools are read; of the class itself, never inherited."""

    @classmethod
    def read_hparams(cls, algorithm: str | None, values: Mapping[str, Any]) -> Translation | None:
        """Read the values of another tool's hyper-parameter file; see the base."""
        table = cls.__dict__.get("hparams_table")
        return None if table is None else table.read(algorithm, values)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published set-ups of the method."""
        if not cls.preset_file:
            return {}
        text = (files("kecore_methods.presets") / f"{cls.preset_file}.json").read_text(encoding="utf-8")
        presets: dict[str, Preset] = {}
        for name, entry in json.loads(text).items():
            model = ModelShape(**entry["model"]) if "model" in entry else None
            presets[name] = Preset(entry["fields"], entry["source"], tuple(entry["differs"]), model)
        return presets
