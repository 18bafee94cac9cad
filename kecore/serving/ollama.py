"""The file from which Ollama makes a model of its own."""

from __future__ import annotations

from pathlib import Path

from kecore.api.errors import ConfigError

__all__ = ["MODELFILE", "write_modelfile"]

MODELFILE = "Modelfile"


def write_modelfile(folder: Path, model: str | Path, adapter: str | None = None) -> None:
    """Write a Modelfile; the prompt template and special tokens are read from the GGUF file's own metadata.

    Args:
        folder: where it is written.
        model: the model's file, beside the Modelfile or by its whole path.
        adapter: name of an adapter's file beside the Modelfile.

    Raises:
        ConfigError: a Modelfile cannot hold the path.
    """
    if "\n" in str(model) or '"' in str(model):
        raise ConfigError(f"a Modelfile cannot name {str(model)!r}; move the file to a plain path")
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
