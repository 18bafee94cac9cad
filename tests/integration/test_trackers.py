"""Trackers are told what benches do: the interface by a recording one, the adapters by their libraries or stand-ins."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from kecore import data, models
from kecore.api.errors import ConfigError, KecoreWarning, MissingDependencyError, NumericalError
from kecore.cli import app
from kecore.editor import Editor
from kecore.evaluate.protocol import Protocol
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_bench.plan import BenchPlan
from kecore_bench.processes import run_plan
from kecore_bench.report import results
from kecore_bench.store import Store
from kecore_bench.trackers import TrackedRun, Tracker, open_tracker
from kecore_bench.trackers.following import CUT_OFF
from kecore_bench.trackers.mlflow import Mlflow
from kecore_bench.trackers.trackio import Trackio
from kecore_bench.trackers.wandb import Wandb

FACTS = data.path("counterfact_sample.jsonl")


class Recorder(Tracker):
    """Keeps what it is told."""

    def __init__(self, fails_at: str = "") -> None:
        super().__init__("project")
        self.fails_at = fails_at
        self.runs: dict[str, TrackedRun] = {}
        self.logged: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.ended: dict[str, str] = {}
        self.files: list[str] = []
        self.calls: list[str] = []

    def _note(self, call: str, run: TrackedRun) -> None:
        self.calls.append(call)
        if call == self.fails_at:
            raise OSError("no network")

    def start(self, run: TrackedRun) -> None:
        self._note("start", run)
        print("as libraries do")  # noqa: T201 - stdout is the command's
        self.runs[run.name.partition(",")[0]] = run

    def log(self, run: TrackedRun, metrics: Mapping[str, float], step: int) -> None:
        self._note("log", run)
        self.logged.setdefault(run.name.partition(",")[0], []).append((step, dict(metrics)))

    def attach(self, run: TrackedRun, file: Path) -> None:
        self._note("attach", run)
        self.files.append(file.name)

    def finish(self, run: TrackedRun, failure: str) -> None:
        self._note("finish", run)
        self.ended[run.name.partition(",")[0]] = failure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path_factory.mktemp("models") / "tiny")


def plan(tiny: Path, size: int = 2, method: str = "ft-m", **protocol: Any) -> BenchPlan:
    return BenchPlan.make({
        "models": str(tiny),
        "methods": [{"name": method, "set": {"steps": 1} if method == "ft-m" else {}, "label": method}],
        "facts": str(FACTS),
        "sizes": size,
        "without": [name for name in ("ice", "retrieval", "lora", "ft-m") if name != method],
        "protocol": Protocol(max_new_tokens=0, **protocol),
    })  # fmt: skip


def bench(wanted: BenchPlan, path: Path, *trackers: Tracker) -> None:
    with Store(path, wanted.protocol) as store:
        run_plan(wanted, store, trackers=trackers)


def test_a_sequence_is_told_step_by_step(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = plan(tiny, 4, edits="sequential", retention=1)
    recorder = Recorder()
    bench(wanted, tmp_path / "mine.sqlite", recorder)
    assert capsys.readouterr().out == ""
    assert list(recorder.runs) == ["bench mine", "unedited", "ft-m"]
    run = recorder.runs["ft-m"]
    assert run.bench == "mine"
    assert run.parent == recorder.runs["bench mine"].key
    assert run.config["protocol_hash"] == wanted.protocol.hash()
    assert (run.config["method"], run.config["config.steps"], run.config["protocol.edits"]) == ("ft-m", 1, "sequential")
    steps = [step for step, _ in recorder.logged["ft-m"]]
    assert steps == sorted(steps), "trackers refuse steps that fall"
    told = {(step, name): value for step, metrics in recorder.logged["ft-m"] for name, value in metrics.items()}
    with Store(tmp_path / "mine.sqlite") as store:
        (result,) = [result for result in results(store) if result.label == "ft-m"]
    for moment, name, step in (
        ("after-2", "so-far/", 2), ("at-end", "so-far/", 4), ("at-end", "at-end/", 4), ("at-edit", "at-edit/", 4),
    ):  # fmt: skip
        for key, score in result.evaluations[moment].scores.items():
            assert told[step, f"{name}{key}"] == score.value
    assert [step for step, name in told if name == "step/seconds"] == [1, 2, 3, 4]
    assert told[4, "seconds_per_fact"] == result.seconds
    assert recorder.ended == {"unedited": "", "ft-m": "", "bench mine": ""}
    assert recorder.files == ["mine.sqlite"]
    again = Recorder()
    bench(wanted, tmp_path / "mine.sqlite", again)
    assert list(again.runs) == ["bench mine"], "what is done is not told twice"


@pytest.mark.parametrize("error", [NumericalError("too large"), KeyboardInterrupt()])
def test_runs_that_fail_or_are_cut_off_are_told_as_such(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Editor, "edit", fail)
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else nullcontext():
        bench(plan(tiny), tmp_path / "s.sqlite", recorder)
    is_failed = isinstance(error, NumericalError)
    assert recorder.ended == {
        "unedited": "",
        "ft-m": "1 failed, the first: NumericalError: too large" if is_failed else CUT_OFF,
        "bench s": "" if is_failed else CUT_OFF,
    }


def test_trackers_that_fail_are_said_once_each_and_the_bench_goes_on(tiny: Path, tmp_path: Path) -> None:
    broken, whole = [Recorder(call) for call in ("start", "log", "attach", "finish")], Recorder()
    with pytest.warns(KecoreWarning, match=r"Recorder failed and is told nothing further \(OSError: no") as said:
        bench(plan(tiny), tmp_path / "s.sqlite", *broken, whole)
    assert len([item for item in said if issubclass(item.category, KecoreWarning)]) == len(broken)
    for recorder in broken:
        assert recorder.calls.count(recorder.fails_at) == 1
        assert recorder.calls[-1] == recorder.fails_at
    assert whole.ended == {"unedited": "", "ft-m": "", "bench s": ""}
    with Store(tmp_path / "s.sqlite") as store:
        assert {result.answer_count for result in results(store)} == {2}


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_a_library_that_is_not_there_is_said_before_anything_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'kecore\[{name}\]'"):
        open_tracker(f"{name}:mine")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "x.sqlite", "--model", "demo", "--facts", str(FACTS), "--track", name])
    assert done.exit_code != 0
    assert "is not installed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_unknown_trackers_have_a_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        open_tracker("wandbb")


RUNS = (
    TrackedRun("b" * 24, "bench s", "s", {"runs": 1}),
    TrackedRun("c" * 24, "ft-m, demo", "s", {"method": "ft-m", "config.steps": 1}, parent="b" * 24),
)


def drive(tracker: Tracker, file: Path) -> None:
    """The calls of a small bench."""
    whole, run = RUNS
    tracker.start(whole)
    tracker.start(run)
    tracker.log(run, {"edit_success": 0.5, "at-end/locality.same_subject": 1.0}, 2)
    tracker.log(run, {"edit_success": 0.75}, 4)
    tracker.finish(run, "1 failed")
    tracker.attach(whole, file)
    tracker.finish(whole, "")


class Calls:
    """A stand-in of a library: notes the calls of whatever it is asked for."""

    def __init__(self, calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]], name: str = "") -> None:
        self._calls, self._name, self.summary = calls, name, {}

    def __call__(self, *values: Any, **named: Any) -> Calls:
        self._calls.append((self._name, values, named))
        return Calls(self._calls, f"{self._name}()")

    def __getattr__(self, name: str) -> Calls:
        return Calls(self._calls, f"{self._name}.{name}".lstrip("."))


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    module = ModuleType(name)
    module.__getattr__ = Calls(calls).__getattr__  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_calls_of_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in("wandb", monkeypatch)
    drive(Wandb("mine"), tmp_path / "s.sqlite")
    names = [name for name, _, _ in calls]
    assert names == [
        "init", "init", "init().log", "init().log", "init().finish", "Artifact", "Artifact().add_file",
        "init().log_artifact", "init().finish",
    ]  # fmt: skip
    assert calls[1][2] == {
        "project": "mine", "name": "ft-m, demo", "id": "c" * 24, "group": "s", "job_type": "run",
        "config": {"method": "ft-m", "config.steps": 1}, "resume": "allow", "reinit": "create_new",
    }  # fmt: skip
    assert calls[3][1:] == (({"edit_success": 0.75},), {"step": 4})
    assert [named["exit_code"] for name, _, named in calls if name == "init().finish"] == [1, 0]


def test_calls_of_trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in("trackio", monkeypatch)
    drive(Trackio("mine"), tmp_path / "s.sqlite")
    assert [name for name, _, _ in calls] == [
        "init", "init", *["init().log"] * 3, "init().finish", "init", "init().log_artifact", "init().finish",
    ], "one run is open at a time, so the first one is opened again"  # fmt: skip
    assert calls[1][2]["project"] == "mine"
    assert calls[1][2]["group"] == "s"
    assert calls[3][1:] == (({"edit_success": 0.75},), {"step": 4})


def test_calls_of_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in("mlflow", monkeypatch)
    drive(Mlflow("mine"), tmp_path / "s.sqlite")
    names = [name.rpartition(".")[2] for name, _, _ in calls]
    assert names.count("create_run") == 2
    assert [values[1:] for name, values, _ in calls if name.endswith("log_metric")] == [
        ("edit_success", 0.5), ("at-end/locality.same_subject", 1.0), ("edit_success", 0.75)
    ]  # fmt: skip
    assert [values[1] for name, values, _ in calls if name.endswith("set_terminated")] == ["FAILED", "FINISHED"]


def test_mlflow_itself_keeps_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its store of files, which no server is needed for."""
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    file = tmp_path / "s.sqlite"
    file.write_bytes(b"answers")
    drive(Mlflow("mine"), file)
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    run, whole = runs["ft-m, demo"], runs["bench s"]
    assert run.data.params == {"method": "ft-m", "config.steps": "1"}
    assert run.data.tags["mlflow.parentRunId"] == whole.info.run_id
    history = client.get_metric_history(run.info.run_id, "edit_success")
    assert [(point.step, point.value) for point in history] == [(2, 0.5), (4, 0.75)]
    assert (run.info.status, whole.info.status) == ("FAILED", "FINISHED")
    assert [artifact.path for artifact in client.list_artifacts(whole.info.run_id)] == ["s.sqlite"]
