"""kecore edits facts inside large language models without retraining.

    >>> from kecore import Editor, EditRequest                                              # doctest: +SKIP
    >>> editor = Editor.from_pretrained("demo")                                             # doctest: +SKIP
    >>> edit = editor.edit(EditRequest("{} is the capital of", "Paris", "Italy"))           # doctest: +SKIP
    >>> path = edit.save("paris")                                                           # doctest: +SKIP

Importing this package imports neither transformers nor any method; each name below loads when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kecore._version import __version__

if TYPE_CHECKING:
    from kecore.api.config import MethodConfig
    from kecore.api.errors import KecoreError, KecoreWarning
    from kecore.api.method import METHOD_API, EditMethod, MethodContext
    from kecore.api.progress import ProgressBar
    from kecore.api.types import Capabilities, EditRecord, EditRequest, Probe
    from kecore.batch import RequestBatch
    from kecore.catalogue import methods
    from kecore.corpus import Corpus
    from kecore.edit import Edit, LowRank, ModuleEdit, PromptEdit, WeightEdit, attached, load_edit, merge
    from kecore.editor import Editor
    from kecore.evaluate import Protocol, load_records
    from kecore.hparams import read_hparams
    from kecore.model import ModelView
    from kecore.models import load_model, save_model
    from kecore.statistics import KeyStatistics, collect_statistics, export_statistics, import_statistics
    from kecore.text import Encoder
    from kecore.trained import TrainedEditor
    from kecore.training import Schedule

_HOME = {
    "METHOD_API": "kecore.api.method",
    "Capabilities": "kecore.api.types",
    "Corpus": "kecore.corpus",
    "Edit": "kecore.edit",
    "EditMethod": "kecore.api.method",
    "EditRecord": "kecore.api.types",
    "EditRequest": "kecore.api.types",
    "Editor": "kecore.editor",
    "Encoder": "kecore.text",
    "KecoreError": "kecore.api.errors",
    "KecoreWarning": "kecore.api.errors",
    "KeyStatistics": "kecore.statistics",
    "LowRank": "kecore.edit",
    "MethodConfig": "kecore.api.config",
    "MethodContext": "kecore.api.method",
    "ModelView": "kecore.model",
    "ModuleEdit": "kecore.edit",
    "Probe": "kecore.api.types",
    "PromptEdit": "kecore.edit",
    "ProgressBar": "kecore.api.progress",
    "Protocol": "kecore.evaluate",
    "RequestBatch": "kecore.batch",
    "Schedule": "kecore.training",
    "TrainedEditor": "kecore.trained",
    "WeightEdit": "kecore.edit",
    "attached": "kecore.edit",
    "collect_statistics": "kecore.statistics",
    "export_statistics": "kecore.statistics",
    "import_statistics": "kecore.statistics",
    "load_edit": "kecore.edit",
    "load_model": "kecore.models",
    "load_records": "kecore.evaluate",
    "merge": "kecore.edit",
    "methods": "kecore.catalogue",
    "read_hparams": "kecore.hparams",
    "save_model": "kecore.models",
}

__all__ = [
    "METHOD_API",
    "Capabilities",
    "Corpus",
    "Edit",
    "EditMethod",
    "EditRecord",
    "EditRequest",
    "Editor",
    "Encoder",
    "KecoreError",
    "KecoreWarning",
    "KeyStatistics",
    "LowRank",
    "MethodConfig",
    "MethodContext",
    "ModelView",
    "ModuleEdit",
    "Probe",
    "ProgressBar",
    "PromptEdit",
    "Protocol",
    "RequestBatch",
    "Schedule",
    "TrainedEditor",
    "WeightEdit",
    "__version__",
    "attached",
    "collect_statistics",
    "export_statistics",
    "import_statistics",
    "load_edit",
    "load_model",
    "load_records",
    "merge",
    "methods",
    "read_hparams",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kecore' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
