"""What a method may see of a model: layers, the places where they map keys to values, and ways to run it in pieces."""

from kecore.model.experts import ExpertsView, Routing
from kecore.model.layer import BlockView, LayerView, ValueSite
from kecore.model.linear import LinearView, MatrixName
from kecore.model.sites import Beside, Key, ModuleInput, ModuleOutput, Output, Routed, SiteId, Start, Value
from kecore.model.view import ModelView, Pass

__all__ = [
    "Beside",
    "BlockView",
    "ExpertsView",
    "Key",
    "LayerView",
    "LinearView",
    "MatrixName",
    "ModelView",
    "ModuleInput",
    "ModuleOutput",
    "Output",
    "Pass",
    "Routed",
    "Routing",
    "SiteId",
    "Start",
    "Value",
    "ValueSite",
]
