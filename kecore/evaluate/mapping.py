"""Says which field of a file is which field of a fact, as ``prompt=question,target=answer``; by hand or in a file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kecore.api.errors import ConfigError, DataFormatError
from kecore.evaluate.own_layout import FIELDS
from kecore.evaluate.written import as_text
from kecore.files import write_atomic

__all__ = ["CONFIG", "FieldMap", "read_map", "save_map"]

CONFIG = "kecore.toml"
"""The file beside facts that keeps how their fields are read."""

_NEEDED = ("prompt", "target")
_PART = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True, slots=True)
class FieldMap:
    """How the fields of a file become those of kecore's own layout.

    Args:
        sources: field of the own layout to a field of the file, which may lie deeper (``answer.text``,
            ``answers.0``), or to a text with such fields in braces (``Where is {name}?``). One without braces that is
            no field of the file is refused.

    Raises:
        ConfigError: there is no such field in kecore's own layout.
    """

    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        for field, source in self.sources.items():
            if not isinstance(source, str):  # pyright: ignore[reportUnnecessaryIsInstance] - of a caller without types
                raise ConfigError(f"a map gives texts by field, got {field!r}: {source!r:.80}")
        known = [field for field in FIELDS if field != "target_new"]
        for field in self.sources:
            if field not in known:
                raise ConfigError(
                    f"a map names the fields of a fact, and '{field}' is none; they are: {', '.join(known)}"
                )

    @classmethod
    def of(cls, texts: Sequence[str]) -> FieldMap:
        """Read ``prompt=question,target=answer``; each text may hold several pairs, or one that has a comma in it.

        Raises:
            ConfigError: a text is no such pair, or a field is given twice.
        """
        sources: dict[str, str] = {}
        for text in texts:
            for pair in re.split(r",(?=\s*\w+\s*=)", text):
                field, equals, source = pair.partition("=")
                if not equals or not field.strip() or not source.strip():
                    raise ConfigError(f"--map takes FIELD=NAME, such as prompt=question,target=answer; got '{pair}'")
                if field.strip() in sources:
                    raise ConfigError(f"--map gives '{field.strip()}' twice")
                sources[field.strip()] = source.strip()
        return cls(sources)

    def fits(self, value: object) -> bool:
        """Return whether an object has the fields of prompt and target."""
        if not isinstance(value, Mapping):
            return False
        values = cast("Mapping[str, Any]", value)
        sources = [self.sources[field] for field in _NEEDED if field in self.sources]
        names = [name for source in sources for name in _PART.findall(source) or [source]]
        return all(_at(values, name) is not None for name in names)

    def apply(self, value: object, where: str) -> dict[str, Any]:
        """Return an object with the mapped fields under their own names, and those that are not mapped as they are.

        Raises:
            DataFormatError: it is no object, or the field of prompt or target is not there; names those that are.
                Others may be missing, as an empty cell is.
        """
        if not isinstance(value, Mapping):
            raise DataFormatError(f"{where}: expected an object, got {type(value).__name__}: {value!r:.80}")
        values = cast("Mapping[str, Any]", value)
        mapped: dict[str, Any] = {}
        used: set[str] = set()
        for field, source in self.sources.items():
            names = _PART.findall(source)
            found = {name: _at(values, name) for name in names or [source]}
            absent = next((name for name, part in found.items() if part is None), None)
            used |= {name if name in values else name.partition(".")[0] for name in found}
            if absent is not None:
                if field in _NEEDED:
                    there = ", ".join(map(str, values)) or "none"
                    raise DataFormatError(
                        f"{where}: the map names '{absent}', which is not there (fields here: {there})"
                    )
                continue
            if not names:
                mapped[field] = found[source]
                continue
            texts = {name: as_text(part) for name, part in found.items()}
            without = [name for name, text in texts.items() if text is None]
            if without:
                raise DataFormatError(f"{where}: field '{without[0]}' is no text, and cannot stand in {source!r}")
            mapped[field] = _PART.sub(lambda match, texts=texts: cast(str, texts[match[1]]), source)
        # What the map names under its own name again, or says another thing of, is not read twice.
        others = {name: field for name, field in values.items() if name not in used and name not in mapped}
        return {**others, **mapped}


def _at(values: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, None where there is none; a field whose own name has dots comes first."""
    if path in values:
        return values[path]
    here: Any = values
    for name in path.split("."):
        if isinstance(here, Mapping) and name in here:
            here = cast("Mapping[str, Any]", here)[name]
        elif isinstance(here, list) and name.isdecimal() and int(name) < len(cast("list[Any]", here)):
            here = here[int(name)]
        else:
            return None
    return here


def read_map(source: Path) -> FieldMap | None:
    """Return the map that the ``kecore.toml`` beside a file keeps for it; None where there is none.

    Raises:
        ConfigError: the file is no TOML, or holds something else.
    """
    config = source.parent / CONFIG
    if not config.is_file():
        return None
    try:
        values: Any = _load_toml(config.read_text(encoding="utf-8"))
    except ValueError as error:  # an encoding's too
        raise ConfigError(f"{config} is not TOML ({error}); mend it, or remove it") from None
    entry: Any = values
    for name in ("facts", source.name, "map"):
        if name not in entry:
            return None
        entry = entry[name]
        if not isinstance(entry, dict):
            raise ConfigError(f"{config}: '{name}' must be a table, got {entry!r:.80}")
    sources = cast("dict[str, Any]", entry)
    for field, name in sources.items():
        if not isinstance(name, str):
            raise ConfigError(f"{config}: the map of {source.name} must give texts, got {field} = {name!r:.80}")
    return FieldMap(sources)


def save_map(source: Path, field_map: FieldMap) -> Path:
    """Keep a file's map in the ``kecore.toml`` beside it; everything else of that file stays as it is.

    Returns:
        The written file.

    Raises:
        ConfigError: the file is no TOML, or says the map in a form that cannot be replaced safely.
    """
    config = source.parent / CONFIG
    head = f"[facts.{json.dumps(source.name, ensure_ascii=False)}.map]"
    entry = [head, *(f"{field} = {json.dumps(name)}" for field, name in field_map.sources.items())]
    text = ""
    if config.is_file():
        read_map(source)  # refuses what is no TOML
        text = config.read_text(encoding="utf-8")
    lines = text.splitlines()
    begin = lines.index(head) if head in lines else len(lines)
    end = next((index for index in range(begin + 1, len(lines)) if lines[index].startswith("[")), len(lines))
    kept = [*lines[:begin], *lines[end:]]
    if kept and kept[-1]:
        kept.append("")
    written = "\n".join([*kept, *entry]) + "\n"
    if not _says_the_same(text, written, source.name, field_map):
        raise ConfigError(f"{config} has a form that cannot be extended safely; add these lines by hand: {entry}")

    def write(path: Path) -> None:
        path.write_text(written, encoding="utf-8")

    return write_atomic(config, write)


def _says_the_same(old: str, new: str, name: str, field_map: FieldMap) -> bool:
    """Return whether a new text of a ``kecore.toml`` gives one file's map, and all else as the old text does."""
    try:
        before, after = _load_toml(old), _load_toml(new)
        saved = after["facts"][name].pop("map")
        before.setdefault("facts", {}).setdefault(name, {}).pop("map", None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return saved == dict(field_map.sources) and before == after


def _load_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports] - of Python 3.10
    return tomllib.loads(text)
