"""Benchmarks of methods that are given something, ranks of torchrun, and sequences that go on from what was kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kecore import data, load_records, models
from kecore.api import registry
from kecore.api.errors import ArtifactMismatchError, ConfigError, EditStateError, UnsupportedCapabilityError
from kecore.api.types import Probe
from kecore.cli import app
from kecore.editor import Editor
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder
from kecore.training import Schedule, train
from kecore_bench import sequence
from kecore_bench.cells import cells_of
from kecore_bench.plan import BenchPlan
from kecore_bench.processes import run_plan
from kecore_bench.report import results, tables
from kecore_bench.store import Store
from kecore_bench.workplace import Workplace

FACTS = data.path("counterfact_sample.jsonl")
ALL = ("unedited", "ice", "retrieval", "ft-m", "lora")

RANK = """
import os, sys
from kecore.cli import app
from kecore.editor import Editor

edit = Editor.edit

def noted(self, records, *values, **fields):
    with open(f"{sys.argv[1]}.{os.environ['RANK']}", "a") as log:
        log.write(records[0].request.id + "\\n")
    return edit(self, records, *values, **fields)

Editor.edit = noted
app(sys.argv[2:])
"""


def saved(folder: Path, seed: int = 0) -> Path:
    return models.save_model(tiny_model("llama", seed=seed), tiny_tokenizer(), folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model."""
    return saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def mend(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MEND, trained for that model, after a fashion."""
    loaded = models.load_model(str(tiny), device="cpu")
    view, cls = ModelView.of(loaded.model), registry.default_registry().get("mend")
    config = cls.Config.make({"layers": [1], "rank": 4})
    out = tmp_path_factory.mktemp("trained")
    schedule = Schedule(steps=1, batch_size=2, held_out=2)
    unrelated = [Probe("locality", "Two and two is", ("four",), axis="unrelated")]
    records = [record.with_probes("locality", unrelated) for record in load_records(FACTS, limit=8)]
    train(cls, view, Encoder(loaded.tokenizer), records, config, schedule=schedule, out=out)
    return out


def plan(tiny: Path, methods: list[Any], size: int = 2, **fields: Any) -> BenchPlan:
    protocol = {"max_new_tokens": 0, "edits": "single", **fields.pop("protocol", {})}
    without = [name for name in ALL if name not in methods]
    return BenchPlan.make(
        {
            "models": str(tiny), "methods": methods, "facts": str(FACTS), "sizes": size, "without": without,
            "protocol": protocol, **fields,
        }
    )  # fmt: skip


def bench(path: Path, wanted: BenchPlan) -> dict[str, Any]:
    """Rows by label, of a run of the plan."""
    with Store(path, wanted.protocol) as store:
        run_plan(wanted, store)
        (table,) = tables(results(store))
    return {row.label: row for row in table.rows}


def dump(path: Path) -> dict[tuple[str, str, int], str]:
    with Store(path) as store:
        return {
            (spec.label, moment, place): row.dump()
            for spec in store.specs()
            for moment in store.moments(spec.key)
            for place, row in store.rows(spec.key, moment).items()
        }


IKE = {"name": "ike", "set": {"encoder": "character-ngrams", "demonstrations": 1}, "label": "ike"}


def test_trained_editors_and_examples(tiny: Path, mend: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(FACTS.read_text(encoding="utf-8").splitlines(keepends=True)[40:44]), encoding="utf-8")
    wanted = plan(tiny, ["mend", IKE], trained=[str(mend)], examples=str(pool))
    rows = bench(tmp_path / "s.sqlite", wanted)
    assert [(label, row.note) for label, row in rows.items()] == [("mend", ""), ("ike", "")]
    assert rows["mend"].result.spec.config["rank"] == 4
    first = {cell.spec.label: cell.spec.key for cell in cells_of(wanted)}
    pool.write_text("".join(FACTS.read_text(encoding="utf-8").splitlines(keepends=True)[50:54]), encoding="utf-8")
    other = {cell.spec.label: cell.spec.key for cell in cells_of(wanted)}
    assert other["mend"] == first["mend"]
    assert other["ike"] != first["ike"], "results with other examples would have gone into one row"


def test_a_method_that_edits_once_takes_no_part_in_a_sequence(tiny: Path, tmp_path: Path) -> None:
    kn = {"name": "kn", "set": {"contexts": 0, "steps": 4}, "label": "kn"}
    fields: dict[str, Any] = {"protocol": {"edits": "sequential", "step": 1, "when": ["at-edit"]}}
    row = bench(tmp_path / "s.sqlite", plan(tiny, [kn], 2, **fields))["kn"]
    assert row.note.startswith("0 of 2 records; UnsupportedCapabilityError: method 'kn' does not edit an edited model")
    assert bench(tmp_path / "one.sqlite", plan(tiny, [kn], 1, **fields))["kn"].note == "", "one step is no sequence"


@pytest.mark.parametrize(("method", "message"), [("mend", "must be trained first"), ("ike", "--examples FILE")])
def test_what_is_missing_is_said_before_a_model_is_loaded(
    method: str, message: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workplace, "open", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UnsupportedCapabilityError, match=message):
        bench(tmp_path / "s.sqlite", plan(tiny, [method]))
    words = ["compare", tiny, "--methods", method, "--facts", FACTS, "--limit", 2, "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_compare_takes_lines_settings_and_no_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "cache"))
    words = ["compare", tiny, "--methods", "memit,alphaedit + blue", "--facts", FACTS, "--limit", 1, "--tokens", 2000]
    quick = [
        word
        for method in ("memit", "AlphaEdit+blue")
        for field in ("steps=2", "contexts=0", "layers=[0,1,2]")
        for word in ("--set", f"{method}.{field}")
    ]
    more = ["--without", ",".join(ALL), "--protocol", "max_new_tokens=0", "--json"]
    done = CliRunner().invoke(app, [str(word) for word in [*words, *quick, *more]])
    assert done.exit_code == 0, done.output
    (table,) = json.loads(done.stdout)["tables"]
    set_ = "steps=2 contexts=0 layers=[0, 1, 2]"
    assert [row["method"] for row in table["rows"]] == [f"memit {set_}", f"alphaedit + blue {set_}"]
    assert all(row["records"] == 1 for row in table["rows"])
    out = tmp_path / "compare-tiny-counterfact_sample"
    assert {path.name for path in out.iterdir()} >= {"results.sqlite", "index.html", "table.md", "scores.csv"}
    with Store(out / "results.sqlite") as store:
        memit, line = store.specs()
    assert (memit.method, line.method) == ("memit", "alphaedit + blue")
    assert memit.config["layers"] == line.config["layers"] == [0, 1, 2]


def test_an_editor_of_another_model_is_a_failure_of_that_model(tiny: Path, mend: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", seed=1)
    wanted = plan(tiny, ["mend"], trained=[str(mend)]).model_copy(update={"models": (str(tiny), str(other))})
    with Store(tmp_path / "s.sqlite", wanted.protocol) as store:
        run_plan(wanted, store)
        fits, fails = (table.rows[0] for table in tables(results(store)))
    assert fits.note == ""
    assert "ArtifactMismatchError: the trained editor belongs to another model" in fails.note
    with pytest.raises(ConfigError, match="two trained editors of 'mend'"):
        Workplace(plan(tiny, ["mend"], trained=[str(mend), str(mend)])).open(str(tiny))


def test_ranks_of_torchrun(tiny: Path, tmp_path: Path) -> None:
    ft = {"name": "ft-m", "set": {"steps": 1}, "label": "ft-m"}
    wanted = plan(tiny, [ft, "ft-l"], 5).model_copy(update={"without": ALL[1:]})
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(wanted.model_dump_json(), encoding="utf-8")
    store, log = tmp_path / "ranks.sqlite", tmp_path / "log"
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "rank.py",
        log, "bench", store, "--plan", tmp_path / "plan.yaml", "--json",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one object: the other rank is silent
    assert [row["method"] for row in found["tables"][0]["rows"]] == ["unedited", "ft-m", "ft-l"]
    assert [row["records"] for row in found["tables"][0]["rows"]] == [5, 5, 5]
    shares = [(tmp_path / f"log.{rank}").read_text().split() for rank in (0, 1)]
    ids = [record.request.id for record in load_records(FACTS, limit=5)]
    assert shares == [ids[0::2] * 2, ids[1::2] * 2]
    with Store(tmp_path / "one.sqlite", wanted.protocol) as one:
        run_plan(wanted, one)
    assert dump(store) == dump(tmp_path / "one.sqlite")


def test_tables_have_the_order_of_the_plan(tiny: Path, tmp_path: Path) -> None:
    wanted = plan(tiny, [{"name": "ft-m", "set": {"steps": 1}, "label": "ft-m"}, "ft-l"], 1)
    cells = cells_of(wanted)
    with Store(tmp_path / "s.sqlite", wanted.protocol) as store:
        store.announce([cell.spec for cell in cells])
        assert store.specs() == []
        made_on = {"versions": {}, "hardware": {}, "base": {}, "left_out": []}
        store.add_run(cells[1].spec, made_on)
        store.add_run(cells[0].spec, made_on)
        assert [spec.label for spec in store.specs()] == ["ft-m", "ft-l"]


def edits_of(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[str]:
    """First ids of the edits that are made from now on; the process "dies" before the one of this number."""
    made: list[str] = []
    edit = Editor.edit

    def counting(self: Editor, records: Any, *values: Any, **fields: Any) -> Any:
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(records[0].request.id)
        return edit(self, records, *values, **fields)

    monkeypatch.setattr(Editor, "edit", counting)
    return made


@pytest.mark.parametrize("method", ["ultraedit", "grace", "memit"])
def test_a_sequence_goes_on_from_what_was_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The answers are those of an unbroken run.

    Of a method that remembers, of one whose edits supersede each other, and of one with contexts, which are those of
    the unedited model.
    """
    monkeypatch.setattr(sequence, "SHARE", 1e9)  # keep every step
    settings = {"grace": {"steps": 2}, "memit": {"preservation": 1e-4}}.get(method, {})
    wanted = plan(
        tiny, [{"name": method, "set": settings, "label": method}], 6,
        protocol={"edits": "sequential", "step": 1, "retention": 1},
    )  # fmt: skip
    bench_of = tmp_path / "whole.sqlite", tmp_path / "cut.sqlite"
    with Store(bench_of[0], wanted.protocol) as store:
        run_plan(wanted, store)
    with monkeypatch.context() as patch:
        made = edits_of(patch, stop=4)
        with Store(bench_of[1], wanted.protocol) as store, pytest.raises(KeyboardInterrupt):
            run_plan(wanted, store)
    ids = [record.request.id for record in load_records(FACTS, limit=6)]
    assert made == ids[:4]
    (folder,) = tmp_path.glob("cut.sqlite.edits/*")
    assert len(list(folder.glob("0*.safetensors"))) == (1 if method == "grace" else 4)
    with monkeypatch.context() as patch:
        made = edits_of(patch)
        with Store(bench_of[1], wanted.protocol) as store:
            run_plan(wanted, store)
    assert made == ids[4:]
    assert dump(bench_of[1]) == dump(bench_of[0])
    assert not list(tmp_path.glob("*.edits/*"))
    with Store(bench_of[1]) as store:
        (spec,) = store.specs()
        assert list(store.costs(spec.key)) == [f"step-{number}" for number in range(1, 7)]


def test_what_was_kept_may_be_useless(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plan(tiny, ["ultraedit"], 3, protocol={"edits": "sequential"})
    with monkeypatch.context() as patch:
        edits_of(patch, stop=2)
        with Store(tmp_path / "s.sqlite", wanted.protocol) as store, pytest.raises(KeyboardInterrupt):
            run_plan(wanted, store)
    (state,) = tmp_path.glob("s.sqlite.edits/*/state.safetensors")
    state.write_bytes(state.read_bytes()[:-8])
    with monkeypatch.context() as patch, Store(tmp_path / "s.sqlite", wanted.protocol) as store:
        made = edits_of(patch)
        run_plan(wanted, store)
        assert len(made) == 3, "a damaged file is no start"
        assert results(store)[0].evaluations["at-end"].scores["edit_success"].records == 3


def test_a_store_begun_anew_takes_nothing_from_its_predecessor(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(tiny, ["ultraedit"], 3, protocol={"edits": "sequential"})
    with monkeypatch.context() as patch:
        edits_of(patch, stop=2)
        with Store(tmp_path / "s.sqlite", wanted.protocol) as store, pytest.raises(KeyboardInterrupt):
            run_plan(wanted, store)
    (tmp_path / "s.sqlite").unlink()
    with monkeypatch.context() as patch, Store(tmp_path / "s.sqlite", wanted.protocol) as store:
        made = edits_of(patch)
        run_plan(wanted, store)
        assert len(made) == 3
        assert results(store)[0].evaluations["at-edit"].scores["edit_success"].records == 3


def test_a_resumed_session_gives_its_edits_back_together() -> None:
    records = load_records(FACTS, limit=3)
    first = Editor(tiny_model("llama"), tiny_tokenizer())
    edits = [first.edit(record, "ft-m", steps=1) for record in records]
    weights = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    second = Editor(tiny_model("llama"), tiny_tokenizer())
    before = {name: tensor.clone() for name, tensor in second.model.state_dict().items()}
    second.resume(edits[:2], {"ft-m": first.remembered("ft-m")})
    with pytest.raises(EditStateError, match="already"):
        second.resume(edits, {})
    second.edit(records[2], "ft-m", steps=1)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in second.model.state_dict().items())
    with pytest.raises(EditStateError, match="2 edits were resumed"):
        second.revert(2)
    second.revert()
    second.revert(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.model.state_dict().items())
    other = Editor(tiny_model("llama", seed=1), tiny_tokenizer())
    with pytest.raises(ArtifactMismatchError):
        other.resume(edits, {})
