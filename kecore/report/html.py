"""One self-contained HTML page: tables, plots, every record, and the conditions of all of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from kecore._version import __version__
from kecore.report import svg
from kecore.report.drill import drill
from kecore.report.figures import colour, curves, scatters, stages
from kecore.report.papers import PaperRow, lines
from kecore.report.results import MOMENTS, Result, Row, Table, last_moments
from kecore.report.text import conditions, notes

__all__ = ["page"]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="kecore {version}">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{lead}</p>
</header>
<main>
{sections}
<section id="records">
<h2>Records</h2>
<p>What each method made of each record: <b>E</b> the edited prompt, <b>P</b> its paraphrases, <b>N</b> its
neighbours, <b>L</b> other locality probes, <b>R</b> portability, as right answers of probes. A probe is right where the
answer is more probable than its rival, or, where there is no rival, where each of its tokens is the most probable one.
Click a record for its prompts, probabilities per token, and texts before and after.</p>
<div id="controls"></div>
<div id="drill"><noscript>The list of records needs JavaScript; everything else on this page does not.</noscript></div>
</section>
<section id="conditions">
<h2>Conditions</h2>
<ul>
{conditions}
</ul>
<details><summary>All fields of the protocol</summary>
<table class="plain">{protocol}</table></details>
<details><summary>Configurations of the methods</summary>
{configs}</details>
</section>
</main>
<footer>Made by kecore {version}.</footer>
<script type="application/json" id="data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""

_HEADS = {
    "ES": "edit success: share of edited prompts on which the target is more probable than the old answer",
    "PS": "paraphrase success: the same on other wordings",
    "NS": "neighbourhood success: share of prompts on other subjects on which the old answer stays more probable",
    "S": "harmonic mean of ES, PS and NS",
    "strict": "every token of the target is the most probable one under teacher forcing",
    "strict, para.": "the same on other wordings",
    "tokens": "share of such tokens",
    "free": "the model writes the target",
    "free, para.": "the same on other wordings",
    "NS stable": "share of answer tokens on neighbours whose most probable token the edit left as it was",
    "portab.": "share of right tokens of what should follow from the edit",
    "multi-hop": "questions over several hops answered rightly in free text",
    "locality": "share of answer tokens on locality probes that the edit left as they were",
    "fluency": "n-gram entropy of free text in bits",
    "consist.": "likeness of free text about the subject to texts about the target",
    "ROUGE-L": "overlap of the free text with the target",
    "s/fact": "seconds of editing for each fact, without loading, statistics and scoring",
    "peak GiB": "most memory that the process had held by then",
}


def page(tables: Sequence[Table], results: Sequence[Result]) -> str:
    """The page.

    Args:
        tables: its tables.
        results: the runs behind them.
    """
    protocol = results[0].protocol
    models = ", ".join(dict.fromkeys(result.model for result in results))
    sets = ", ".join(dict.fromkeys(result.spec.data["name"] for result in results))
    last = last_moments(tables)
    data = json.dumps([drill(table) for table in last], ensure_ascii=False, separators=(",", ":"))
    return _PAGE.format(
        title=escape(f"Knowledge editing: {models} on {sets}"),
        lead=f"{escape(_upper(protocol.describe()))}. Protocol <code>{protocol.hash()}</code>.",
        version=escape(__version__),
        style=_file("page.css"),
        script=_file("page.js"),
        sections="\n".join(_section(table, results, table in last) for table in tables),
        conditions="\n".join(f"<li>{escape(line)}</li>" for line in conditions(results)),
        protocol="".join(
            f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in protocol.to_json().items()
        ),
        configs="".join(_config(result) for result in results if result.spec.config),
        data=data.replace("<", "\\u003c"),
    )


def _file(name: str) -> str:
    return (files("kecore.report") / name).read_text(encoding="utf-8").strip()


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _section(table: Table, results: Sequence[Result], last: bool) -> str:
    spec = table.first.spec
    head = "".join(f'<th title="{escape(_HEADS.get(h, h))}">{escape(h)}</th>' for h in _names(table))
    body = "\n".join(_row(table, row) if isinstance(row, Row) else _paper_row(table, row) for row in lines(table))
    same = [result for result in results if result.spec.group == spec.group]
    found = "".join(f"<li>{escape(line)}</li>" for line in notes(table))
    parts = [
        f"<h2>{escape(table.title)}</h2>",
        f"<p class='when'>Scored {escape(MOMENTS[table.moment])}.</p>" if table.moment != "after" else "",
        f'<div class="wide"><table class="scores"><thead><tr><th>method</th>{head}</tr></thead>',
        f"<tbody>{body}</tbody></table></div>",
        "<p class='hint'>± half of the 95 % confidence interval over records. Best edited value of a column in bold, "
        "with all whose intervals reach it. Hold the pointer over a heading for its meaning.",
        " Rows in italics are figures of papers, from the sources below.</p>" if table.cited else "</p>",
        f"<ul class='notes'>{found}</ul>" if found else "",
    ]
    drawn = [svg.scatter(plot, lambda label: colour(table, label)) for plot in scatters(table)]
    rings = " Rings: figures of papers." if any(plot.published for plot in scatters(table)) else ""
    parts += _figure("Success against locality", drawn, f"Bars: 95 % confidence intervals.{rings} Top right is best.")
    if last:
        kept = [svg.curve(plot, lambda label: colour(table, label)) for plot in curves(same)]
        parts += _figure("Retention: all facts edited so far, scored again on the way", kept, "")
        if (spent := stages(table)).rows:
            parts += _figure("Seconds of editing for each fact, by stage", [svg.stage_bars(spent)], "")
    return f"<section>{''.join(parts)}</section>"


def _figure(title: str, drawn: Sequence[str], caption: str) -> list[str]:
    if not drawn:
        return []
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return [f"<h3>{escape(title)}</h3><figure>{''.join(drawn)}{note}</figure>"]


def _names(table: Table) -> list[str]:
    return [*table.columns.values(), "s/fact", "peak GiB"]


def _row(table: Table, row: Row) -> str:
    cells = [f'<th><span class="dot" style="background:{colour(table, row.label)}"></span>{escape(row.label)}</th>']
    for key in table.columns:
        score = row.scores.get(key)
        if score is None:
            cells.append('<td class="none">–</td>')
            continue
        best = " class='best'" if _best(table, row, key) else ""
        half = f"<small>±{score.half_width:.3f}</small>" if score.half_width else "<small></small>"
        title = f"n = {score.records} records, {score.probes} probes"
        cells.append(f'<td{best} data-value="{score.value!r}" title="{title}">{score.value:.3f}{half}</td>')
    seconds, memory = row.result.seconds, row.result.peak_memory
    cells.append('<td class="none">–</td>' if seconds is None else f"<td>{seconds:.2f}</td>")
    cells.append('<td class="none">–</td>' if memory is None else f"<td>{memory / 2**30:.2f}</td>")
    kind = "" if row.result.edits else " class='plain'"
    return f'<tr data-method="{escape(row.label)}"{kind}>{"".join(cells)}</tr>'


def _paper_row(table: Table, row: PaperRow) -> str:
    """A line of figures that somebody published."""
    source = escape(f"{row.paper.source}: ")
    cells = [f'<th title="{escape(row.paper.paper)}"><span class="dot"></span>{escape(row.label)}</th>']
    for key in table.columns:
        value = row.scores.get(key)
        shown = '<td class="none">–</td>'
        if value is not None:
            shown = f'<td title="{source}{row.printed(key)}">{value:.3f}</td>'
        cells.append(shown)
    return f'<tr class="paper">{"".join(cells)}{"<td></td>" * 2}</tr>'


def _best(table: Table, row: Row, key: str) -> bool:
    """Whether a method's score is the best of those that edit, or its interval reaches it."""
    found = [other.scores[key] for other in table.rows if other.result.edits and key in other.scores]
    if not row.result.edits or len(found) < 2:
        return False
    score, best = row.scores[key], max(found, key=lambda other: other.value)
    return best.value > 0 and score.value + (score.half_width or 0.0) >= best.value


def _config(result: Result) -> str:
    values = {"config": dict(result.spec.config), "statistics": result.spec.statistics}
    return f"<h4>{escape(result.label)}</h4><pre>{escape(json.dumps(values, indent=1, ensure_ascii=False))}</pre>"
