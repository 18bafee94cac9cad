"""One self-contained HTML page: tables, plots, every record, and the conditions of all of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from kecore._version import __version__
from kecore.api.errors import MissingDependencyError
from kecore.evaluate.protocol import AFTER
from kecore_bench.report.drill import drill
from kecore_bench.report.html_tables import further_table, glossary, main_table, missing
from kecore_bench.report.marks import LEGEND
from kecore_bench.report.plot import INSTALL, Plot
from kecore_bench.report.plots import drawn_plots
from kecore_bench.report.results import Result
from kecore_bench.report.table import MOMENTS, Table, last_moments
from kecore_bench.report.text import INTERVALS, conditions, notes

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
<p>What each method made of each record. Marks are the protocol's own metrics, as in the table: ✓ or ✗ for one test,
right ones of several, or a share. Click a record for its prompts, probabilities, and the texts before and after.</p>
<ul id="legend"></ul>
<div id="controls"></div>
<div id="drill"><noscript>The list of records needs JavaScript; everything else on this page does not.</noscript></div>
</section>
<section id="glossary">
<h2>What the columns say</h2>
{glossary}
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


def page(tables: Sequence[Table], results: Sequence[Result]) -> str:
    """Return the page.

    Args:
        tables: its tables.
        results: the runs behind them.
    """
    protocol = results[0].protocol
    models = ", ".join(dict.fromkeys(result.model for result in results))
    sets = ", ".join(dict.fromkeys(result.spec.data["name"] for result in results))
    last = last_moments(tables)
    data = json.dumps([drill(table) for table in last], ensure_ascii=False, separators=(",", ":"))
    sections = [_section(table, results, table in last) for table in tables]
    condition_items = [f"<li>{escape(line)}</li>" for line in conditions(results)]
    protocol_rows = [_field(name, value) for name, value in protocol.to_json().items()]
    configs = [_config(result) for result in results if result.spec.config]
    return _PAGE.format(
        title=escape(f"Knowledge editing: {models} on {sets}"),
        lead=_lead(results),
        version=escape(__version__),
        style=_file("page.css"),
        script=_file("page.js"),
        sections="\n".join(sections),
        glossary=glossary(tables),
        conditions="\n".join(condition_items),
        protocol="".join(protocol_rows),
        configs="".join(configs),
        data=data.replace("<", "\\u003c"),
    )


def _lead(results: Sequence[Result]) -> str:
    """Return the protocol in words, and its hash; of several seeds those of each."""
    hashes = dict.fromkeys(f"<code>{result.protocol.hash()}</code>" for result in results)
    seeds = dict.fromkeys(str(result.protocol.seed) for result in results)
    noun = "Protocol" if len(hashes) == 1 else f"Protocols with the seeds {', '.join(seeds)}:"
    return f"{escape(_capitalise(results[0].protocol.describe()))}. {noun} {', '.join(hashes)}."


def _field(name: str, value: object) -> str:
    return f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"


def _file(name: str) -> str:
    return (files("kecore_bench.report") / name).read_text(encoding="utf-8").strip()


def _capitalise(text: str) -> str:
    """Return a text with a capital at its beginning; what follows stays, names among it."""
    return text[:1].upper() + text[1:]


def _section(table: Table, results: Sequence[Result], last: bool) -> str:
    elements = [f"<h2>{escape(table.title)}</h2>"]
    if table.moment != AFTER:
        elements.append(f"<p class='when'>Scored {escape(MOMENTS[table.moment])}.</p>")
    elements.append(main_table(table))
    hint = (
        f"{escape(INTERVALS)} {escape(LEGEND)} Hold the pointer over a heading for its meaning; "
        '<a href="#glossary">all of them</a> stand below.'
    )
    if table.cited:
        hint += " Rows in italics are figures of papers, from the sources below."
    elements.append(f"<p class='hint'>{hint}</p>")
    items = "".join(f"<li>{escape(line)}</li>" for line in notes(table))
    if items:
        elements.append(f"<ul class='notes'>{items}</ul>")
    elements += [further_table(table), missing(table), _figures(table, results, last)]
    return f"<section>{''.join(elements)}</section>"


def _figures(table: Table, results: Sequence[Result], last: bool) -> str:
    """Return the plots of a table; or how to get them, where matplotlib is not installed."""
    try:
        plots = drawn_plots([table], results, last)
    except MissingDependencyError:
        return f"<p class='hint'>There are no figures: {escape(INSTALL)}</p>"
    return "".join(map(_figure, plots))


def _figure(plot: Plot) -> str:
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else ""
    return f"<h3>{escape(plot.title)}</h3><figure>{plot.to_svg()}{caption}</figure>"


def _config(result: Result) -> str:
    values = {"config": dict(result.spec.config), "statistics": result.spec.statistics}
    return f"<h4>{escape(result.label)}</h4><pre>{escape(json.dumps(values, indent=1, ensure_ascii=False))}</pre>"
