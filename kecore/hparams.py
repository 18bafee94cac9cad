"""Reads the hyper-parameter files of EasyEdit (YAML) and of the MEMIT family (JSON) as they are."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kecore.api import registry
from kecore.api.errors import ConfigError, DataFormatError, KecoreWarning
from kecore.api.hparams import Hparams, Translation
from kecore.api.line import MethodLine
from kecore.api.method import EditMethod

__all__ = ["read_hparams"]

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_NONE = ("None", "none", "null")
_ALGORITHM = ("alg_name", "alg")
_MOST = 1 << 20  # bytes; a file of settings is a thousandth of it
_FILES = "a hyper-parameter file of EasyEdit (.yaml) or of the MEMIT family (.json)"


def read_hparams(path: str | Path, method: str | None = None) -> Hparams:
    """Read a hyper-parameter file of another editing tool.

    Args:
        path: a YAML file of EasyEdit, or a JSON file of ROME, MEMIT, AlphaEdit and their relatives.
        method: the method that is to be configured, with stages behind it or without; by default the one that the
            file's ``alg_name``, or else the name of its folder, stands for.

    Returns:
        What the file sets here, and what becomes of each of its keys.

    Raises:
        DataFormatError: it is no such file, or does not say for which algorithm it is.
        ConfigError: it is for another method than ``method``, or a value is not possible.
        MethodNotFoundError: there is no such method.
    """
    path = Path(path)
    values = _read_values(path)
    algorithm = _algorithm(values, path)
    if method is None:
        name, translation = _find_method(path, algorithm, values)
        method_class = registry.default_registry().get(name)
    else:
        method_class = MethodLine.of(method).method
        translation = _translate_for(method_class, path, algorithm, values)
    model = values.get("model_name")
    hparams = Hparams(
        path=str(path),
        algorithm=algorithm or method_class.name,
        method=method or method_class.name,
        model=model if isinstance(model, str) else None,
        rows=translation.rows,
        implied=translation.implied,
    )
    try:
        method_class.Config.make(hparams.fields)
    except ConfigError as error:
        taken = ", ".join(f"{row.key} as {'/'.join(row.fields)}" for row in hparams.with_outcome("taken"))
        raise ConfigError(f"{path}: {error} (read are {taken})") from None
    return hparams


def _read_values(path: Path) -> dict[str, Any]:
    """Return what a file holds, with nested keys joined by dots.

    Raises:
        DataFormatError: it cannot be read, or is no mapping of names to values.
    """
    if not path.is_file():
        raise DataFormatError(f"there is no file {path}; name {_FILES}")
    if path.stat().st_size > _MOST:
        raise DataFormatError(f"{path} has {path.stat().st_size} bytes, too many for {_FILES}")
    import yaml  # pyright: ignore[reportMissingModuleSource] - its stubs are no dependency

    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataFormatError(f"{path} is not {_FILES}: {error}") from None
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise DataFormatError(f"{path} is not {_FILES}: it holds no names with values")
    return _flat(values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dots between keys, and numbers that YAML reads as texts as numbers."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    """Return ``"5e-4"`` as a number and ``"None"`` as None: YAML 1.1 reads both as texts."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return None if isinstance(value, str) and value in _NONE else value


def _algorithm(values: Mapping[str, Any], path: Path) -> str | None:
    """Return what a file calls its algorithm; else the folder's name, as in ``hparams/MEMIT/gpt2-xl.json``."""
    for key in _ALGORITHM:
        if isinstance(values.get(key), str):
            return values[key]
    folder = path.resolve().parent.name
    return folder if folder and _readers(folder, values) else None


def _readers(algorithm: str, values: Mapping[str, Any]) -> dict[str, Translation]:
    """Return the readings of every method that knows the algorithm, by the methods' names."""
    readings: dict[str, Translation] = {}
    known = registry.default_registry()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)  # a method that cannot be used is said where methods are listed
        for info in known.describe():
            if info.error:
                continue
            translation = known.get(info.name).Config.read_hparams(algorithm, values)
            if translation is not None:
                readings[info.name] = translation
    return readings


def _find_method(path: Path, algorithm: str | None, values: Mapping[str, Any]) -> tuple[str, Translation]:
    """Return the one method that reads a file, and its reading."""
    if algorithm is None:
        raise DataFormatError(
            f"{path} does not say for which algorithm it is (alg_name, or the name of its folder); name the method"
        )
    readings = _readers(algorithm, values)
    if not readings:
        raise DataFormatError(
            f"{path} is for '{algorithm}', whose files no method here reads; `kecore methods` lists the methods"
        )
    if len(readings) > 1:
        raise DataFormatError(f"{path} is for '{algorithm}', which {', '.join(readings)} read; name the method")
    return next(iter(readings.items()))


def _translate_for(
    method: type[EditMethod], path: Path, algorithm: str | None, values: Mapping[str, Any]
) -> Translation:
    """Return a method's reading of a file.

    Raises:
        ConfigError: the file is for another method.
        DataFormatError: the method reads no such files.
    """
    translation = method.Config.read_hparams(algorithm, values)
    if translation is not None:
        return translation
    if method.Config.read_hparams(None, values) is None:
        raise DataFormatError(f"'{method.name}' reads no files of other tools; set its fields one by one")
    others = ", ".join(_readers(algorithm or "", values)) or "no method here"
    raise ConfigError(f"{path} is for '{algorithm}', which is {others}, not for '{method.name}'")
