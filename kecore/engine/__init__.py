"""The building blocks of locate-then-edit methods; every closed-form method is made of these.

What a method or a stage of another package needs can be imported from here; each name loads when first used.
``docs/write-a-method.md`` and ``docs/write-a-stage.md`` use them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kecore.engine.accumulate import Past
    from kecore.engine.closed_form import ClosedForm, Solve
    from kecore.engine.config import BatchConfig, LocateConfig
    from kecore.engine.keys import KeyPass, Keys, Prompts
    from kecore.engine.layers import at_depth
    from kecore.engine.post import EditedSite, Post
    from kecore.engine.solve import least_squares, one_by_one
    from kecore.engine.spread import AnchorResiduals, Evenly, Residuals, Spread
    from kecore.engine.target import Target
    from kecore.engine.value_steps import Coupling, ValueSettings

_HOME = {
    "AnchorResiduals": "spread",
    "BatchConfig": "config",
    "ClosedForm": "closed_form",
    "Coupling": "value_steps",
    "EditedSite": "post",
    "Evenly": "spread",
    "KeyPass": "keys",
    "Keys": "keys",
    "LocateConfig": "config",
    "Past": "accumulate",
    "Post": "post",
    "Prompts": "keys",
    "Residuals": "spread",
    "Solve": "closed_form",
    "Spread": "spread",
    "Target": "target",
    "ValueSettings": "value_steps",
    "at_depth": "layers",
    "least_squares": "solve",
    "one_by_one": "solve",
}

__all__ = [
    "AnchorResiduals",
    "BatchConfig",
    "ClosedForm",
    "Coupling",
    "EditedSite",
    "Evenly",
    "KeyPass",
    "Keys",
    "LocateConfig",
    "Past",
    "Post",
    "Prompts",
    "Residuals",
    "Solve",
    "Spread",
    "Target",
    "ValueSettings",
    "at_depth",
    "least_squares",
    "one_by_one",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
