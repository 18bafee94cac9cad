"""Tables of the page: scores, further scores and axes, and what is missing of them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from kecore.evaluate.columns import described
from kecore.evaluate.result import Score
from kecore_bench.report.figures import colour
from kecore_bench.report.gaps import gaps, left_out
from kecore_bench.report.marks import Mark, mark_best
from kecore_bench.report.papers import PaperRow, lines
from kecore_bench.report.table import Row, Table
from kecore_bench.report.text import figure

__all__ = ["further_table", "glossary", "main_table", "missing"]

_KINDS = {
    "edit": "Edited prompts",
    "paraphrase": "Paraphrases",
    "neighbourhood": "Neighbours",
    "locality": "Locality: as stability, as correctness, by axis",
    "portability": "Portability, by axis",
    "multi_hop": "Multi-hop questions",
    "hop": "Single hops",
    "generation": "Free text",
}
_NONE = '<td class="none">–</td>'
_LISTED = 200
"""Places of records that the page lists; the JSON file has all of them."""


def main_table(table: Table) -> str:
    """Return the table of core scores and costs, a line a method."""
    head: list[str] = []
    for key, text in table.columns.items():
        head.append(_head(text, _meaning(table, key)))
    head += [_head(cost.heading, cost.meaning) for cost in table.costs]
    body = [_row(table, row) if isinstance(row, Row) else _paper_row(table, row) for row in lines(table)]
    return _html_table(f"<th>method</th>{''.join(head)}", "\n".join(body))


def _meaning(table: Table, key: str) -> str:
    """Return what a column says, and which direction is the better one."""
    if key.partition(".")[0] not in table.described:
        return "a figure of papers that the runs have no counterpart of"
    column = described(table.described, key)
    _, _, axis = key.partition(".")
    on_axis = f", of the axis '{axis.replace('_', ' ')}' alone" if axis else ""
    return f"{column.meaning}{on_axis}; {'lower' if column.lower else 'higher'} is better"


def glossary(tables: Sequence[Table]) -> str:
    """Return a list of all columns and scores of some tables with what each says."""
    entries: dict[str, tuple[str, str]] = {}  # name and meaning by heading
    for table in tables:
        keys = [key for key in (*table.columns, *table.further) if "." not in key or table.keys is not None]
        for key in keys:
            entries.setdefault(table.heading(key), (key, _meaning(table, key)))
        for cost in table.costs:
            entries.setdefault(cost.heading, (cost.key, f"{cost.meaning}; lower is better"))
    rows: list[str] = []
    for heading, (key, meaning) in entries.items():
        rows.append(f"<dt>{escape(heading)} <code>{escape(key)}</code></dt><dd>{escape(meaning)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _html_table(head: str, body: str) -> str:
    """Return a table that scrolls where it is wider than the page."""
    return f'<div class="wide"><table class="scores"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(text: str, meaning: str) -> str:
    return f'<th title="{escape(meaning or text)}">{escape(text)}</th>'


def _row(table: Table, row: Row) -> str:
    cells = [f"<th>{_dot(table, row)}</th>"]
    cells += [_cell(table, row, key) for key in table.columns]
    for cost in table.costs:
        text = cost.text(row.result)
        cells.append(_NONE if text is None else f"<td>{text}</td>")
    kind = "" if row.result.edits else " class='plain'"
    return f'<tr data-method="{escape(row.label)}"{kind}>{"".join(cells)}</tr>'


def _dot(table: Table, row: Row) -> str:
    return f'<span class="dot" style="background:{colour(table, row.label)}"></span>{escape(row.label)}'


def _cell(table: Table, row: Row, key: str) -> str:
    score = row.scores.get(key)
    if score is None:
        return _NONE
    mark = _marks(table, key).get(row.label, "")
    kind = f" class='{mark}'" if mark else ""
    title = f"n = {score.records} records, {score.probes} probes"
    text = f"<span>{figure(score.value)}</span><small>{_ends(score)}</small>"
    return f'<td{kind} data-value="{score.value!r}" title="{title}">{text}</td>'


def _ends(score: Score) -> str:
    """Return the ends of an interval in little room: without zeros before the point."""
    if score.ends is None:
        return ""
    low, high = score.ends
    if low >= 0 and high <= 1:
        return f"{low:.3f}–{high:.3f}".replace("0.", ".").replace("1.000", "1")
    return f"{figure(low)} – {figure(high)}".replace("-", "−")


def _marks(table: Table, key: str) -> dict[str, Mark]:
    """Return the marks of a column by the labels of methods, among which the unedited model does not compete."""
    scores: dict[str, Score] = {}
    for row in table.rows:
        if row.result.edits and key in row.scores:
            scores[row.label] = row.scores[key]
    return mark_best(scores, lower=described(table.described, key).lower, decimals=3)


def _paper_row(table: Table, row: PaperRow) -> str:
    """Return a line of figures that somebody published."""
    source = escape(f"{row.paper.source}: ")
    cells = [f'<th title="{escape(row.paper.paper)}"><span class="dot"></span>{escape(row.label)}</th>']
    for key in table.columns:
        value = row.scores.get(key)
        cells.append(_NONE if value is None else f'<td title="{source}{row.printed(key)}">{value:.3f}</td>')
    return f'<tr class="paper">{"".join(cells)}{"<td></td>" * len(table.costs)}</tr>'


def further_table(table: Table) -> str:
    """Return the table of all other scores and axes, a line each, a column a method; empty where there are none."""
    rows = [row for row in table.rows if row.evaluation]
    columns = [described(table.described, key) for key in table.further]
    columns.sort(key=lambda column: list(_KINDS).index(column.kind))
    body: list[str] = []
    for kind, group in groupby(columns, key=lambda column: column.kind):
        body.append(f'<tr class="group"><th colspan="{len(rows) + 1}">{escape(_KINDS[kind])}</th></tr>')
        for column in group:
            cells = "".join(_cell(table, row, column.key) for row in rows)
            body.append(f'<tr><th title="{escape(_meaning(table, column.key))}">{escape(column.name)}</th>{cells}</tr>')
    if not body:
        return ""
    head = "".join(f"<th>{_dot(table, row)}</th>" for row in rows)
    summary = "<summary>Further scores, and scores by axis</summary>"
    return f"<details class='further'>{summary}{_html_table(f'<th>score</th>{head}', ''.join(body))}</details>"


def missing(table: Table) -> str:
    """Return the list of what the table could not be taken on, with the records; empty where nothing is missing."""
    items: list[str] = []
    for gap in gaps(table):
        names = [described(table.described, key).name for key in gap.keys]
        ids = f": {escape(_listed(gap.ids))}" if gap.ids else ""
        items.append(f"<li>{escape(gap.sentence(names))}{ids}</li>")
    skipped = [f"{record.where}: {record.reason}" for record in left_out(table)]
    if skipped:
        items.append(f"<li>Left out of the file: {escape(_listed(skipped))}</li>")
    for row in table.rows:
        failures = [f"{failure.part}: {failure.kind}: {failure.message}" for failure in row.result.failures]
        if failures:
            items.append(f"<li>{escape(row.label)} failed: {escape(_listed(failures))}</li>")
    if not items:
        return ""
    summary = "<summary>What is missing, record by record</summary>"
    return f"<details class='notes'>{summary}<ul>{''.join(items)}</ul></details>"


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return "; ".join(texts[:_LISTED]) + more
