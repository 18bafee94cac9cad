"""Trains a method that needs it: one loop for all of them, deterministic, and continued after a kill.

A method's ``prepare`` returns a :class:`Learner`, which knows how to make one step; everything else is here: which
records are held out, which records a step sees, seeds, checkpoints, the held-out curve, and the choice of the best
step. What a step sees and draws follows from the seed and the step's number alone, so a run that was killed and
continued ends bit for bit where an undisturbed one does.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kecore.api.errors import ConfigError, DataFormatError, NonFiniteError, UnsupportedCapabilityError
from kecore.api.method import MethodContext
from kecore.api.progress import Progress, silent
from kecore.api.types import EditRecord
from kecore.files import read_tensors, write_tensors
from kecore.trained import TrainedEditor, model_facts

if TYPE_CHECKING:
    from kecore.api.config import MethodConfig
    from kecore.api.method import EditMethod
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["Learner", "Report", "Schedule", "Trainable", "module_state", "restore_module", "train"]

_PARTIAL = "trained.partial.safetensors"
_KIND = "trained-editor-partial"
_SAVE_EVERY = 20.0  # seconds between checkpoints

Report = Callable[[Mapping[str, float]], None]
"""Called with each point of the held-out curve: ``step``, ``loss`` and whatever else the learner measures."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long to train, and on what.

    Args:
        steps: updates of the editor.
        batch_size: records of one step.
        held_out: records that are measured and never trained on.
        evaluate_every: steps between two measurements; there is one before the first step and one after the last.

    Raises:
        ConfigError: a number is not positive.
    """

    steps: int
    batch_size: int
    held_out: int = 50
    evaluate_every: int = 50

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"'{name}' of a training must be at least 1, got {value}")


@runtime_checkable
class Learner(Protocol):
    """A training under way: what ``prepare`` of a method returns.

    The model is in evaluation mode and frozen while any of its functions run; the global random state is the loop's.
    """

    def step(self, records: Sequence[EditRecord]) -> float:
        """Make one update from these records and return the loss, for people."""
        ...

    def evaluate(self, records: Sequence[EditRecord]) -> Mapping[str, float]:
        """Measure on records that are not trained on: ``loss``, by which the best step is chosen, and other figures."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Return everything that a continuation needs: parameters, the optimiser's moments, running statistics."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Return what ``plan`` will need, as the training is now."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """A method that trains: what it has on top of an :class:`~kecore.api.method.EditMethod`'s attributes.

    Attributes:
        schedule: how long it trains unless told otherwise.
    """

    schedule: Schedule

    def prepare(self, view: ModelView, records: Sequence[EditRecord], context: MethodContext) -> Learner:
        """Make a learner for this model.

        Args:
            view: the unedited model.
            records: all records that will be trained on, for statistics that need them at once.
            context: configuration, tokenizer and seed.
        """
        ...


@dataclass
class _Run:
    """A training as it stands."""

    learner: Learner
    identity: dict[str, Any]
    file: Path | None
    step: int = 0
    resumed: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    saved: float = field(default_factory=time.monotonic)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one of this very training."""
        if self.file is None or not self.file.is_file():
            return
        header, tensors = read_tensors(self.file, _KIND)
        if header["of"] != self.identity:
            return  # of another model, configuration or data: start anew and overwrite it
        self.learner.restore(_select_prefix(tensors, "state/"))
        self.best = _select_prefix(tensors, "best/")
        self.step = self.resumed = header["step"]
        self.curve, self.seconds = header["curve"], header["seconds"]

    def checkpoint(self) -> None:
        """Write a checkpoint, if the last one is some time ago."""
        if self.file is None or time.monotonic() - self.saved < _SAVE_EVERY:
            return
        header = {"of": self.identity, "step": self.step, "curve": self.curve, "seconds": self.seconds}
        tensors = {f"state/{name}": t for name, t in self.learner.state().items()}
        tensors |= {f"best/{name}": t for name, t in self.best.items()}
        write_tensors(self.file, _KIND, header, tensors)
        self.saved = time.monotonic()

    def measure(self, records: Sequence[EditRecord], report: Report | None) -> None:
        """Add a point to the curve, and keep the editor if it is the best so far."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same question at each point
            point = {"step": float(self.step), **self.learner.evaluate(records)}
        if not math.isfinite(point["loss"]):
            raise NonFiniteError(
                f"the held-out loss is {point['loss']} after {self.step} steps; lower the learning rates, or load the "
                "model in float32"
            )
        if all(point["loss"] < earlier["loss"] for earlier in self.curve):
            self.best = {name: t.detach().to("cpu", copy=True) for name, t in self.learner.tensors().items()}
        self.curve.append(point)
        if report is not None:
            report(point)


def _select_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def module_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return a module and its optimiser as tensors, for :meth:`Learner.state`."""
    tensors = {f"module/{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in values.items()}
    return tensors


def restore_module(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Undo :func:`module_state`, for :meth:`Learner.restore`."""
    module.load_state_dict(_select_prefix(state, "module/"))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/", 2)
            moments.setdefault(int(index), {})[name] = tensor.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def train(
    method: type[EditMethod],
    view: ModelView,
    encoder: Encoder,
    records: Sequence[EditRecord],
    config: MethodConfig | None = None,
    *,
    schedule: Schedule | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress = silent,
    report: Report | None = None,
) -> TrainedEditor:
    """Train a method for one model.

    Args:
        method: the class.
        view: the unedited model.
        encoder: its tokenizer.
        records: what is trained on and held out; with rephrases and locality probes where the method wants them.
        config: the method's configuration; its defaults otherwise.
        schedule: how long; the method's own otherwise.
        seed: decides what is held out, the order of the records, and what the learner draws.
        out: folder for the result. A run that was killed goes on from its last checkpoint there.
        progress: called with steps done.
        report: called with each point of the held-out curve.

    Returns:
        The editor of the step whose held-out loss was lowest.

    Raises:
        UnsupportedCapabilityError: the method does not train.
        DataFormatError: too few records.
        NonFiniteError: the training diverged.
    """
    instance = method()
    if not isinstance(instance, Trainable):
        raise UnsupportedCapabilityError(
            f"method '{method.name}' needs no training; use it with `kecore edit` as it is"
        )
    schedule = schedule or instance.schedule
    config = config or method.Config.make({})
    trained_on, held_out = _split(records, schedule, seed)
    context = MethodContext(config=config, encoder=encoder, seed=seed, progress=progress)
    context.base = context.fingerprint(view)
    identity = {
        "method": method.name,
        "config": config.to_json(),
        "base": dict(context.base.digests),
        "data": _digest(records),
        # Not the number of steps: a run may go on for longer than it was meant to.
        "schedule": {name: value for name, value in asdict(schedule).items() if name != "steps"},
        "seed": seed,
        "chat": encoder.chat,
    }
    with view.frozen():
        torch.manual_seed(seed)
        file = Path(out) / _PARTIAL if out is not None else None
        run = _Run(instance.prepare(view, trained_on, context), identity, file)
        run.resume()
        _loop(
            run,
            trained_on=trained_on,
            held_out=held_out,
            schedule=schedule,
            seed=seed,
            progress=progress,
            report=report,
        )
    trained = TrainedEditor(
        tensors=run.best,
        method=method.name,
        config=config.to_json(),
        config_version=config.version,
        base=context.base,
        model=model_facts(view),
        seed=seed,
        record={
            "data": identity["data"],
            "records": len(trained_on),
            "schedule": asdict(schedule),
            "chat": encoder.chat,
            "best_step": min(run.curve, key=lambda point: point["loss"])["step"],
            "curve": run.curve,
            "seconds": round(run.seconds, 2),
        },
    )
    if out is not None:
        trained.save(out)
        (Path(out) / _PARTIAL).unlink(missing_ok=True)
    return trained


def _loop(
    run: _Run,
    *,
    trained_on: Sequence[EditRecord],
    held_out: Sequence[EditRecord],
    schedule: Schedule,
    seed: int,
    progress: Progress,
    report: Report | None,
) -> None:
    """Make the steps that are left, with a measurement, a checkpoint and a report where each is due."""
    if not run.curve:
        run.measure(held_out, report)
    orders: dict[int, list[int]] = {}
    while run.step < schedule.steps:
        begin = time.monotonic()
        torch.manual_seed(_seed(seed, "step", run.step))
        indices = _records_of_step(run.step, size=schedule.batch_size, count=len(trained_on), seed=seed, orders=orders)
        batch = [trained_on[index] for index in indices]
        loss = run.learner.step(batch)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the training loss is {loss} at step {run.step + 1}; lower the learning rates, or load the model in "
                "float32"
            )
        run.step += 1
        if run.step % schedule.evaluate_every == 0 or run.step == schedule.steps:
            run.measure(held_out, report)
        run.seconds += time.monotonic() - begin
        run.checkpoint()
        progress("train", run.step, schedule.steps)


def _records_of_step(step: int, *, size: int, count: int, seed: int, orders: dict[int, list[int]]) -> list[int]:
    """Return which records a step sees: each epoch goes through all of them in an order of its own.

    Args:
        step: number of the step, from 0.
        size: records of one step.
        count: records in all.
        seed: seed of the training.
        orders: the order of each epoch that was asked for before; new ones are added.
    """
    indices: list[int] = []
    for drawn in range(step * size, (step + 1) * size):  # records drawn since the first step
        epoch, index = divmod(drawn, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=_generator(seed, "epoch", epoch)).tolist()
        indices.append(orders[epoch][index])
    return indices


def _split(records: Sequence[EditRecord], schedule: Schedule, seed: int) -> tuple[list[EditRecord], list[EditRecord]]:
    """Return records to train on and held-out ones, which share no subject."""
    if len(records) <= schedule.held_out:
        raise DataFormatError(
            f"{len(records)} records are too few to hold out {schedule.held_out} and train on the others; give more, "
            "or hold out fewer"
        )
    order = torch.randperm(len(records), generator=_generator(seed, "held-out", 0)).tolist()
    held_out = [records[i] for i in order[: schedule.held_out]]
    subjects = {_topic(record) for record in held_out}
    remaining = [records[i] for i in sorted(order[schedule.held_out :])]
    trained_on = [record for record in remaining if _topic(record) not in subjects]
    if not trained_on:
        raise DataFormatError("every record shares its subject with a held-out one; give records of more subjects")
    return trained_on, held_out


def _topic(record: EditRecord) -> str:
    """Return what a record is about: its subject, or its prompt where it has none."""
    return record.request.subject or record.request.prompt


def _generator(seed: int, purpose: str, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, purpose, index))


def _seed(seed: int, purpose: str, index: int) -> int:
    """Derive a seed for one purpose, independent of all the others."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {index}".encode()).digest()[:7], "big")


def _digest(records: Sequence[EditRecord]) -> str:
    """Digest the records' content, wherever they came from."""
    from kecore.evaluate import record_to_json

    plain = [record_to_json(replace(record, source="")) for record in records]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]
