"""Edits as files that other programs serve, and the proof that they do what the edit does.

:func:`export_edits` writes an adapter for peft, vLLM and SGLang, a checkpoint, or files for llama.cpp and Ollama;
:func:`verify_export` loads what was written with the foreign library, in a process without kecore.
"""

from __future__ import annotations

from kecore.serving.gguf_file import TENSOR_TYPES
from kecore.serving.targets import TARGETS, Export, export_edits
from kecore.serving.verify import ScoreDrop, Verification, score_drop, verify_export

__all__ = [
    "TARGETS",
    "TENSOR_TYPES",
    "Export",
    "ScoreDrop",
    "Verification",
    "export_edits",
    "score_drop",
    "verify_export",
]
