"""Small data that ships with kecore, for demonstrations, tests and statistics without a download.

``README.md`` beside this file names sources and licences.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from kecore.api.errors import DataFormatError

__all__ = ["TEXT", "path"]

TEXT = "wikipedia_sample.jsonl.gz"
"""The text that key statistics are collected from where nobody names another."""

_NAMES = ("counterfact_sample.jsonl", TEXT, "relation_templates.json", "measured.json")


def path(name: str) -> Path:
    """Where a bundled file lies.

    Args:
        name: ``counterfact_sample.jsonl`` (60 records), ``wikipedia_sample.jsonl.gz`` (articles as
            ``{"title", "text"}``), ``relation_templates.json`` (prompts of 85 relations), or ``measured.json`` (what
            methods scored and cost, which ``docs/_measured.py`` writes).

    Raises:
        DataFormatError: no such file is bundled.

    Examples:
        >>> path("counterfact_sample.jsonl").name
        'counterfact_sample.jsonl'
    """
    if name not in _NAMES:
        raise DataFormatError(f"no bundled data set is called '{name}'; there are: {', '.join(_NAMES)}")
    # kecore is always installed unpacked (it carries compiled code), so the resource is a plain file.
    return Path(str(files(__name__) / name))
