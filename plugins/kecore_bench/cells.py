"""A plan's runs, each with its records: what there is to do, in order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from kecore.api.errors import ConfigError, MethodNotFoundError, StorageError
from kecore.api.line import MethodLine
from kecore.api.requirements import check_given
from kecore.api.types import EditRecord
from kecore.evaluate.protocol import AFTER, Protocol
from kecore.evaluate.records import RecordSet, Skipped, load_records
from kecore.facts import without_overlap
from kecore.hub import EDIT, TRAINED, artifact_file
from kecore.trained import TrainedEditor
from kecore_bench.plan import BASELINES, UNEDITED, BenchPlan, DataEntry, MethodEntry
from kecore_bench.references import with_references
from kecore_bench.store import BEFORE, RunSpec, Store

__all__ = ["Cell", "cells_of", "examples_of", "load"]


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
        """Return whether there is anything left to do."""
        if self.absent:
            return not store.failures(self.spec.key)
        for moment, count in self.wanted(store.protocol).items():
            if len(store.done(self.spec.key, moment)) < count:
                return True
        return False

    def wanted(self, protocol: Protocol) -> dict[str, int]:
        """Return the number of records to be scored at each moment."""
        return {moment: len(positions) for moment, positions in self.positions(protocol).items()}

    def positions(self, protocol: Protocol) -> dict[str, list[int]]:
        """Return the positions of the records to be scored at each moment, ascending."""
        size = len(self.records)
        if self.absent:
            return {}
        if protocol.edits != "sequential":
            moments = protocol.moments
            if self.spec.method is None:
                moments = (BEFORE if self.edit is None else AFTER,)
            return {moment: list(range(size)) for moment in moments}
        positions = {moment: protocol.drawn(size) for moment in protocol.moments}
        for step, moment in protocol.checkpoints(size).items():
            positions[moment] = protocol.drawn(step * protocol.step)
        if self.spec.method is None:  # the unedited model is compared with at all moments
            positions = {BEFORE: sorted(set(chain.from_iterable(positions.values())))}
        return positions


def load(data: DataEntry, limit: int | None = None) -> RecordSet:
    """Return the records of a data set of a plan; see :func:`kecore.load_records`."""
    return load_records(
        data.path,
        limit=limit,
        format=data.format,
        split=data.split,
        variant=data.variant,
        sha256=data.sha256,
        mapping=data.map,
    )


def examples_of(plan: BenchPlan) -> Sequence[EditRecord]:
    """Return the records that demonstrations are taken from: a plan's examples, apart from its facts if it says so."""
    if plan.examples is None:
        return ()
    examples = load(plan.examples)
    if not plan.examples_apart:
        return examples
    return without_overlap(examples, chain.from_iterable(load(data) for data in plan.facts))


def cells_of(plan: BenchPlan) -> list[Cell]:
    """Return the runs of a plan, in the order that they are run and reported.

    Raises:
        MethodNotFoundError: a method that was asked for is not installed; a baseline that is not is a run that says so.
        UnsupportedCapabilityError: a method needs training or examples, and the plan names none.
        ConfigError: a bad field or an unknown preset.
        ArtifactError: a trained editor cannot be read.
        DataFormatError: a data set cannot be read.
        StorageError: the edit to be scored cannot be read.
    """
    settings = [(entry, _method_settings(entry, plan)) for entry in plan.rows]
    record_sets: list[RecordSet] = []
    for data in plan.facts:
        record_sets += [_load_with_references(plan, data, size) for size in plan.sizes or (None,)]
    cells: list[Cell] = []
    for model in plan.models:
        for records in record_sets:
            cells += _cells_on(plan, model, records, settings)
    return cells


def _cells_on(
    plan: BenchPlan,
    model: str,
    records: RecordSet,
    settings: Sequence[tuple[MethodEntry, Mapping[str, Any] | None]],
) -> list[Cell]:
    """Return the runs on one model and one data set: the unedited model, an edit that was made before, the methods."""
    common: dict[str, Any] = {
        "model": model,
        "data": _describe_data(records, plan),
        "size": len(records),
        "loading": {"dtype": plan.dtype, "trust_remote_code": plan.trust_remote_code},
    }
    cells: list[Cell] = []
    if UNEDITED not in plan.without:
        cells.append(Cell(RunSpec(label=UNEDITED, method=None, **common), records, records.skipped))
    if plan.edit is not None:
        file = artifact_file(plan.edit, EDIT)
        spec = RunSpec(label=_edit_label(plan.edit), method=None, edit=_digest(file), **common)
        cells.append(Cell(spec, records, records.skipped, edit=file))
    for entry, fields in settings:
        is_absent = fields is None
        if fields is None:
            fields = {"method": entry.name}
        spec = RunSpec(label=entry.title, **fields, **common)
        cells.append(Cell(spec, records, records.skipped, absent=is_absent))
    return cells


def _load_with_references(plan: BenchPlan, data: DataEntry, limit: int | None) -> RecordSet:
    records = load(data, limit)
    if plan.references is None:
        return records
    return replace(records, records=tuple(with_references(records, plan.references)))


def _describe_data(records: RecordSet, plan: BenchPlan) -> dict[str, str]:
    """Return what tells a data set, as it is scored, from others."""
    description = {"name": records.path.name, "sha256": records.sha256, "format": records.format}
    if records.split:
        description["split"] = records.split
    if records.variant:
        description["variant"] = records.variant
    if plan.references is not None:
        texts = json.dumps([_reference_texts(record) for record in records], ensure_ascii=False)
        description["references"] = sha256(texts.encode()).hexdigest()
    return description


def _reference_texts(record: EditRecord) -> tuple[str, ...]:
    generation = record.probes_of("generation")
    return generation[0].answers if generation else ()


def _edit_label(path: Path) -> str:
    """Return an edit's name in tables: that of its file, or of its folder where the file has the usual name."""
    return path.resolve().parent.name if path.name == EDIT else path.stem


def _digest(file: Path) -> dict[str, str]:
    """Return name and SHA-256 of a file.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return {"name": file.name, "sha256": sha256(file.read_bytes()).hexdigest()}
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from None


def _method_settings(entry: MethodEntry, plan: BenchPlan) -> dict[str, Any] | None:
    """Return what decides a method's answers, as fields of a :class:`RunSpec`.

    None for a baseline that is not installed.
    """
    try:
        method = MethodLine.of(entry.name)
    except MethodNotFoundError:
        if entry.name not in BASELINES:
            raise
        return None
    trained = _load_trained(method, plan)
    check_given(method, trained=bool(trained), examples=plan.examples is not None)
    given: dict[str, Any] = {}
    if method.capabilities.needs_training:
        files = [artifact_file(path, TRAINED) for path in trained]
        given["trained"] = [_digest(file)["sha256"] for file in files]
    if method.capabilities.needs_examples and plan.examples is not None:
        given["examples"] = load(plan.examples).sha256
        if plan.examples_apart:
            ids = "\n".join(record.request.id for record in examples_of(plan))
            given["examples"] = sha256(f"{given['examples']}\n{ids}".encode()).hexdigest()
    editor = next(iter(trained.values()), None)
    return {
        "method": method.name,
        "config": method.make_config(entry.fields, preset=entry.preset, trained=editor).to_json(),
        "statistics": _describe_statistics(plan) if method.capabilities.needs_statistics else None,
        "given": given or None,
    }


def _describe_statistics(plan: BenchPlan) -> dict[str, Any]:
    """Return where a method's key statistics come from."""
    if plan.stats is not None:
        return {"saved": plan.stats.name}
    return {"text": [Path(text).name for text in plan.text], "tokens": plan.tokens}


def _load_trained(method: MethodLine, plan: BenchPlan) -> dict[Path, TrainedEditor]:
    """Return the plan's trained editors of a method by path, one for each model.

    Raises:
        ConfigError: their configurations differ.
        ArtifactError: one cannot be read.
    """
    loaded = {path: TrainedEditor.load(path) for path in plan.trained}
    editors = {path: editor for path, editor in loaded.items() if editor.method == method.name}
    configs = [editor.config for editor in editors.values()]
    if any(config != configs[0] for config in configs):
        raise ConfigError(
            f"the trained editors of '{method.name}' have different configurations, so their results do not belong "
            "into one row; run them one by one"
        )
    return editors
