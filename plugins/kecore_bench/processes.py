"""Running a plan: in this process, by several that it starts, or together with the other ranks of ``torchrun``."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import sleep
from typing import Any

import torch

from kecore.api.errors import ConfigError, KecoreError, KecoreWarning, WorkerError
from kecore.api.progress import Progress, silent
from kecore_bench.bench import forget_failures, run_cells
from kecore_bench.cells import Cell, cells_of
from kecore_bench.plan import BenchPlan
from kecore_bench.ranks import Ranks, here, together
from kecore_bench.store import Store
from kecore_bench.trackers import Tracker
from kecore_bench.trackers.following import follow
from kecore_bench.workplace import Log, Stage, Workplace, log_nothing, time_nothing

__all__ = ["run_plan"]

_POLL = 0.5
"""Seconds between two looks at what the processes have stored."""


def run_plan(
    plan: BenchPlan,
    store: Store,
    *,
    jobs: int = 1,
    progress: Progress = silent,
    log: Log = log_nothing,
    stage: Stage = time_nothing,
    trackers: Sequence[Tracker] = (),
) -> list[Cell]:
    """Do what a store lacks of a plan: after a kill the same call goes on.

    Under ``torchrun`` the ranks share the work; each calls this with the same plan, and the first one tells what goes
    on.

    Args:
        plan: what to run.
        store: where results go; with several processes a file, not ``":memory:"``.
        jobs: processes to share the work. They are started anew, so a script that asks for several has to be guarded
            by ``if __name__ == "__main__":``.
        progress: called while long stages advance.
        log: called with a line about each run that has ended.
        stage: called as ``stage(name, doing)`` around what takes long; returns a context manager.
        trackers: told what becomes of the runs that are not done yet (:mod:`kecore_bench.trackers`).

    Returns:
        The plan's runs, in its order; ``kecore_bench.results(store)`` are their scores.

    Raises:
        ConfigError: a bad field of a method's configuration, or several processes and a store in memory.
        DataFormatError: a data set or a text cannot be read.
        ArtifactError: there are no such statistics, or a trained editor cannot be read.
        UnsupportedCapabilityError: a method needs training or examples, and the plan names none.
        StoreInUseError: another run is writing to the store.
        WorkerError: a process of several ended badly, or the first rank of ``torchrun`` could not begin.

    Examples:
        >>> plan = BenchPlan.make({"models": "demo", "methods": "memit", "facts": "facts.jsonl"})
        >>> with Store("results.sqlite", plan.protocol) as store:                       # doctest: +SKIP
        ...     cells = run_plan(plan, store, log=print)
    """
    if not store.on_disk and (jobs > 1 or here().world > 1):
        raise ConfigError("several processes meet in a store: give it a file, or run one process")
    Workplace(plan).statistics.check()
    cells = cells_of(plan)
    with together() as ranks, ExitStack() as stack:
        if ranks.rank == 0:
            _begin(ranks, cells, plan, store, stack)
        elif not ranks.agreed(ready=True):
            raise WorkerError("the first rank could not begin; its message says why")
        workplace = Workplace(plan, _choose_device(plan, ranks.rank, ranks.world))
        if ranks.rank == 0:
            note = stack.enter_context(follow(trackers, cells, store))
            workplace = Workplace(plan, workplace.device, progress, log, stage, note)
        if jobs == 1 or ranks.world > 1:
            run_cells(cells, store, workplace, shard=(ranks.rank, ranks.world))
        elif any(cell.missing(store) for cell in cells):
            _run_by_processes(workplace, store, cells, jobs)
        ranks.meet()
    return cells


def _begin(ranks: Ranks, cells: Sequence[Cell], plan: BenchPlan, store: Store, stack: ExitStack) -> None:
    """Do once what comes before any work: take the store, and write down what will be run."""
    try:
        stack.enter_context(store.alone())
        store.announce([cell.spec for cell in cells])
        store.cite(plan.published)
        forget_failures(cells, store)
    except KecoreError:
        ranks.agreed(ready=False)
        raise
    ranks.agreed(ready=True)


def _choose_device(plan: BenchPlan, rank: int, world: int) -> str:
    """Return a device of its own for each process, where there are several processes and GPUs."""
    if world == 1 or plan.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return plan.device
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return f"cuda:{local_rank % torch.cuda.device_count()}"


@dataclass(frozen=True)
class _Message:
    """A message of a process to the one that started it.

    Args:
        text: a line for people.
        is_error: the process ends with it.
    """

    text: str
    is_error: bool = False


@dataclass(frozen=True)
class _Worker:
    """A process that does a share of the work.

    Args:
        process: the process.
        messages: where its messages arrive.
    """

    process: BaseProcess
    messages: Connection

    def read(self) -> list[_Message]:
        """Return the messages that have arrived."""
        arrived: list[_Message] = []
        try:
            while self.messages.poll():
                arrived.append(self.messages.recv())
        except EOFError:  # it has ended
            pass
        return arrived


def _start_worker(plan: BenchPlan, path: Path, rank: int, jobs: int) -> _Worker:
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(plan.model_dump(mode="json"), path, rank, jobs, sender))
    process.start()
    sender.close()  # this process's copy: the worker's end would otherwise not be noticed
    return _Worker(process, receiver)


def _run_by_processes(workplace: Workplace, store: Store, cells: Sequence[Cell], jobs: int) -> None:
    """Start processes, and tell what they store until all have ended.

    Raises:
        WorkerError: one of them ended badly.
    """
    total = 0
    for cell in cells:
        total += sum(cell.wanted(store.protocol).values())
    keys = [cell.spec.key for cell in cells]
    workers: list[_Worker] = []
    errors: list[str] = []
    try:
        with workplace.stage("run", f"running {len(cells)} runs by {jobs} processes"):
            for rank in range(jobs):
                workers.append(_start_worker(workplace.plan, store.path, rank, jobs))
            running = True
            while running:
                running = any(worker.process.is_alive() for worker in workers)  # then read what came before the end
                workplace.progress("records", store.count(keys), total)
                workplace.note("")
                for worker in workers:
                    errors += _pass_on(worker.read(), workplace)
                if running:
                    sleep(_POLL)
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()
    codes = [worker.process.exitcode for worker in workers if worker.process.exitcode]
    if codes:
        reason = f" ({errors[0]})" if errors else ""
        raise WorkerError(
            f"{len(codes)} of {jobs} processes ended with exit code {codes[0]}{reason}; what was done is in "
            f"{store.path}, and the same run goes on from there"
        )


def _pass_on(messages: Sequence[_Message], workplace: Workplace) -> list[str]:
    """Show what a process tells, and return the errors among it."""
    for message in messages:
        if not message.is_error:
            workplace.log(message.text)
    return [message.text for message in messages if message.is_error]


def _work(values: Mapping[str, Any], path: Path, rank: int, jobs: int, sender: Connection) -> None:
    """Do one process's share; it ends with the process that started it."""
    _end_with_parent()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    plan = BenchPlan.make(values)
    workplace = Workplace(plan, _choose_device(plan, rank, jobs))
    if rank == 0:  # all do the same runs, so one tells of them
        workplace = Workplace(plan, workplace.device, log=lambda text: sender.send(_Message(text)))
        _forward_warnings(sender)
    else:
        warnings.simplefilter("ignore", KecoreWarning)
    try:
        with Store(path, plan.protocol) as store:
            run_cells(cells_of(plan), store, workplace, shard=(rank, jobs))
    except KecoreError as error:
        sender.send(_Message(f"{type(error).__name__}: {error}", is_error=True))
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # the process that started this one says so
        raise SystemExit(130) from None


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended: it would go on writing to a store that nobody holds."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _forward_warnings(sender: Connection) -> None:
    """Send kecore's warnings to the process that started this one; others are printed as ever."""
    print_warning = warnings.showwarning

    def forward(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, KecoreWarning):
            sender.send(_Message(f"warning: {message}"))
        else:
            print_warning(message, category, *where)

    warnings.showwarning = forward
