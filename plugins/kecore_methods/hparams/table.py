"""Tables from the keys of hyper-parameter files to the fields of a method, and the readers that they are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.hparams import HparamsRow, Outcome, Translation

__all__ = ["HparamsTable", "Reader", "differs", "elsewhere", "fits", "missing", "modules", "same", "takes", "unused"]

Reader = Callable[[str, Any, Mapping[str, Any]], HparamsRow]
"""From a key, its value and all values of the file to what becomes of it."""

_LAYER = re.compile(r"[.\[](\d+)[.\]]")


def _always(outcome: Outcome, remark: str) -> Reader:
    return lambda key, value, _values: HparamsRow(key, value, outcome, remark=remark)


def same(remark: str) -> Reader:
    """Read a key that says what kecore does anyway."""
    return _always("same", remark)


def elsewhere(remark: str) -> Reader:
    """Read a key whose matter is said in another place."""
    return _always("elsewhere", remark)


def unused(remark: str = "not read when facts are edited") -> Reader:
    """Read a key that has no effect on an edit in the released code either."""
    return _always("unused", remark)


def differs(remark: str) -> Reader:
    """Read a key that has an effect there that kecore cannot give."""
    return _always("differs", remark)


def missing(remark: str) -> Reader:
    """Read a key of something that kecore does not have."""
    return _always("missing", remark)


def takes(name: str, convert: Callable[[Any], Any] | None = None, *, remark: str = "") -> Reader:
    """Read a key into a field.

    Args:
        name: the field.
        convert: from the file's value to the field's; the value itself if left out.
        remark: what is to be said of it.
    """

    def read(key: str, value: Any, _values: Mapping[str, Any]) -> HparamsRow:
        return HparamsRow(key, value, "taken", {name: value if convert is None else convert(value)}, remark)

    return read


def fits(value: Any, otherwise: str, remark: str = "") -> Reader:
    """Read a key of which kecore can give one value only.

    Args:
        value: that value.
        otherwise: what is said of any other.
        remark: what is said of that value.
    """

    def read(key: str, found: Any, _values: Mapping[str, Any]) -> HparamsRow:
        if found == value:
            return HparamsRow(key, found, "same", remark=remark)
        return HparamsRow(key, found, "differs", remark=otherwise)

    return read


def modules(
    name: str, *, many: bool = False, value: Sequence[str] = ("down_proj", "c_proj", "fc_out"), remark: str
) -> Reader:
    """Read names of weights, such as ``model.layers[27].mlp.down_proj.weight``, into layers.

    Args:
        name: the field that takes the layers.
        many: the field takes several layers; otherwise one.
        value: last parts of the names of value projections, the only weights that the field can mean.
        remark: what is said where other weights are named too.
    """

    def read(key: str, names: Any, _values: Mapping[str, Any]) -> HparamsRow:
        paths = [names] if isinstance(names, str) else list(names)
        layers = sorted({layer_of(path, key) for path in paths})
        fields: dict[str, Any] = {name: layers if many else layers[-1]}
        others = [path for path in paths if module_of(path) not in value]
        if others or (not many and len(layers) > 1):
            return HparamsRow(key, names, "differs", fields, remark)
        return HparamsRow(key, names, "taken", fields)

    return read


def layer_of(path: Any, key: str) -> int:
    """Return the layer that a weight's name tells.

    Raises:
        DataFormatError: it tells none.
    """
    match = _LAYER.search(path) if isinstance(path, str) else None
    if match is None:
        raise DataFormatError(f"'{key}' has to name weights of layers, such as model.layers.27.mlp.down_proj.weight")
    return int(match[1])


def module_of(path: str) -> str:
    """Return the last part of a module's or its weight's name: ``down_proj``."""
    return path.removesuffix(".weight").rpartition(".")[2]


_EVERYWHERE: dict[str, Reader] = {
    "alg_name": same("the method"),
    "alg": same("the method"),
    "model_name": elsewhere("MODEL"),
    "model_class": elsewhere("found by structure"),
    "tokenizer_class": elsewhere("found by structure"),
    "tokenizer_name": elsewhere("comes with MODEL"),
    "device": elsewhere("--device"),
    "model_parallel": elsewhere("--device"),
    "fp16": elsewhere("--dtype"),
    "half": elsewhere("--dtype"),
    "bf16": elsewhere("--dtype"),
    "seed": elsewhere("--seed"),
    "results_dir": elsewhere("--out"),
    "use_chat_template": elsewhere("--chat"),
    "max_length": differs("texts are not cut"),
    "silent": unused(),
    "verbose": unused(),
    "debug": unused(),
}


@dataclass(frozen=True)
class HparamsTable:
    """How the files of one algorithm are read.

    Args:
        algorithms: what they call it, in any case.
        keys: a reader for each key.
        implied: fields that the released code fixes without naming them in its files.
        applies: whether a file of that algorithm is for this method, where several share a name.
    """

    algorithms: tuple[str, ...]
    keys: Mapping[str, Reader]
    implied: Mapping[str, Any] = field(default_factory=dict)
    applies: Callable[[Mapping[str, Any]], bool] = lambda _values: True

    def read(self, algorithm: str | None, values: Mapping[str, Any]) -> Translation | None:
        """Return what becomes of each key; None if the file is for another method.

        Args:
            algorithm: what the file calls its algorithm; None takes the file as one for this method.
            values: its values.
        """
        if algorithm is not None:
            known = {name.casefold() for name in self.algorithms}
            if algorithm.casefold() not in known or not self.applies(values):
                return None
        rows: list[HparamsRow] = []
        for key, value in values.items():
            reader = self.keys.get(key) or _EVERYWHERE.get(key)
            if reader is None:
                rows.append(HparamsRow(key, value, "unknown", remark="no key of this algorithm that is known"))
            else:
                rows.append(self._read(reader, key, value, values))
        return Translation(tuple(rows), self.implied)

    @staticmethod
    def _read(reader: Reader, key: str, value: Any, values: Mapping[str, Any]) -> HparamsRow:
        """Read one key.

        Raises:
            DataFormatError: its value is of another kind than such files have.
        """
        try:
            return reader(key, value, values)
        except (TypeError, ValueError, IndexError) as error:
            raise DataFormatError(f"'{key}' is {value!r}, which no such file has: {error}") from None
