"""One table of models, data sets and seeds: its values against hand-made ones, and its LaTeX against a parser."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from hand_scores import probe

from kecore.api.errors import ConfigError, MethodNotFoundError, ProtocolMismatchError
from kecore.evaluate import RecordResult
from kecore.evaluate.protocol import Protocol
from kecore.evaluate.result import Score
from kecore.inference.scoring import ContinuationScore
from kecore_bench.published import PaperTable
from kecore_bench.report import Choice, Words, join, results, tables, write_report
from kecore_bench.report.joined import JoinedTable, decimals
from kecore_bench.report.marks import mark_best
from kecore_bench.store import BEFORE, RunSpec, Store

MADE_ON = {"versions": {"kecore": "0", "torch": "1"}, "hardware": {"device": "cpu"}, "base": {}, "left_out": []}


def score(chance: float) -> ContinuationScore:
    return ContinuationScore((math.log(chance),), (1,), (1 if chance > 0.5 else 2,))


def record(id: str, edited: bool, stays: bool) -> RecordResult:
    edit = probe("edit", score(0.9 if edited else 0.1), answers=("Rome",), rival=score(0.5), text="Rome")
    near = probe("neighbourhood", score(0.9 if stays else 0.1), answers=("Paris",), rival=score(0.5))
    return RecordResult(id, "", (edit, near))


def fill(store: Store, label: str, right: int, near: int, of: int = 20, **fields: Any) -> None:
    """A run that gets so many of its records right."""
    data = {"name": fields.pop("data", "facts.json.gz"), "sha256": fields.pop("sha256", "0"), "format": "kecore"}
    method = None if label == "unedited" else label.split()[0]
    run = RunSpec(**{"label": label, "method": method, "model": "demo", "data": data, "size": of, **fields})
    store.add_run(run, MADE_ON)
    rows = {index: record(f"r{index}", index < right, index < near) for index in range(of)}
    store.add(run.key, "after" if method else BEFORE, rows)
    if method:
        cost = {"seconds": of * 0.5, "records": of, "stages": {}, "peak_memory_bytes": 1 << 30, "warnings": ["hm"]}
        store.add_cost(run.key, "all", cost)


def made(seed: int = 0) -> Store:
    return Store(":memory:", Protocol(max_new_tokens=4, seed=seed))


def joined(*stores: Store, columns: Sequence[str] = (), rows: Sequence[str] = ()) -> JoinedTable:
    choice = Choice(tuple(columns), tuple(rows))
    return join(choice.of_tables(tables(choice.of_runs(results(*stores)))))


def values(table: JoinedTable) -> list[tuple[str, str, list[tuple[float, str] | None]]]:
    """Block, label, and value and mark of each cell."""
    rows: list[tuple[str, str, list[tuple[float, str] | None]]] = []
    for block in table.blocks:
        for line in block.lines:
            cells = [None if cell is None else (round(cell.score.value, 4), cell.mark) for cell in line.cells]
            rows.append((block.title, line.label, cells))
    return rows


@pytest.fixture
def store() -> Store:
    store = made()
    for label, right, near in (("unedited", 0, 20), ("memit", 20, 15), ("rome", 20, 10), ("ft-l", 19, 2)):
        fill(store, label, right, near)
    return store


def test_the_best_is_marked_and_what_equals_it_and_what_cannot_be_told_from_it(store: Store) -> None:
    assert values(joined(store, columns=["ES", "NS"])) == [
        ("", "unedited", [(0.0, ""), (1.0, "")]),
        ("", "memit", [(1.0, "best"), (0.75, "best")]),
        ("", "rome", [(1.0, "best"), (0.5, "near")]),
        ("", "ft-l", [(0.95, "near"), (0.1, "")]),
    ]


def test_marks_know_the_direction_and_compare_what_is_written() -> None:
    def one(value: float, half: float = 0.1) -> Score:
        return Score(value, (value - half, value + half), 5, 5)

    scores = {"a": one(1.0), "b": one(2.0), "c": one(1.15), "d": one(1.001), "e": Score(1.1, None, 1, 1)}
    assert mark_best(scores, lower=True, decimals=2) == {"a": "best", "b": "", "c": "near", "d": "best", "e": ""}
    assert mark_best(scores, lower=False, decimals=2) == {"a": "", "b": "best", "c": "", "d": "", "e": ""}
    assert mark_best({"a": one(1.0)}, lower=True, decimals=2) == {"a": ""}


@pytest.mark.parametrize(
    ("half_widths", "expected"),
    [
        ([0.25], 1),
        ([0.15], 2),
        ([0.05], 2),
        ([0.012], 3),
        ([0.0004], 3),
        ([2.6], 0),
        ([26], 0),
        ([], 3),
        ([0.4, 0.3, 0.05], 1),
    ],
)
def test_digits_end_where_the_interval_begins(half_widths: list[float], expected: int) -> None:
    assert decimals([Score(0.5, (0.5 - half, 0.5 + half), 9, 9) for half in half_widths]) == expected


def test_models_are_blocks_and_data_sets_are_groups() -> None:
    store = made()
    for model in ("demo", "org/Big"):
        for data in ("facts.json", "zsre.jsonl"):
            for label, right in (("memit", 18), ("rome", 2 if model == "demo" else 20)):
                fill(store, label, right, 10, model=model, data=data)
    table = joined(store, columns=["edit success"])
    assert [group.title for group in table.groups] == ["facts", "zsre"]
    assert values(table) == [
        ("demo", "memit", [(0.9, "best"), (0.9, "best")]),
        ("demo", "rome", [(0.1, ""), (0.1, "")]),
        ("org/Big", "memit", [(0.9, "near"), (0.9, "near")]),
        ("org/Big", "rome", [(1.0, "best"), (1.0, "best")]),
    ]


def test_what_one_data_set_or_model_lacks_is_empty() -> None:
    store = made()
    fill(store, "memit", 20, 10, data="a.json")
    fill(store, "rome", 10, 10, data="b.json", of=10)
    table = joined(store, columns=["ES"])
    assert [group.title for group in table.groups] == ["a, 20 records", "b, 10 records"]
    assert values(table) == [("", "memit", [(1.0, ""), None]), ("", "rome", [None, (1.0, "")])]


def test_files_of_one_name_and_other_content_stay_apart() -> None:
    store = made()
    for digest in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        fill(store, "memit", 20, 10, sha256=digest)
    assert [group.title for group in joined(store).groups] == ["aaaaaaaa", "bbbbbbbb"]


def test_seeds_are_a_mean_and_a_deviation() -> None:
    stores = [made(seed) for seed in (0, 1, 7)]
    shares = {"memit": (20, 18, 19), "rome": (10, 10, 10)}
    for index, store in enumerate(stores):
        for label, right in shares.items():
            fill(store, label, right[index], 5)
    table = joined(*stores, columns=["ES", "s/fact"])
    assert table.seeds == [0, 1, 7]
    (memit, rome) = table.blocks[0].lines
    cell = memit.cells[0]
    assert cell is not None
    expected = [1.0, 0.9, 0.95]
    assert cell.score.value == pytest.approx(fmean(expected))
    assert cell.score.ends == pytest.approx((fmean(expected) - stdev(expected), fmean(expected) + stdev(expected)))
    assert (cell.seeds, cell.mark) == (3, "best")
    assert rome.cells[0] is not None
    assert rome.cells[0].mark == ""
    assert "standard deviations over 3 seeds (0, 1, 7)" in table.spread
    # Each seed has its own table and hash on the page and in files; a label is not numbered for another seed's sake.
    assert [table.title.rpartition(", ")[2] for table in tables(results(*stores))] == ["seed 0", "seed 1", "seed 7"]
    assert {result.label for result in results(*stores)} == {"memit", "rome"}


def test_other_differences_than_the_seed_are_refused(store: Store) -> None:
    other = Store(":memory:", Protocol(max_new_tokens=8, seed=1))
    fill(other, "memit", 20, 15)
    with pytest.raises(ProtocolMismatchError, match="max_new_tokens 4 and 8"):
        joined(store, other)


def test_rows_and_columns_are_in_the_order_that_was_asked_for(store: Store, tmp_path: Path) -> None:
    fill(store, "memit steps=9", 15, 15, config={"steps": 9})
    table = joined(store, columns=["NS", "edit_success", "s/fact"], rows=["FT-L", "memit", "unedited"])
    assert [column.heading for column in table.columns] == ["NS", "ES", "s/fact"]
    assert [line.label for line in table.blocks[0].lines] == ["ft-l", "memit", "unedited"]
    assert [line.label for line in joined(store, rows=["memit steps=9"]).blocks[0].lines] == ["memit steps=9"]
    choice = Choice(("NS", "strict"), ("rome", "memit"))
    written = write_report([store], tmp_path, ["csv", "markdown", "html", "json"], choice=choice)
    lines = written["csv"][0].read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[6:8] for line in lines[1:]] == [
        ["rome", "neighbourhood_success"], ["rome", "strict_accuracy"],
        ["memit", "neighbourhood_success"], ["memit", "strict_accuracy"],
    ]  # fmt: skip
    text = written["markdown"][0].read_text(encoding="utf-8")
    assert "| method | NS | strict |\n| --- | ---: | ---: |\n| rome | <u>0.50</u> [0.30, 0.70] |" in text
    page = written["html"][0].read_text(encoding="utf-8")
    assert "Further scores" not in page
    assert page.index('data-method="rome"') < page.index('data-method="memit"')


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(columns=("EX",)), "--columns EX: there is no such one; did you mean 'ES'"),
        (Choice(columns=("edit_sucess",)), "did you mean 'edit_success'"),
        (Choice(columns=("s/fct",)), "did you mean 's/fact'"),
        (Choice(columns=("PS",)), "--columns PS: no run has a value of it; those of the main table are ES, NS"),
        (Choice(rows=("memmit",)), "--rows memmit: there is no such one; did you mean 'memit'"),
    ],
)
def test_unknown_names_have_a_nearest(store: Store, tmp_path: Path, choice: Choice, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        write_report([store], tmp_path / "out", ["latex"], choice=choice)
    assert not (tmp_path / "out").exists()


def check_latex(text: str) -> list[list[str]]:
    """Check that braces, environments and columns fit together; return the cells of the rows."""
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    depth = 0
    for mark in re.findall(r"(?<!\\)[{}]", code):
        depth += 1 if mark == "{" else -1
        assert depth >= 0
    assert depth == 0
    stack: list[str] = []
    for verb, name in re.findall(r"\\(begin|end){([^}]*)}", code):
        if verb == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    assert len(re.findall(r"(?<!\\)\$", code)) % 2 == 0
    ((columns, body),) = re.findall(r"\\begin{tabular}{@{}(l?r*)@{}}(.*?)\\end{tabular}", code, re.DOTALL)
    rows: list[list[str]] = []
    for line in body.splitlines():
        if not line.endswith(r"\\"):
            continue
        cells = re.split(r"(?<!\\)&", line.removesuffix(r"\\"))
        spans = [int(span) - 1 for span in re.findall(r"\\multicolumn{(\d+)}", line)]
        assert len(cells) + sum(spans) == len(columns)
        rows.append([cell.strip() for cell in cells])
    return rows


def test_latex(store: Store, tmp_path: Path) -> None:
    fill(store, "a_b & 50% | <c>", 20, 15)
    lost = RunSpec("lora", "lora", "demo", {"name": "facts.json.gz", "sha256": "0", "format": "kecore"}, 20)
    store.add_run(lost, MADE_ON)
    store.fail(lost.key, "all", MethodNotFoundError("no method"))
    store.cite([PaperTable.model_validate({
        "paper": "Meng & al.", "arxiv": "2210.07229", "data": "facts", "rows": {"memit": {"edit_success": 98.9}},
    })])  # fmt: skip
    (file,) = write_report([store], tmp_path, ["latex"])["latex"]
    text = file.read_text(encoding="utf-8")
    rows = check_latex(text)
    assert rows[0] == ["Method", "ES", "NS", "strict", "free", "NS stable"], "no costs, unless they are asked for"
    assert rows[1][:2] == ["unedited", "$0.00^{0.16}_{0.00}$"]
    assert rows[2][:3] == ["memit", r"$\mathbf{1.00}^{1.00}_{0.84}$", r"$\mathbf{0.75}^{0.89}_{0.53}$"]
    assert rows[3][:2] == [r"\textit{memit [1]}", "$0.99$"]
    assert rows[5][:3] == ["ft-l", r"$\underline{0.95}^{0.99}_{0.76}$", "$0.10^{0.30}_{0.03}$"]
    assert rows[6][0] == r"a\_b \& 50\% \textbar{} \textless{}c\textgreater{}"
    assert rows[7] == ["lora", *["--"] * 5]
    assert r"\label{tab:demo-facts}" in text
    assert r"\caption{Knowledge editing of demo on 20 records of facts: means over records" in text
    assert "resizebox" not in text
    assert "lora: not installed." in text
    assert r"[1] Meng \& al., arXiv 2210.07229" in text
    assert "\n% Protocol " in text
    words = Words(r"Ours, see \cite{x}.", "tab:main")
    write_report([store], tmp_path, ["latex"], words=words)
    own = file.read_text(encoding="utf-8")
    assert r"\caption{Ours, see \cite{x}.}" in own
    assert r"\label{tab:main}" in own


def test_latex_of_several_of_everything(tmp_path: Path) -> None:
    stores = [made(seed) for seed in (0, 1)]
    for index, store in enumerate(stores):
        for model in ("demo", "big_1"):
            for data in ("facts.json", "zsre.json"):
                for label in ("memit", "rome"):
                    fill(store, label, 20 - 2 * index, 15, model=model, data=data)
    (file,) = write_report(stores, tmp_path, ["latex"])["latex"]
    text = file.read_text(encoding="utf-8")
    rows = check_latex(text)
    assert rows[0] == ["", r"\multicolumn{3}{c}{facts}", r"\multicolumn{3}{c}{zsre}"]
    assert rows[1] == ["Method", *["ES", "NS", "strict"] * 2], "six scores in all"
    assert r"\cmidrule(lr){2-4}\cmidrule(lr){5-7}" in text
    assert rows[2] == [r"\multicolumn{7}{@{}l}{\textit{demo}}"]
    assert rows[3][:2] == ["memit", r"$\mathbf{0.95}_{\pm 0.07}$"]
    assert rows[5] == [r"\multicolumn{7}{@{}l}{\textit{big\_1}}"]
