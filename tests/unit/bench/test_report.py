"""Tables, files and the page over a store that is filled by hand."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
from hand_scores import probe
from rich.console import Console

from kecore.api.errors import ArtifactError, MethodNotFoundError, MissingDependencyError, ProtocolMismatchError
from kecore.evaluate import RecordResult
from kecore.evaluate.metrics import Metric, metrics_of
from kecore.evaluate.protocol import Protocol
from kecore.inference.scoring import ContinuationScore
from kecore_bench.report import Table, results, tables, write_report
from kecore_bench.report.costs import COSTS
from kecore_bench.report.drill import drill
from kecore_bench.report.figures import StageTimes, colour, curves, scatters, stages
from kecore_bench.report.gaps import gaps
from kecore_bench.report.html import page
from kecore_bench.report.table import Row
from kecore_bench.report.text import conditions, figure, further_rows, markdown, notes, rich_table
from kecore_bench.store import BEFORE, RunSpec, Store

MADE_ON = {"versions": {"kecore": "0", "torch": "1"}, "hardware": {"device": "cpu"}, "base": {}, "left_out": []}
NASTY = 'Who said "</script><b>&" in {}?'


def score(chance: float) -> ContinuationScore:
    return ContinuationScore((math.log(chance) if chance else -math.inf,), (1,), (1 if chance > 0.5 else 2,))


def record(id: str, edit: float, near: float) -> RecordResult:
    probes = (
        probe("edit", score(edit), prompt=NASTY, answers=("Rome",), rival=score(0.5), text="Rome"),
        probe("neighbourhood", score(near), prompt="near", answers=("Paris",), rival=score(0.5)),
    )
    return RecordResult(id, "", probes)


def spec(label: str, method: str | None, **fields: Any) -> RunSpec:
    data = {"name": "facts.jsonl", "sha256": "0" * 64, "format": "kecore"}
    return RunSpec(**{"label": label, "method": method, "model": "demo", "data": data, "size": 2, **fields})


def fill(store: Store, run: RunSpec, moment: str, chances: Sequence[tuple[float, float]]) -> None:
    store.add_run(run, MADE_ON)
    rows = {place: record(f"r{place}", *pair) for place, pair in enumerate(chances)}
    store.add(run.key, moment, rows)


@pytest.fixture
def store() -> Store:
    """Unedited, a good method with a label of special characters, a poor one, and one that is not there."""
    made = Store(":memory:", Protocol(max_new_tokens=4))
    fill(made, spec("unedited", None), BEFORE, [(0.1, 0.9), (0.2, 0.8)])
    good, poor, absent = spec("a_b & 50% | c", "good"), spec("poor", "poor"), spec("lora", "lora")
    fill(made, good, "after", [(0.9, 0.8), (0.8, 0.0)])
    stage = {"seconds": 4.0, "records": 2, "stages": {"values": 3.0}, "peak_memory_bytes": 1 << 30, "warnings": ["hm"]}
    made.add_cost(good.key, "all", stage)
    fill(made, poor, "after", [(0.1, 0.9)])
    made.add_run(absent, MADE_ON)
    made.fail(absent.key, "all", MethodNotFoundError("no method 'lora'"))
    return made


def test_scores_and_notes(store: Store) -> None:
    (table,) = tables(results(store))
    assert [(row.label, row.scores["edit_success"].value) for row in table.rows[:3]] == [
        ("unedited", 0.0), ("a_b & 50% | c", 1.0), ("poor", 0.0)
    ]  # fmt: skip
    assert table.rows[1].scores["neighbourhood_success"].value == 0.5
    assert table.rows[1].scores["neighbourhood_stability"].value == 0.5
    assert notes(table) == [
        "poor: unfinished, 1 of 2 records",
        "lora: not installed",
        "not taken on any record: PS, strict, para., free, para. (no paraphrase probe); portab. (no portability "
        "probe); locality (no locality probe); multi-hop (no multi-hop probe); hops (no hop probe)",
        "a_b & 50% | c warned: hm",
    ]
    assert table.rows[1].result.seconds == 2.0
    assert stages(table).rows == [StageTimes("a_b & 50% | c", {"values": 1.5, "other": 0.5}, total=2.0)]
    (panel,) = scatters(table)
    good = panel.points[1]
    assert (good.label, good.x.value, good.y.value) == ("a_b & 50% | c", 0.5, 1.0)


def test_text_of_any_kind_stays_text(store: Store) -> None:
    found = results(store)
    text = page(tables(found), found)
    assert text.count("</script>") == 2
    assert "<b>&" not in text
    assert "a_b &amp; 50% | c" in text
    (group,) = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert group["records"][0]["prompt"] == NASTY
    assert group["records"][1]["answers"][1][1][1] == 0.0  # P of an infinite log-probability
    assert group["records"][1]["answers"][2] is None  # not scored by the poor one
    assert group["before"] == 0
    assert r"| a_b & 50% \| c | 1.000 " in markdown(tables(found), found)


def shown(protocol: Protocol, *records: RecordResult) -> dict[str, Any]:
    """The drill of a table of one method."""
    store = Store(":memory:", protocol)
    run = spec("m", "m", size=len(records))
    store.add_run(run, MADE_ON)
    store.add(run.key, "after", dict(enumerate(records)))
    return drill(tables(results(store))[0])


def test_marks_are_the_metrics_of_the_table() -> None:
    # By the mean of its log-probabilities the answer wins, by their sum the shorter rival does.
    long = ContinuationScore((math.log(0.6),) * 3, (1, 1, 1), (1, 1, 1))
    rival = probe("edit", long, answers=("a b c",), rival=score(0.5))
    chain = [
        probe("multi_hop", score(0.1), prompt=text, answers=("Rome",), text=text, test="q")
        for text in ("Rome", "Paris")
    ]
    record = RecordResult("r0", "", (rival, *chain))
    by_mean, by_sum = shown(Protocol(), record), shown(Protocol(probability="sum"), record)
    assert by_mean["records"][0]["marks"] == [{"edit": [1, 1, 1.0], "multi_hop": [1, 1, 1.0]}], "any wording is enough"
    assert by_sum["records"][0]["marks"][0]["edit"] == [0, 1, 0.0]
    assert by_sum["records"][0]["answers"][0][0][1] == 0.216
    assert (by_sum["probability"], by_sum["kinds"]["multi_hop"]["letter"]) == ("of the whole answer", "M")
    kind = by_mean["kinds"]["multi_hop"]
    heading, *_ = kind["metrics"][kind["text"]]
    assert (kind["mark"], heading) == ("multi-hop", "multi-hop"), "the text has a verdict of its own"
    assert by_mean["records"][0]["answers"][0][2][0][kind["text"]] == 0.0


def test_marks_of_locality_are_stability_and_leave_out_what_does_not_count() -> None:
    store = Store(":memory:", Protocol())
    unmet = probe("locality", score(0.9), prompt="q", answers=("a",), axis="x", holds=False)
    several = probe("portability", score(0.9), prompt="s", answers=("b",), axis="y", text="b c", also=(("c", "d"),))
    for run, moment, first in ((spec("unedited", None, size=1), BEFORE, 0.4), (spec("m", "m", size=1), "after", 0.9)):
        store.add_run(run, MADE_ON)
        stays = probe("locality", score(first), score(0.9), answers=("a", "b"), axis="x", holds=True)
        store.add(run.key, moment, {0: RecordResult("r0", "", (stays, unmet, several))})
    found = drill(tables(results(store))[0])
    (record,) = found["records"]
    assert [probe[3:] for probe in record["probes"]] == [["a / b", True], ["a", False], ["b and c / d", True]]
    assert found["kinds"]["locality"]["mark"] == "locality"
    assert "locality" not in record["marks"][0], "the unedited model is what stability compares with"
    assert record["marks"][1] == {"locality": [0, 1, 0.0], "portability": [1, 1, 1.0]}
    assert found["kinds"]["portability"]["mark"] == "free, portab.", "several things to name are no one continuation"


def test_a_baseline_that_came_later_replaces_its_empty_row(store: Store) -> None:
    fill(store, spec("lora", "lora", config={"rank": 8}), "after", [(0.9, 0.9), (0.9, 0.9)])
    (table,) = tables(results(store))
    assert [row.label for row in table.rows].count("lora") == 1
    assert table.rows[-1].note == ""
    store.add_run(spec("poor", "poor", config={"steps": 9}), MADE_ON)  # begun, and not a record done
    assert [row.label for row in tables(results(store))[0].rows].count("poor") == 1


def test_two_settings_under_one_name_are_told_apart(store: Store) -> None:
    fill(store, spec("poor", "poor", config={"steps": 3}), "after", [(0.9, 0.9), (0.9, 0.9)])
    (table,) = tables(results(store))
    assert [row.label for row in table.rows][2:] == ["poor", "lora", "poor #2"]
    assert table.rows[-1].note == "has other settings than the first (steps 3, there None)"
    twice = results(store, store)
    assert [result.label for result in twice] == [row.label for row in table.rows]


def test_a_table_has_one_data_set_and_size(store: Store) -> None:
    fill(store, spec("big", "big", size=3), "after", [(0.9, 0.9)] * 3)
    found = results(store)
    assert [table.first.spec.size for table in tables(found)] == [2, 3]
    rows = tuple(Row(result, None) for result in found)
    with pytest.raises(ProtocolMismatchError, match="different models, data sets or numbers"):
        Table(rows, "after")


def test_retention() -> None:
    store = Store(":memory:", Protocol(edits="sequential", retention=1))
    run = spec("m", "m")
    fill(store, run, "after-1", [(0.9, 0.9)])
    fill(store, run, "at-end", [(0.9, 0.9), (0.1, 0.9)])
    fill(store, run, "at-edit", [(0.9, 0.9), (0.9, 0.9)])
    found = results(store)
    assert [(point.facts, point.score.value) for point in found[0].retention("edit_success")] == [(1, 1.0), (2, 0.5)]
    assert [table.moment for table in tables(found)] == ["at-edit", "at-end"]
    assert curves(found)[0].lines[0].label == "m"
    assert curves(found)[0].ticks == [1, 2]
    text = page(tables(found), found)
    assert text.count("<h3>Retention") == 1
    assert "m: 0.500" in text


def test_drill_follows_the_last_moment(store: Store) -> None:
    (table,) = tables(results(store))
    shown = drill(table)
    assert [method["label"] for method in shown["methods"]] == ["unedited", "a_b & 50% | c", "poor"]
    values, *rest = shown["records"][0]["answers"][1][0]
    heads = [heading for heading, *_ in shown["kinds"]["edit"]["metrics"]]
    assert dict(zip(heads, values, strict=True)) == {"ES": 1, "strict": 1, "tokens": 1, "PPL": 1.111, "free": 1}
    assert rest == [0.9, 0.5, "Rome"]


def test_every_metric_has_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Core metrics head columns; the others, axes and a stranger's metric stand in the second table."""
    mine = Metric("surprise", "edit", lambda probe, protocol: -probe.scores[0].total, lower=True)
    every = (*metrics_of(Protocol()), mine)
    core = [f"kecore.evaluate.{module}" for module in ("result", "measuring", "columns")]
    for module in (*core, "kecore_bench.report.gaps", "kecore_bench.report.drill"):
        monkeypatch.setattr(f"{module}.metrics_of", lambda protocol: every)
    store = Store(":memory:", Protocol())
    run = spec("m", "m", size=1)
    store.add_run(run, MADE_ON)
    near = probe("locality", score(0.9), answers=("a",), axis="same_subject")
    store.add(run.key, "after", {0: RecordResult("r0", "", (*record("r0", 0.9, 0.9).probes, near))})
    found = results(store)
    (table,) = tables(found)
    assert [*table.columns.values()] == ["ES", "NS", "strict", "free"]
    heads, rows = further_rows(table)
    assert heads == ["score", "m"]
    assert ["locality accuracy", "1.000"] in rows
    assert ["locality accuracy: same subject", "1.000"] in rows
    assert rows[-1] == ["surprise", "0.105"]
    text = page([table], found)
    assert "Locality: as stability, as correctness, by axis" in text
    assert "surprise" in markdown([table], found)
    assert "PS, strict, para., free, para. (no paraphrase probe); portab. " in notes(table)[0]
    assert "NS stable, locality (no answers of the unedited model to compare with)" in notes(table)[0]


def test_what_is_missing_is_listed_by_record_and_method() -> None:
    store = Store(":memory:", Protocol())
    bare = probe("paraphrase", score(0.9), answers=("a",))
    for label, extra in (("one", ()), ("two", (bare,))):
        run, second = spec(label, label), record("r1", 0.9, 0.9)
        store.add_run(run, {**MADE_ON, "left_out": [["facts.json line 3", "no subject"]]})
        with_rival = replace(bare, rival_scores=(score(0.5),))
        first = replace(second, id="r0", probes=(*second.probes, with_rival))
        store.add(run.key, "after", {0: first, 1: replace(second, probes=(*second.probes, *extra))})
    found = results(store)
    (table,) = tables(found)
    assert [(gap.lacks, gap.methods, gap.ids) for gap in gaps(table) if "paraphrase_success" in gap.keys] == [
        ("no paraphrase probe", ("one",), ("r1",)),
        ("no old answer to compare with", ("two",), ("r1",)),
    ]
    assert "PS: not taken on 1 of 2 records of two: no old answer to compare with" in notes(table)
    assert (
        "1 record of the file could not be represented and was left out; the first, facts.json line 3: no subject"
        in (notes(table))
    )
    text = page([table], found)
    assert "not taken on 1 of 2 records of two: no old answer to compare with: r1" in text
    assert "facts.json line 3: no subject" in text


def test_a_store_of_before_places_were_kept(store: Store) -> None:
    fill(store, spec("old", "old", size=1), "after", [(0.9, 0.9)])
    (result,) = [result for result in results(store) if result.label == "old"]
    assert replace(result, made_on={**MADE_ON, "left_out": 2}).left_out[1][0] == "number 2"


def test_the_conditions_name_the_type_of_the_weights(store: Store) -> None:
    (result, *_) = results(store)
    made_on = {**MADE_ON, "base": {"dtype": "bfloat16"}, "parameters": 1234}
    assert "Model: demo, weights in bfloat16, 1,234 parameters." in conditions([replace(result, made_on=made_on)])


def test_intervals_in_tables_and_plots(store: Store) -> None:
    found = results(store)
    (table,) = tables(found)
    assert "| 1.000 [0.342, 1.000] |" in markdown([table], found)
    assert "><span>1.000</span><small>.342–1</small>" in page([table], found)


def test_plots_are_part_of_the_page(store: Store) -> None:
    found = results(store)
    (table,) = tables(found)
    shown = page([table], found)
    (panel,) = scatters(table)
    for dot in panel.points:
        tip = escape(f"{dot.label}: {panel.x} {figure(dot.x.value)}")
        (point,) = re.findall(rf"<g><title>{re.escape(tip)}.*?<use[^>]*>", shown, re.DOTALL)
        assert f"fill: {colour(table, dot.label)}" in point
    assert all(f">{escape(name)}</text>" in shown for name in (panel.x, panel.y, "a_b & 50% | c"))
    assert "<title>a_b &amp; 50% | c, values: 1.500 s for each fact</title>" in shown
    assert not re.search(r'<g id="tip-', shown), "ids of one plot would be those of another"
    assert page([table], found) == shown, "the same store makes the same page"


def test_every_column_of_the_page_explains_itself(store: Store) -> None:
    found = results(store)
    (table,) = tables(found)
    text = page([table], found)
    heads = re.findall(r'<th title="([^"]*)">([^<]*)</th>', text)
    meanings = {escape(heading): title for title, heading in heads}
    for key, column in table.described.items():
        if key in (*table.columns, *table.further):
            name = column.heading if key in table.columns else column.name
            assert meanings[name] == escape(f"{column.meaning}; {'lower' if column.lower else 'higher'} is better")
            assert f"<dt>{escape(column.heading)} <code>{key}</code></dt><dd>{escape(column.meaning)}; " in text
    for cost in COSTS:
        assert meanings[cost.heading] == cost.meaning
        assert f"<dt>{cost.heading} <code>{cost.key}</code></dt>" in text


def test_equal_points_are_all_seen(tmp_path: Path) -> None:
    """Six methods with the same scores have six marks in every format, each of which shows most of its face."""
    import matplotlib.image

    store = Store(":memory:", Protocol(max_new_tokens=4))
    names = ["one", "two", "three", "four", "five", "six"]
    for name in names:
        fill(store, spec(name, name), "after", [(0.9, 0.9), (0.9, 0.9)])
    written = write_report([store], tmp_path, ["png", "pdf", "svg"])
    (table,) = tables(results(store))
    colours = [colour(table, name) for name in names]
    image = matplotlib.image.imread(written["png"][0])[..., :3]
    frame = ((image.max(axis=-1) < 0.3).mean(axis=0) > 0.6).nonzero()[0].max()  # its right edge
    panel = image[:, : frame + 20]  # without the legend, and with marks that reach over the edge
    for wanted in colours:
        rgb = [int(wanted[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert (abs(panel - rgb).max(axis=-1) < 0.02).sum() > 60, wanted
    svg = written["svg"][0].read_text(encoding="utf-8")
    assert "<text" not in svg, "letters are outlines, so that no font is missed"
    mark = r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: (#\w+); stroke: #ffffff'
    spots = [(x, y) for x, y, fill in re.findall(mark, svg) if fill in colours]
    assert len(set(spots)) == 2 * len(names), "those of the plot, and those of the legend"
    pdf = written["pdf"][0].read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf, "TrueType, embedded"
    assert b"/Type3" not in pdf


def test_without_matplotlib_the_page_says_how_to_get_figures(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = results(store)
    shown = page(tables(found), found)
    assert "<svg" not in shown
    assert "pip install &#x27;kecore[plot]&#x27;" in shown
    assert "><span>1.000</span><small>.342–1</small>" in shown


def test_an_empty_store_and_a_missing_package(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="no results yet"):
        results(Store(":memory:", Protocol()))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"kecore\[plot\]"):
        write_report([store], tmp_path, ["png"])
    assert "png" not in write_report([store], tmp_path, optional=True)
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize(
    ("width", "scores"),
    [
        (30, ["ES"]),
        (40, ["ES", "NS"]),
        (60, ["ES", "NS", "strict", "free", "NS stable"]),
        (300, ["ES", "NS", "strict", "free", "NS stable"]),
    ],
)
def test_a_terminal_shows_what_it_has_room_for(store: Store, width: int, scores: list[str]) -> None:
    (table,) = tables(results(store))
    shown, drawn = rich_table(table, width), io.StringIO()
    Console(file=drawn, width=width).print(shown)
    text = drawn.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = {word for row in table.rows for word in row.label.split()}
    assert words <= set(text.split())  # none is broken
    wide = width == 300
    assert [str(column.header).replace("\n", " ") for column in shown.columns] == [
        "method",
        *scores,
        *(cost.heading for cost in (COSTS if wide else COSTS[:1])),
    ]
    assert ("[" in text) == wide


def test_no_terminal_breaks_a_line_of_a_table(store: Store) -> None:
    """Rich makes columns narrower in an order of its own, and breaks words of one where another has room."""
    (table,) = tables(results(store))
    for width in range(40, 160):
        shown, drawn = rich_table(table, width), io.StringIO()
        Console(file=drawn, width=width).print(shown)
        lines = drawn.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        headings = [part for column in shown.columns for part in str(column.header).split("\n")]
        for words in (*headings, *(word for row in table.rows for word in row.label.split())):
            assert any(words in line for line in lines), (width, words)
