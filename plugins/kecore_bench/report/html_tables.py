"""Tables of the page: scores, further scores and axes, and what is missing of them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from kecore.evaluate.columns import described
from kecore.evaluate.result import Score
from kecore_bench.report.figures import colour
from kecore_bench.report.gaps import gaps, left_out
from kecore_bench.report.papers import PaperRow, lines
from kecore_bench.report.results import Row, Table
from kecore_bench.report.text import COSTS, costs, figure

__all__ = ["further_table", "main_table", "missing"]

_COSTS = {
    "s/fact": "seconds of editing for each fact, without loading, statistics and scoring",
    "KiB/fact": "what the edits take to keep, over their facts; of a sequence those that act at its end",
    "+ms/token": "what the edits add to a token of greedy text; noise can make it negative",
    "peak GiB": "most memory that the process held, with the model and the program; see the conditions",
}
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
    """Core scores and costs, a line a method."""
    meanings = {key: table.described[key].meaning for key in table.columns if key in table.described}
    head = [_head(text, meanings.get(key, "")) for key, text in table.columns.items()]
    head += [_head(text, _COSTS[text]) for text in COSTS]
    body = "\n".join(_row(table, row) if isinstance(row, Row) else _paper_row(table, row) for row in lines(table))
    return (
        f'<div class="wide"><table class="scores"><thead><tr><th>method</th>{"".join(head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _head(text: str, meaning: str) -> str:
    return f'<th title="{escape(meaning or text)}">{escape(text)}</th>'


def _row(table: Table, row: Row) -> str:
    cells = [f"<th>{_dot(table, row)}</th>", *(_cell(table, row, key) for key in table.columns)]
    cells += [_NONE if cost is None else f"<td>{cost}</td>" for cost in costs(row.result)]
    kind = "" if row.result.edits else " class='plain'"
    return f'<tr data-method="{escape(row.label)}"{kind}>{"".join(cells)}</tr>'


def _dot(table: Table, row: Row) -> str:
    return f'<span class="dot" style="background:{colour(table, row.label)}"></span>{escape(row.label)}'


def _cell(table: Table, row: Row, key: str) -> str:
    score = row.scores.get(key)
    if score is None:
        return _NONE
    best = " class='best'" if _best(table, row, key) else ""
    title = f"n = {score.records} records, {score.probes} probes"
    shown = f"{figure(score.value)}<small>{_ends(score)}</small>"
    return f'<td{best} data-value="{score.value!r}" title="{title}">{shown}</td>'


def _ends(score: Score) -> str:
    """The ends of an interval in little room: without zeros before the point."""
    if score.ends is None:
        return ""
    low, high = score.ends
    if low >= 0 and high <= 1:
        return f"{low:.3f}–{high:.3f}".replace("0.", ".").replace("1.000", "1")
    return f"{figure(low)} – {figure(high)}".replace("-", "−")


def _best(table: Table, row: Row, key: str) -> bool:
    """Whether a method's score is the best of those that edit, or its interval reaches it."""
    found = [other.scores[key] for other in table.rows if other.result.edits and key in other.scores]
    if not row.result.edits or len(found) < 2 or all(other.value == found[0].value for other in found):
        return False
    score = row.scores[key]
    low, high = score.ends or (score.value, score.value)
    if described(table.described, key).lower:
        return low <= min(other.value for other in found)
    return high >= max(other.value for other in found)


def _paper_row(table: Table, row: PaperRow) -> str:
    """A line of figures that somebody published."""
    source = escape(f"{row.paper.source}: ")
    cells = [f'<th title="{escape(row.paper.paper)}"><span class="dot"></span>{escape(row.label)}</th>']
    for key in table.columns:
        value = row.scores.get(key)
        cells.append(_NONE if value is None else f'<td title="{source}{row.printed(key)}">{value:.3f}</td>')
    return f'<tr class="paper">{"".join(cells)}{"<td></td>" * len(COSTS)}</tr>'


def further_table(table: Table) -> str:
    """All other scores and axes, a line each, a column a method; empty where there are none."""
    rows = [row for row in table.rows if row.evaluation]
    columns = [described(table.described, key) for key in table.further]
    columns.sort(key=lambda column: list(_KINDS).index(column.kind))
    body: list[str] = []
    for kind, group in groupby(columns, key=lambda column: column.kind):
        body.append(f'<tr class="group"><th colspan="{len(rows) + 1}">{escape(_KINDS[kind])}</th></tr>')
        for column in group:
            cells = "".join(_cell(table, row, column.key) for row in rows)
            body.append(f'<tr><th title="{escape(column.meaning)}">{escape(column.name)}</th>{cells}</tr>')
    if not body:
        return ""
    head = "".join(f"<th>{_dot(table, row)}</th>" for row in rows)
    return (
        "<details class='further'><summary>Further scores, and scores by axis</summary>"
        f'<div class="wide"><table class="scores"><thead><tr><th>score</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></details>"
    )


def missing(table: Table) -> str:
    """What the table could not be taken on, with the records; empty where nothing is missing."""
    items: list[str] = []
    for gap in gaps(table):
        names = [described(table.described, key).name for key in gap.keys]
        ids = f": {escape(_listed(gap.ids))}" if gap.ids else ""
        items.append(f"<li>{escape(gap.sentence(names))}{ids}</li>")
    if skipped := left_out(table):
        items.append(f"<li>Left out of the file: {escape(_listed([f'{where}: {why}' for where, why in skipped]))}</li>")
    for row in table.rows:
        if failures := row.result.failures:
            texts = [f"{failure.part}: {failure.kind}: {failure.message}" for failure in failures]
            items.append(f"<li>{escape(row.label)} failed: {escape(_listed(texts))}</li>")
    if not items:
        return ""
    lines = "".join(items)
    return f"<details class='notes'><summary>What is missing, record by record</summary><ul>{lines}</ul></details>"


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return "; ".join(texts[:_LISTED]) + more
