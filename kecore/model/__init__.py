"""What a method may see of a model: layers, the places where they map keys to values, and ways to run it in pieces."""

from kecore.model.layer import LayerView, ValueSite
from kecore.model.linear import LinearView
from kecore.model.sites import Beside, Key, ModuleInput, ModuleOutput, Output, SiteId, Start, Value
from kecore.model.view import ModelView, Pass

__all__ = [
    "Beside",
    "Key",
    "LayerView",
    "LinearView",
    "ModelView",
    "ModuleInput",
    "ModuleOutput",
    "Output",
    "Pass",
    "SiteId",
    "Start",
    "Value",
    "ValueSite",
]
