"""Runs that are killed, shared, repeated and reported on, with tiny models."""

from __future__ import annotations

import csv
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from typer.testing import CliRunner

from kecore import data, models
from kecore.api.errors import ArtifactError, ConfigError, ProtocolMismatchError, StoreInUseError, WorkerError
from kecore.cli import app
from kecore.editor import Editor
from kecore.evaluate.cost import edit_bytes
from kecore.evaluate.protocol import Protocol
from kecore.memory import reset_peak
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_bench.bench import run_cells
from kecore_bench.cells import Cell, cells_of
from kecore_bench.plan import BenchPlan
from kecore_bench.processes import run_plan
from kecore_bench.report import FORMATS, results, tables, write_report
from kecore_bench.report.ages import aged
from kecore_bench.report.growth import growth_lines, growth_rows
from kecore_bench.sequence import SavedSequence
from kecore_bench.store import BEFORE, Store
from kecore_bench.workplace import Workplace

FACTS = data.path("counterfact_sample.jsonl")
OTHERS = ("ice", "retrieval", "lora")
KILLED = """
import os, signal, sys
from kecore.cli import app
from kecore_bench import bench, store

bench.BLOCK = 2
add, left = store.Store.add, [int(sys.argv[1])]

def dying(*values, **named):
    add(*values, **named)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

store.Store.add = dying
app(sys.argv[2:])
"""

Answers = dict[tuple[str, str, int], str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model."""
    return models.save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path_factory.mktemp("models") / "tiny")


def plan(tiny: Path, size: int = 3, **protocol: Any) -> BenchPlan:
    return BenchPlan.make(
        {
            "models": str(tiny),
            "methods": [{"name": "ft-m", "set": {"steps": 1}, "label": "ft-m"}],
            "facts": str(FACTS),
            "sizes": size,
            "without": OTHERS,
            "protocol": Protocol(max_new_tokens=0, **protocol),
        }
    )


def bench(path: Path | str, wanted: BenchPlan, shard: tuple[int, int] = (0, 1)) -> list[Cell]:
    with Store(path, wanted.protocol) as store:
        if shard == (0, 1):
            return run_plan(wanted, store)
        cells = cells_of(wanted)
        run_cells(cells, store, Workplace(wanted), shard=shard)
        return cells


def answers(path: Path) -> Answers:
    """Everything that a store holds, as text."""
    with Store(path) as store:
        return {
            (spec.label, moment, place): row.dump()
            for spec in store.specs()
            for moment in store.moments(spec.key)
            for place, row in store.rows(spec.key, moment).items()
        }


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of facts of the edits that are made."""
    made: list[int] = []
    edit = Editor.edit

    def counting(self: Editor, requests: Any, *values: Any, **fields: Any) -> Any:
        made.append(len(requests))
        return edit(self, requests, *values, **fields)

    monkeypatch.setattr(Editor, "edit", counting)
    return made


@pytest.mark.parametrize(
    ("edits", "written", "again"),
    # Unedited, three records are two blocks; the cost of a joint edit is written by itself, and so is that of a step.
    # A sequence was killed in its second step.
    [("single", 4, [1]), ("batch", 4, []), ("sequential", 5, [1, 1])],
)
def test_a_killed_run_goes_on(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    edited: list[int],
    edits: str,
    written: int,
    again: list[int],
) -> None:
    monkeypatch.setattr("kecore_bench.bench.BLOCK", 2)
    wanted = plan(tiny, edits=edits)
    whole, killed = tmp_path / "whole.sqlite", tmp_path / "killed.sqlite"
    bench(whole, wanted)
    edited.clear()
    file = tmp_path / "plan.yaml"
    file.write_text(wanted.model_dump_json())  # JSON is YAML
    words = [
        sys.executable,
        "-c",
        KILLED,
        str(written),
        "bench",
        str(killed),
        "--plan",
        str(file),
    ]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = answers(killed)
    expected = answers(whole)
    assert 0 < len(before) < len(expected)
    edits_file = list(tmp_path.glob("killed.sqlite.edits/*"))
    assert len(edits_file) == (edits != "single")
    bench(killed, wanted)
    assert answers(killed) == expected
    assert before.items() <= expected.items()
    assert edited == again, "what was edited was edited again"
    assert not list(tmp_path.glob("killed.sqlite.edits/*"))
    edited.clear()
    bench(killed, wanted)
    assert edited == []


def test_a_sequence_goes_on_and_scores_nothing_twice(
    tiny: Path, tmp_path: Path, edited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(tiny, 6, edits="sequential", step=2, retention=1)
    bench(tmp_path / "whole.sqlite", wanted)
    expected = answers(tmp_path / "whole.sqlite")
    assert {moment for label, moment, _ in expected if label == "ft-m"} == {"at-edit", "at-end", "after-4"}
    assert sum(key[1] == "after-4" for key in expected) == 4
    assert edited == [2, 2, 2]
    scored: list[int] = []
    evaluate = Editor.evaluate

    class Cut(BaseException):
        """Nothing catches it."""

    def dying(self: Editor, records: Any, *values: Any) -> Any:
        if len(scored) == 3:  # unedited, and two steps at-edit; then comes the checkpoint
            raise Cut
        scored.append(len(records))
        return evaluate(self, records, *values)

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "evaluate", dying)
        with pytest.raises(Cut):
            bench(tmp_path / "cut.sqlite", wanted)
    # Right after a step its facts are not asked again: two for the checkpoint, and two for the end.
    left = len(expected) - sum(scored) - 2 - 2
    assert len(answers(tmp_path / "cut.sqlite")) == sum(scored) + 2
    counted: list[int] = []
    monkeypatch.setattr(
        Editor, "evaluate", lambda self, records, *v: counted.append(len(records)) or evaluate(self, records, *v)
    )
    bench(tmp_path / "cut.sqlite", wanted)
    assert answers(tmp_path / "cut.sqlite") == expected
    assert sum(counted) == left
    with Store(tmp_path / "cut.sqlite") as store:
        sequence = next(result for result in results(store) if result.edits)
        before = next(result for result in results(store) if not result.edits)
    assert [point.facts for point in sequence.retention("edit_success")] == [4, 6]
    assert sequence.evaluations["at-end"].compared
    assert sequence.evaluations["after-4"].compared
    assert before.evaluations[BEFORE].scores["edit_success"].records == 6


def test_a_long_life_is_drawn_from_and_read_along(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few facts are asked, those at the end are those at their edit, and text, seconds and bytes have curves."""
    protocol = Protocol(max_new_tokens=0, edits="sequential", step=2, retention=1, sample=3)
    values = plan(tiny, 8).model_dump() | {"protocol": protocol, "held_out": {"passages": 3, "window": 12}}
    kept: list[int] = []
    keep = SavedSequence.keep
    monkeypatch.setattr(SavedSequence, "keep", lambda *v, **f: kept.append(v[1]) or keep(*v, **f))
    bench(tmp_path / "s.sqlite", BenchPlan.make(values))
    drawn, half = protocol.drawn(8), protocol.drawn(4)
    assert (len(drawn), len(half)) == (3, 3)
    places = {(label, moment): [] for label, moment, _ in answers(tmp_path / "s.sqlite")}
    for label, moment, place in answers(tmp_path / "s.sqlite"):
        places[label, moment].append(place)
    assert places == {
        ("unedited", "before"): sorted({*drawn, *half}),
        ("ft-m", "at-edit"): drawn,
        ("ft-m", "at-end"): drawn,
        ("ft-m", "after-4"): half,
    }
    assert kept == [1, 2, 3, 4]
    with Store(tmp_path / "s.sqlite") as store:
        found = results(store)
        (line,) = growth_lines(found)
        assert [point.facts for point in line.points] == [2, 4, 6, 8]
        assert [point.drift is not None for point in line.points] == [True, True, False, True]
        assert all(point.state_bytes == 0 for point in line.points)  # fine-tuning remembers nothing
        read = line.points[-1].drift
        assert read is not None
        assert read.tokens == 3 * 11
        assert 0 <= read.low <= read.agreement <= read.high <= 1
        assert len(growth_rows([line])) == 3
        assert [
            len(result.evaluations[moment].rows) for result, moment in zip(found, (BEFORE, "at-end"), strict=True)
        ] == [3, 3]
        assert not any(row.note for table in tables(found) for row in table.rows)
        ages = {(age.begin, age.end, age.facts): age.score for age in aged(found[1], "edit_success")}
        early = sum(position < 4 for position in drawn)
        counts = {(0, 4, 4): 3, (0, 4, 8): early, (4, 8, 8): 3 - early}
        assert {key: score.records for key, score in ages.items()} == {k: n for k, n in counts.items() if n}
        whole = found[1].evaluations["at-end"].scores["edit_success"].value
        parts = [score.value * score.records for (_, _, facts), score in ages.items() if facts == 8]
        assert sum(parts) / 3 == pytest.approx(whole)
        written = write_report([store], tmp_path / "report", ["html", "markdown", "svg"])
    assert "As the sequence grows" in written["html"][0].read_text(encoding="utf-8")
    assert "same next word" in written["markdown"][0].read_text(encoding="utf-8")
    assert "growth-2.svg" in {path.name for path in written["svg"]}


def test_held_out_text_belongs_to_a_sequence(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="'held_out' is read along a sequence"):
        BenchPlan.make(plan(tiny).model_dump() | {"held_out": {}})


@pytest.mark.parametrize(
    ("edits", "count", "timed", "fields"),
    [("single", 3, 0, {}), ("batch", 1, 0, {}), ("sequential", 2, 1, {"step": 2})],
)
def test_costs_of_each_edit(
    tiny: Path, tmp_path: Path, edits: str, count: int, timed: int, fields: dict[str, int]
) -> None:
    wanted = plan(tiny, edits=edits, **fields)
    bench(tmp_path / "s.sqlite", wanted)
    editor = Workplace(wanted).open(str(tiny))
    records = cells_of(wanted)[1].records
    one = editor.edit(records[:1], "ft-m", steps=1)  # a dense matrix, whatever the number of facts
    with Store(tmp_path / "s.sqlite") as store:
        unedited, found = results(store)
        costs = list(store.costs(found.spec.key).values())
    assert [cost["edit_bytes"] for cost in costs] == [edit_bytes(one)] * count
    assert ["latency" in cost for cost in costs] == [place == timed for place in range(count)]
    assert found.bytes_per_fact == edit_bytes(one) * count / 3
    assert found.latency is not None
    assert found.latency["base"] > 0
    assert found.peak_memory is not None
    assert (unedited.latency, unedited.bytes_per_fact) == (None, None)
    assert all(cost["peak_is_the_edits"] == reset_peak(editor.view.device) for cost in costs)


def test_shares_make_the_same_store(tiny: Path, tmp_path: Path, edited: list[int]) -> None:
    wanted = plan(tiny, edits="single")
    bench(tmp_path / "one.sqlite", wanted)
    bench(tmp_path / "two.sqlite", wanted, (1, 2))
    assert len(answers(tmp_path / "two.sqlite")) == 1
    bench(tmp_path / "two.sqlite", wanted, (0, 2))
    assert answers(tmp_path / "two.sqlite") == answers(tmp_path / "one.sqlite")
    assert edited == [1] * 6


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(*words: object) -> dict[str, Any]:
    done = invoke(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What ``kecore compare`` makes by two processes, and what it prints."""
    out = tmp_path_factory.mktemp("compared") / "out"
    words = (tiny, "--methods", "ft-l,ft-m", "--facts", FACTS, "--limit", 4, "--without", "lora", "--out", out)
    return out, said("compare", *words, "--jobs", 2, "--protocol", "edits=single", "--protocol", "max_new_tokens=2")


def test_compare_by_processes(compared: tuple[Path, dict[str, Any]]) -> None:
    out, found = compared
    rows = {row["method"]: row for row in found["tables"][0]["rows"]}
    assert {"unedited", "ft-l", "ft-m", "ice", "retrieval"} == rows.keys()
    assert rows["ft-m"]["records"] == rows["unedited"]["records"] == 4
    assert rows["ft-m"]["seconds_per_fact"] > 0
    assert {path.name for path in out.iterdir()} >= {
        "results.sqlite", "index.html", "table.md", "scores.csv", "tables.json"
    }  # fmt: skip
    assert json.loads((out / "tables.json").read_text())[0]["rows"] == found["tables"][0]["rows"]


class Cells(HTMLParser):
    """Values of a page's tables by method, and the headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: dict[str, list[str]] = {}
        self.links: list[str] = []
        self.data = ""
        self._method, self._in_data = "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [str(found[name]) for name in ("src", "href") if name in found]
        if tag == "tr":
            self._method = found.get("data-method") or ""
        if tag == "td" and self._method and "data-value" in found:
            self.values.setdefault(self._method, []).append(str(found["data-value"]))
        self._in_data = found.get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data
            self._in_data = False


def by_hand(rows: Any, kind: str) -> float:
    """Success from its definition: mean over records of the share of probes whose answer beats its rival."""
    shares = [[p.scores[0].mean > p.rival.mean for p in row.probes if p.kind == kind] for row in rows.values()]
    return fmean(map(fmean, shares))


def test_the_page_says_what_the_store_holds(compared: tuple[Path, dict[str, Any]]) -> None:
    out, _ = compared
    text = (out / "index.html").read_text(encoding="utf-8")
    found = Cells(text)
    assert found.links == ["#glossary"], "the page needs nothing else"
    kinds = ("edit", "paraphrase", "neighbourhood")
    with Store(out / "results.sqlite") as store:
        protocol = store.protocol
        for spec in store.specs():
            if spec.label in ("unedited", "ft-l", "ft-m"):
                moment = BEFORE if spec.method is None else "after"
                expected = [by_hand(store.rows(spec.key, moment), kind) for kind in kinds]
                assert [float(value) for value in found.values[spec.label][:3]] == pytest.approx(expected, abs=1e-12)
        rows = store.rows(next(spec.key for spec in store.specs() if spec.label == "ft-m"), "after")
    assert protocol.hash() in text
    assert "pip install" not in found.data
    (group,) = json.loads(found.data)
    assert [record["id"] for record in group["records"]] == [row.id for row in rows.values()]
    place = [method["label"] for method in group["methods"]].index("ft-m")
    for record, row in zip(group["records"], rows.values(), strict=True):
        shown = record["answers"][place]
        assert [answer[3] for answer in shown] == [probe.text for probe in row.probes]
        assert shown[0][1] == pytest.approx(math.exp(row.probes[0].scores[0].mean), rel=1e-3)
        assert record["marks"][place]["edit"][0] == (row.probes[0].scores[0].mean > row.probes[0].rival.mean)


def test_files_hold_the_same_figures(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, found = compared
    pytest.importorskip("matplotlib")
    written = said("report", out / "results.sqlite", "--out", tmp_path)["files"]
    assert written.keys() == set(FORMATS)
    assert all(Path(path).stat().st_size > 0 for paths in written.values() for path in paths)
    assert Path(written["png"][0]).read_bytes().startswith(b"\x89PNG")
    expected = {
        (row["method"], key): score["value"]
        for row in found["tables"][0]["rows"]
        for key, score in row["scores"].items()
    }
    expected |= {
        (row["method"], key): row[key]
        for row in found["tables"][0]["rows"]
        for key in ("seconds_per_fact", "bytes_per_fact", "peak_memory_bytes")
        if row[key] is not None
    }
    expected |= {
        (row["method"], "added_seconds_per_token"): row["seconds_per_token"]["added"]
        for row in found["tables"][0]["rows"]
        if row["method"] != "unedited"
    }
    lines = list(csv.DictReader((tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert {(line["method"], line["metric"]): float(line["value"]) for line in lines} == expected
    value = expected["ft-m", "neighbourhood_success"]
    for name, shown in (("table.md", f" {value:.3f} ["), ("table.tex", f"{value:.1f}")):  # four records: one digit
        text = (tmp_path / name).read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith(("| ft-m", "ft-m")))
        assert shown in line
        assert found["tables"][0]["protocol"]["hash"] in text


def test_protocols_do_not_mix(tiny: Path, tmp_path: Path) -> None:
    one, other = plan(tiny, 2, edits="single"), plan(tiny, 2)
    bench(tmp_path / "one.sqlite", one)
    with pytest.raises(ProtocolMismatchError, match=r"edits single and batch"):
        Store(tmp_path / "one.sqlite", other.protocol)
    bench(tmp_path / "other.sqlite", other)
    with Store(tmp_path / "one.sqlite") as a, Store(tmp_path / "other.sqlite") as b:
        with pytest.raises(ProtocolMismatchError, match=one.protocol.hash()):
            tables([*results(a), *results(b)])
        with pytest.raises(ProtocolMismatchError):
            write_report([a, b], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    done = invoke("bench", tmp_path / "one.sqlite", "--model", tiny, "--facts", FACTS)
    assert done.exit_code == 2
    assert "ProtocolMismatchError" in done.stderr


def test_the_example_of_the_docs_runs(
    root: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (root / "docs" / "evaluate.md").read_text(encoding="utf-8").partition("## In Python")[2]
    example = text.split("```")[1].removeprefix("python\n")
    for shown, used in (('"demo"', repr(str(tiny))), ('"facts.jsonl"', repr(str(FACTS)))):
        assert example.count(shown) == 1
        example = example.replace(shown, used)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"unedited, {FACTS.name}: 4 records before",
        f"ft-m steps=5, {FACTS.name}: 4 records after",
    ]
    title = f"{tiny.name}, 4 records of {FACTS.name}"
    assert [line.split(" 0.")[0].split(" 1.")[0] for line in lines[2:]] == [
        f"{title} unedited",
        f"{title} ft-m steps=5",
    ]


def test_a_plan_is_run_without_the_command_line(tiny: Path, tmp_path: Path) -> None:
    told: dict[str, list[str]] = {"log": [], "stage": [], "progress": []}

    @contextmanager
    def stage(name: str, doing: str) -> Iterator[None]:
        told["stage"].append(f"{name}: {doing}")
        yield

    wanted = plan(tiny, 2)
    with Store(tmp_path / "s.sqlite", wanted.protocol) as store:
        cells = run_plan(
            wanted,
            store,
            log=told["log"].append,
            stage=stage,
            progress=lambda name, done, total: told["progress"].append(name),
        )
        assert [cell.spec.label for cell in cells] == ["unedited", "ft-m"]
        assert not any(cell.missing(store) for cell in cells)
        assert [row.label for row in tables(results(store))[0].rows] == ["unedited", "ft-m"]
    assert [line.split(",")[0] for line in told["log"]] == ["unedited", "ft-m"]
    assert told["stage"] == [
        f"load: loading {tiny}",
        "read: reading the model's structure and fingerprint",
        "unedited: running unedited",
        "ft-m: running ft-m",
    ]
    assert "scoring before" in told["progress"]


def test_processes_forward_what_they_say_and_why_they_end(tiny: Path, tmp_path: Path) -> None:
    log: list[str] = []
    wanted = plan(tiny, 2)
    with Store(tmp_path / "s.sqlite", wanted.protocol) as store:
        run_plan(wanted, store, jobs=2, log=log.append)
    assert [line.split(",")[0] for line in log] == ["unedited"], "the first process's share"
    broken = wanted.model_copy(update={"models": (str(tmp_path / "nothing"),)})
    with (
        Store(tmp_path / "t.sqlite", wanted.protocol) as store,
        pytest.raises(WorkerError, match=r"2 of 2 processes ended with exit code 1 \(ModelLoadError: .*goes on from"),
    ):
        run_plan(broken, store, jobs=2)
    with Store(":memory:", wanted.protocol) as store, pytest.raises(ConfigError, match="give it a file"):
        run_plan(wanted, store, jobs=2)


def test_two_writers(tiny: Path, tmp_path: Path) -> None:
    wanted = plan(tiny)
    with Store(tmp_path / "s.sqlite", wanted.protocol) as one, one.alone():
        with (
            Store(tmp_path / "s.sqlite", wanted.protocol) as two,
            pytest.raises(StoreInUseError, match="another run"),
            two.alone(),
        ):
            pass
        done = invoke(
            "eval", tiny, "--facts", FACTS, "--store", tmp_path / "s.sqlite", "--protocol", "max_new_tokens=0"
        )
        assert done.exit_code == 2
        assert "StoreInUseError" in done.stderr
    with Store(tmp_path / "s.sqlite") as store, store.alone():
        assert store.specs() == []


def test_a_failure_is_shown_and_tried_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: list[int]
) -> None:
    wanted = plan(tiny, 2, edits="single")
    edit = Editor.edit

    def refusing(self: Editor, requests: Any, *values: Any, **fields: Any) -> Any:
        if requests[0].request.id == "counterfact-844":
            raise ArtifactError("not this one")
        return edit(self, requests, *values, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "edit", refusing)
        bench(tmp_path / "s.sqlite", wanted)
    with Store(tmp_path / "s.sqlite") as store:
        (table,) = tables(results(store))
        row = table.rows[1]
        assert row.note == "1 of 2 records; 1 failed, the first at counterfact-844: ArtifactError: not this one"
        assert row.scores["edit_success"].records == 1
    bench(tmp_path / "s.sqlite", wanted)
    assert edited == [1, 1]
    with Store(tmp_path / "s.sqlite") as store:
        assert tables(results(store))[0].rows[1].note == ""


def test_eval_of_an_edit(tiny: Path, tmp_path: Path) -> None:
    fact = ("--facts", FACTS, "--limit", 2)
    quick = ("--method", "ft-m", "--set", "steps=2", "--no-evaluate", "--out", tmp_path / "ft")
    assert invoke("edit", tiny, *fact, *quick).exit_code == 0
    plain = ("--protocol", "max_new_tokens=0")
    rows = said("eval", tiny, *fact, *plain, "--edit", tmp_path / "ft")["tables"][0]["rows"]
    assert [row["method"] for row in rows] == ["unedited", "ft"]
    assert "neighbourhood_stability" in rows[1]["scores"]
    assert rows[1]["scores"]["edit_magnitude"] != rows[0]["scores"]["edit_magnitude"]
    assert rows[1]["bytes_per_fact"] > 0
    assert rows[1]["seconds_per_token"]["edited"] > 0
    assert rows[1]["seconds_per_fact"] is None
    (row,) = said("eval", tiny, *fact, *plain)["tables"][0]["rows"]
    assert row["scores"] == rows[0]["scores"]
    assert not Path(":memory:").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no database at all, but long enough to be looked at", "no store"), (None, "no such store")],
)
def test_files_that_are_no_stores(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "x.sqlite"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        Store(file)


def test_other_weights_or_versions_are_refused(tiny: Path, tmp_path: Path) -> None:
    wanted = plan(tiny, 2)
    (cell,) = bench(tmp_path / "s.sqlite", wanted.model_copy(update={"methods": (), "without": (*OTHERS, "ft-m")}))
    with Store(tmp_path / "s.sqlite") as store:
        made_on = store.made_on(cell.spec.key)
        store.add_run(cell.spec, made_on)
        with pytest.raises(ArtifactError, match="other base"):
            store.add_run(cell.spec, {**made_on, "base": {}})
