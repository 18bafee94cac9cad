"""Running a plan from the command line: what ``eval``, ``bench`` and ``compare`` do alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

import typer

from kecore.api.errors import ConfigError, KecoreError
from kecore.cli.console import Screen
from kecore.cli.errors import BAD_INPUT, CheckFailed, report_errors
from kecore.cli.loading import Loading, provide_statistics
from kecore.environment import environment
from kecore.statistics_source import StatisticsSource
from kecore_bench.plan import BenchPlan
from kecore_bench.ranks import Ranks, together

if TYPE_CHECKING:
    from kecore.editor import Editor
    from kecore.trained import TrainedEditor
    from kecore_bench.cells import Cell
    from kecore_bench.store import Store

__all__ = ["Desk", "carry_out"]

_POLL = 0.5
"""Seconds between two looks at what the processes have stored."""


@dataclass(frozen=True)
class Desk:
    """The command line as a :class:`kecore_bench.bench.Workplace`.

    Args:
        plan: the plan.
        screen: shows what goes on.
        device: in place of the plan's, for a process that has one of its own.
    """

    plan: BenchPlan
    screen: Screen = field(default_factory=Screen)
    device: str = ""

    def open(self, model: str) -> Editor:
        """A session on an unedited model."""
        from kecore_bench.cells import load

        plan = self.plan
        loading = Loading(model, self.device or plan.device, plan.dtype, plan.trust_remote_code, plan.protocol.seed)
        examples = () if plan.examples is None else load(plan.examples)
        chat = plan.protocol.form == "chat"
        editor = loading.edit(self.screen, statistics=_source(plan), chat=chat, memory=plan.memory, examples=examples)
        # A plan may name several models, and for each the editors that were trained for it.
        editor.trained = _one_each([trained for trained in self._trained() if trained.fits(editor.base)])
        return editor

    def _trained(self) -> list[TrainedEditor]:
        from kecore.trained import TrainedEditor

        return [TrainedEditor.load(path) for path in self.plan.trained]

    def prepare(self, editor: Editor, method: str, config: Mapping[str, Any]) -> None:
        """Key statistics, for a method that needs them.

        Raises:
            ArtifactMismatchError: the editor that was trained for the method is one of another model.
        """
        from kecore.api.line import MethodLine

        line = MethodLine.of(method)
        if line.capabilities.needs_training:
            for trained in [found for found in self._trained() if found.method == method]:
                if method not in {mine.method for mine in editor.trained}:
                    trained.check(editor.view, method, editor.base)
        if line.capabilities.needs_statistics:
            layers = editor.statistics_layers(line, **config)
            provide_statistics(self.screen, editor, line, layers, _source(self.plan))

    def made_on(self, editor: Editor) -> Mapping[str, Any]:
        """Versions, hardware, and digests of the weights."""
        return {
            **environment(editor.view.device),
            "base": {"dtype": editor.base.dtype, **editor.base.digests},
            "parameters": sum(parameter.numel() for parameter in editor.model.parameters()),
        }

    def stage(self, label: str) -> AbstractContextManager[None]:
        """Show that a run is going on."""
        return self.screen.stage(label, f"running {label}")

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show how far it is."""
        self.screen.progress(stage, done, total)

    def say(self, text: str) -> None:
        """Show what became of it."""
        self.screen.log(text)


def _source(plan: BenchPlan) -> StatisticsSource:
    return StatisticsSource(plan.stats, plan.text, plan.tokens)


def _one_each(trained: Sequence[TrainedEditor]) -> Sequence[TrainedEditor]:
    methods = [editor.method for editor in trained]
    twice = {method for method in methods if methods.count(method) > 1}
    if twice:
        raise ConfigError(f"two trained editors of '{twice.pop()}' belong to one model; name one of them")
    return trained


def carry_out(screen: Screen, plan: BenchPlan, store: Store, jobs: int = 1) -> list[Cell]:
    """Do what a store lacks of a plan; under ``torchrun`` together with the other ranks.

    Args:
        screen: shows what goes on.
        plan: what to run.
        store: where results go.
        jobs: processes to share the work.

    Returns:
        The plan's runs.

    Raises:
        StoreInUseError: another run is writing to the store.
        CheckFailed: a process of several ended badly.
        Exit: this is a further rank of ``torchrun``; the first one has the result.
    """
    from kecore_bench.cells import cells_of

    _source(plan).check()
    cells = cells_of(plan)
    with together() as ranks, ExitStack() as held:
        screen.err.quiet = screen.err.quiet or ranks.rank > 0
        if ranks.rank == 0:
            _begin(ranks, cells, plan, store, held)
        elif not ranks.agreed(ready=True):
            raise typer.Exit(BAD_INPUT)  # the first rank says why
        _run(screen, plan, store, cells, ranks, jobs)
        ranks.meet()
    if ranks.rank > 0:
        raise typer.Exit
    return cells


def _begin(ranks: Ranks, cells: Sequence[Cell], plan: BenchPlan, store: Store, held: ExitStack) -> None:
    """What is done once, before any process begins."""
    from kecore_bench.bench import retry

    try:
        held.enter_context(store.alone())
        store.announce([cell.spec for cell in cells])
        store.cite(plan.published)
        retry(cells, store)
    except KecoreError:
        ranks.agreed(ready=False)
        raise
    ranks.agreed(ready=True)


def _run(screen: Screen, plan: BenchPlan, store: Store, cells: list[Cell], ranks: Ranks, jobs: int) -> None:
    from kecore_bench.bench import run

    if jobs > 1 and ranks.world == 1:
        if any(cell.missing(store) for cell in cells):
            _share(screen, plan, store, cells, jobs)
    else:
        desk = Desk(plan, screen, _device(plan, ranks.rank, ranks.world))
        run(cells, store, desk, shard=(ranks.rank, ranks.world))


def _device(plan: BenchPlan, rank: int, world: int) -> str:
    """A device for each process where there are several."""
    if world == 1 or plan.device not in ("auto", "cuda"):
        return plan.device
    import torch

    place = int(os.environ.get("LOCAL_RANK", rank))
    return f"cuda:{place % torch.cuda.device_count()}" if torch.cuda.is_available() else plan.device


def _share(screen: Screen, plan: BenchPlan, store: Store, cells: Sequence[Cell], jobs: int) -> None:
    """Start processes, and show what they store until all have ended."""
    from multiprocessing import get_context

    context = get_context("spawn")
    values = plan.model_dump(mode="json")
    workers = [context.Process(target=_work, args=(values, store.path, rank, jobs)) for rank in range(jobs)]
    total = sum(sum(cell.wanted(store.protocol).values()) for cell in cells)
    keys = [cell.spec.key for cell in cells]
    try:
        with screen.stage("run", f"running {len(cells)} runs by {jobs} processes"):
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                screen.progress("records", store.count(keys), total)
                sleep(_POLL)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise CheckFailed(
            f"{len(failed)} of {jobs} processes ended with exit code {failed[0]}; what was done is in {store.path}, "
            "and the same command goes on from there"
        )


def _work(values: Mapping[str, Any], path: Path, rank: int, jobs: int) -> None:
    """One process's share; it ends with the process that started it."""
    import threading
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    import torch

    from kecore_bench.bench import run
    from kecore_bench.cells import cells_of
    from kecore_bench.store import Store

    parent = parent_process()
    if parent is not None:
        # An orphan would go on writing to a store that nobody holds any longer.
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    plan = BenchPlan.make(values)
    screen = Screen()
    screen.err.quiet = rank > 0
    try:
        with report_errors(screen), Store(path, plan.protocol) as store:
            run(cells_of(plan), store, Desk(plan, screen, _device(plan, rank, jobs)), shard=(rank, jobs))
    except typer.Exit as ended:
        raise SystemExit(ended.exit_code) from None
