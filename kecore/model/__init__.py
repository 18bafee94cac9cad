"""What a method may see of a model: layers, value projections, and ways to run it in pieces."""

from kecore.model.layer import LayerView
from kecore.model.linear import LinearView
from kecore.model.sites import Beside, Key, ModuleOutput, Output, Start, Value
from kecore.model.view import ModelView, Pass

__all__ = [
    "Beside",
    "Key",
    "LayerView",
    "LinearView",
    "ModelView",
    "ModuleOutput",
    "Output",
    "Pass",
    "Start",
    "Value",
]
