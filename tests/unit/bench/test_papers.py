"""Figures of papers beside those of runs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hand_scores import probe

from kecore.api.errors import ConfigError
from kecore.evaluate import RecordResult
from kecore.evaluate.protocol import Protocol
from kecore.inference.scoring import ContinuationScore
from kecore_bench.plan import BenchPlan
from kecore_bench.published import PaperTable
from kecore_bench.report import results, tables, write_report
from kecore_bench.report.figures import scatters
from kecore_bench.report.html import page
from kecore_bench.report.joined import join
from kecore_bench.report.joined_text import joined_latex
from kecore_bench.report.papers import PaperRow, citations, lines
from kecore_bench.report.text import markdown
from kecore_bench.store import BEFORE, RunSpec, Store
from kecore_methods.locate.memit import Memit

MADE_ON = {"versions": {"kecore": "0"}, "hardware": {"device": "cpu"}, "base": {}, "left_out": []}
LEAST: dict[str, Any] = {"models": "demo", "facts": "facts.jsonl"}


def paper(**fields: Any) -> PaperTable:
    rows = {
        "unedited": {"edit_success": 15.2, "neighbourhood_success": 83.5},
        "mend": {"edit_success": 15.7, "neighbourhood_success": 83.0},
        "memit": {"edit_success": 98.9, "neighbourhood_success": 73.7, "fluency": 619.9},
    }
    return PaperTable(**{"paper": "Meng & al.", "arxiv": "2210.07229", "table": "Table 2", "rows": rows, **fields})


def run(store: Store, label: str, method: str | None, model: str = "EleutherAI/gpt-j-6b", **fields: Any) -> None:
    data = {"name": "multi_CounterFact.json", "sha256": "0" * 64, "format": "counterfact"}
    spec = RunSpec(label=label, method=method, model=model, data=data, size=1, **fields)
    store.add_run(spec, MADE_ON)
    half = ContinuationScore((math.log(0.5),), (1,), (1,))
    more = ContinuationScore((math.log(0.6),), (1,), (1,))
    probes = (
        probe("edit", more, answers=("a",), rival=half),
        probe("neighbourhood", more, prompt="n", answers=("b",), rival=half),
    )
    store.add(spec.key, "after" if method else BEFORE, {0: RecordResult("r", "", probes)})


@pytest.fixture
def store() -> Store:
    """The unedited model, MEMIT under a label of its own, and another method."""
    made = Store(":memory:", Protocol())
    run(made, "unedited", None)
    run(made, "memit, one layer", "memit")
    run(made, "rome", "rome")
    return made


def test_rows_stand_below_those_of_the_same_method(store: Store, tmp_path: Path) -> None:
    store.cite([paper(model="gpt-j", records=10000, setting="one batch", remark="By hand.")])
    store.cite([paper(model="gpt-j", records=10000, setting="one batch", remark="By hand.")])
    found = results(store)
    (table,) = tables(found)
    assert [row.label for row in lines(table)] == [
        "unedited", "unedited [1]", "memit, one layer", "memit [1]", "rome", "mend [1]"
    ]  # fmt: skip
    assert list(table.columns) == [
        "edit_success", "neighbourhood_success", "strict_accuracy", "neighbourhood_stability", "fluency",
    ]  # fmt: skip
    assert citations(table) == [
        "[1] Meng & al., arXiv 2210.07229, Table 2: gpt-j, 10,000 records, one batch. Here: 1 record. "
        "With kecore's own settings, not published ones: memit, one layer. By hand."
    ]
    assert "| memit [1] | 0.989 | 0.737 | - | - | 6.199 | - | - | - | - |" in markdown([table], found)
    assert "- [1] Meng & al., arXiv" in markdown([table], found)
    text = joined_latex(join([table]), found)
    assert r"\textit{memit [1]} & $0.989$ & $0.737$ & -- & -- & $6.199$ \\" in text
    assert "By hand" in text
    shown = page([table], found)
    assert '<td title="arXiv 2210.07229, Table 2: 619.9">6.199</td>' in shown
    assert "Meng &amp; al." in shown
    assert "Rings: figures of papers" in shown
    written = write_report([store], tmp_path, ["csv", "json"])
    rows = list(csv.DictReader(written["csv"][0].read_text(encoding="utf-8").splitlines()))
    published = [(row["method"], row["metric"], row["value"], row["n"]) for row in rows if row["source"] != "kecore"]
    assert published[-1] == ("mend", "neighbourhood_success", "0.83", "10000")
    assert {row["source"] for row in rows} == {"kecore", "arXiv 2210.07229, Table 2"}
    (told,) = json.loads(written["json"][0].read_text(encoding="utf-8"))
    assert told["published"][0]["rows"]["memit"]["fluency"] == 619.9
    (panel,) = scatters(table)
    assert [(point.label, point.beside, round(point.x, 6), round(point.y, 6)) for point in panel.published] == [
        ("unedited [1]", "unedited", 0.835, 0.152),
        ("memit [1]", "memit, one layer", 0.737, 0.989),
        ("mend [1]", "", 0.83, 0.157),
    ]


def test_which_papers_belong_to_a_table(store: Store) -> None:
    store.cite(
        [
            paper(model="GPT-J", data="counterfact"),
            paper(model="llama", data="counterfact"),
            paper(data="zsre"),
            paper(moment="at-end"),
        ]
    )
    run(store, "memit", "memit", model="demo")
    of_gptj, of_demo = tables(results(store))
    assert [found.model for found in of_gptj.cited] == ["GPT-J"]
    assert [found.model for found in of_demo.cited] == ["GPT-J", "llama"], "of no paper's model: all, and it is said"
    assert [row.label for row in lines(of_demo) if isinstance(row, PaperRow)][:2] == ["memit [1]", "memit [2]"]
    assert citations(of_demo)[1].endswith(
        "Table 2: llama. Here: demo. With kecore's own settings, not published ones: memit."
    )


def test_a_published_set_up_is_no_setting_of_ours(store: Store) -> None:
    store.cite([paper(model="gpt-j")])
    published = Memit.Config.make(Memit.Config.preset("gpt-j")).to_json()
    run(store, "memit", "memit", config={**published, "seed": 1})
    (table,) = tables(results(store))
    assert citations(table)[0].endswith("not published ones: memit, one layer.")


def test_a_plan_names_only_what_its_protocol_measures() -> None:
    rows = {"memit": {"edit_success": 1.0, "fluency": 2.0, "portability.one_hop": 3.0, "score": 4.0}}
    table = {"paper": "p", "rows": rows}
    with pytest.raises(ConfigError, match="names fluency, which this protocol does not measure"):
        BenchPlan.make({**LEAST, "published": [table]})
    plan = BenchPlan.make({**LEAST, "published": table, "protocol": {"extra": ["fluency"]}})
    assert plan.published[0].scores("memit")["portability.one_hop"] == 0.03
    with pytest.raises(ConfigError, match="row 'memit' has no figures"):
        BenchPlan.make({**LEAST, "published": {"paper": "p", "rows": {"memit": {}}}})
    with pytest.raises(ConfigError, match=r"published\.0\.rows"):
        BenchPlan.make({**LEAST, "published": {"paper": "p", "rows": {"memit": {"edit_success": "high"}}}})


def test_figures_may_be_fractions() -> None:
    table = paper(per=1, rows={"wise": {"edit_success": 0.77}})
    assert table.scores("wise") == {"edit_success": 0.77}
    assert PaperTable(paper="p, 2020", rows={"a": {"score": 1}}).source == "p, 2020"
