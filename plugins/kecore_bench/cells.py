"""A plan's runs, each with its records: what there is to do, in order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from kecore.api import registry
from kecore.api.errors import ConfigError, MethodNotFoundError, StorageError
from kecore.api.method import EditMethod
from kecore.api.requirements import missing_examples, missing_training
from kecore.api.types import EditRecord
from kecore.editor import configured
from kecore.evaluate.protocol import AFTER, Protocol
from kecore.evaluate.records import RecordSet, Skipped, load_records
from kecore.trained import TRAINED, TrainedEditor
from kecore_bench.plan import BASELINES, UNEDITED, BenchPlan, DataEntry, MethodEntry
from kecore_bench.references import with_references
from kecore_bench.store import BEFORE, RunSpec, Store

__all__ = ["Cell", "cells_of", "load"]


@dataclass(frozen=True)
class Cell:
    """A run with its records.

    Args:
        spec: what it is.
        records: its records, in order.
        left_out: records of the file that could not be represented, and why.
        absent: the method is a baseline that is not installed.
        edit: file of an edit that was made before.
    """

    spec: RunSpec
    records: Sequence[EditRecord]
    left_out: Sequence[Skipped] = ()
    absent: bool = False
    edit: Path | None = None

    def missing(self, store: Store) -> bool:
        """Whether there is anything left to do."""
        if self.absent:
            return not store.failures(self.spec.key)
        return any(len(store.done(self.spec.key, m)) < n for m, n in self.wanted(store.protocol).items())

    def wanted(self, protocol: Protocol) -> dict[str, int]:
        """Number of records of each moment."""
        size = len(self.records)
        if self.absent:
            return {}
        if self.spec.method is None:
            return {BEFORE if self.edit is None else AFTER: size}
        found = dict.fromkeys(protocol.moments, size)
        if protocol.edits == "sequential":
            found |= {name: step * protocol.step for step, name in protocol.checkpoints(size).items()}
        return found


def load(data: DataEntry, limit: int | None = None) -> RecordSet:
    """The records of a data set of a plan; see :func:`kecore.load_records`."""
    return load_records(
        data.path, limit=limit, format=data.format, split=data.split, variant=data.variant, sha256=data.sha256
    )


def cells_of(plan: BenchPlan) -> list[Cell]:
    """The runs of a plan, in the order that they are run and reported.

    Raises:
        MethodNotFoundError: a method that was asked for is not installed; a baseline that is not is a run that says so.
        UnsupportedCapabilityError: a method needs training or examples, and the plan names none.
        ConfigError: a bad field or an unknown preset.
        ArtifactError: a trained editor cannot be read.
        DataFormatError: a data set cannot be read.
        StorageError: the edit to be scored cannot be read.
    """
    found: list[Cell] = []
    methods = [(entry, _resolved(entry, plan)) for entry in plan.rows]
    sets = [_records(plan, data, size) for data in plan.facts for size in plan.sizes or (None,)]
    for model in plan.models:
        for records in sets:
            shared: dict[str, Any] = {
                "model": model,
                "data": _told(records, plan),
                "size": len(records),
                "loading": {"dtype": plan.dtype, "trust_remote_code": plan.trust_remote_code},
            }
            left_out = records.skipped
            if UNEDITED not in plan.without:
                found.append(Cell(RunSpec(label=UNEDITED, method=None, **shared), records, left_out))
            if plan.edit is not None:
                file = plan.edit / "edit.safetensors" if plan.edit.is_dir() else plan.edit
                spec = RunSpec(label=_stem(plan.edit), method=None, edit=_digest(file), **shared)
                found.append(Cell(spec, records, left_out, edit=file))
            for entry, needs in methods:
                spec = RunSpec(label=entry.title, **(needs or {"method": entry.name}), **shared)
                found.append(Cell(spec, records, left_out, absent=needs is None))
    return found


def _records(plan: BenchPlan, data: DataEntry, limit: int | None) -> RecordSet:
    records = load(data, limit)
    if plan.references is None:
        return records
    return replace(records, records=tuple(with_references(records, plan.references)))


def _told(records: RecordSet, plan: BenchPlan) -> dict[str, str]:
    """What tells a data set, as it is scored, from others."""
    parts = {"split": records.split, "variant": records.variant}
    if plan.references is not None:
        texts = json.dumps([_references(record) for record in records], ensure_ascii=False)
        parts["references"] = sha256(texts.encode()).hexdigest()
    told = {"name": records.path.name, "sha256": records.sha256, "format": records.format}
    return told | {name: value for name, value in parts.items() if value}


def _references(record: EditRecord) -> tuple[str, ...]:
    generation = record.probes_of("generation")
    return generation[0].answers if generation else ()


def _stem(path: Path) -> str:
    return path.resolve().parent.name if path.name == "edit.safetensors" else path.stem


def _digest(file: Path) -> dict[str, str]:
    try:
        return {"name": file.name, "sha256": sha256(file.read_bytes()).hexdigest()}
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from None


def _resolved(entry: MethodEntry, plan: BenchPlan) -> dict[str, Any] | None:
    """What decides a method's answers, as fields of a :class:`RunSpec`; None for a baseline that is not installed."""
    try:
        method = registry.default_registry().get(entry.name)
    except MethodNotFoundError:
        if entry.name not in BASELINES:
            raise
        return None
    needs, given = method.capabilities, dict[str, Any]()
    trained = _trained(method, plan)
    if needs.needs_training:
        given["trained"] = [_digest(path / TRAINED if path.is_dir() else path)["sha256"] for path in trained]
    if needs.needs_examples:
        if plan.examples is None:
            raise missing_examples(method.name)
        given["examples"] = load(plan.examples).sha256
    statistics = None
    if needs.needs_statistics:
        texts = {"text": [Path(text).name for text in plan.text], "tokens": plan.tokens}
        statistics = texts if plan.stats is None else {"saved": plan.stats.name}
    editor = next(iter(trained.values()), None)
    config = configured(method, entry.preset, entry.set, editor).to_json()
    return {"method": method.name, "config": config, "statistics": statistics, "given": given or None}


def _trained(method: type[EditMethod], plan: BenchPlan) -> dict[Path, TrainedEditor]:
    """The plan's trained editors of a method, one a model, which must agree on the configuration."""
    every = {path: TrainedEditor.load(path) for path in plan.trained}
    found = {path: editor for path, editor in every.items() if editor.method == method.name}
    if method.capabilities.needs_training and not found:
        raise missing_training(method.name)
    if any(editor.config != other.config for editor in found.values() for other in found.values()):
        raise ConfigError(
            f"the trained editors of '{method.name}' have different configurations, so their results do not belong "
            "into one row; run them one by one"
        )
    return found
