"""What a method may see of a model: layers, value projections, and ways to run it in pieces."""

from kecore.model_view.identity import DTYPES, Fingerprint, Identity, type_name
from kecore.model_view.linear import LinearView
from kecore.model_view.view import LayerView, ModelView

__all__ = ["DTYPES", "Fingerprint", "Identity", "LayerView", "LinearView", "ModelView", "type_name"]
