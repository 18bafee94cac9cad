"""Set-ups that were published for the methods of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, ClassVar

from kecore.api.config import MethodConfig

__all__ = ["Published"]


class Published(MethodConfig):
    """A configuration whose presets stand in ``presets.json``."""

    preset_key: ClassVar[str] = ""
    """The method's set-ups in the file; empty where none was published for the method itself."""

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return the published set-ups of the method; ``_source`` in the file says whose each is."""
        text = (files("kecore_methods.locate") / "presets.json").read_text(encoding="utf-8")
        presets = json.loads(text).get(cls.preset_key, {})
        for fields in presets.values():
            fields.pop("_source", None)
        return presets
