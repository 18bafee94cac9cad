"""What a method may see of a model: layers, value projections, and ways to run it in pieces."""

from kecore.model.linear import LinearView
from kecore.model.view import LayerView, ModelView

__all__ = ["LayerView", "LinearView", "ModelView"]
