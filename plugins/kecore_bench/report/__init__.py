"""Tables, figures and pages over stores of results: HTML, Markdown, LaTeX, CSV, JSON, PNG, PDF and SVG."""

from kecore_bench.report.choice import Choice
from kecore_bench.report.joined import join
from kecore_bench.report.joined_text import Words
from kecore_bench.report.results import Result, results
from kecore_bench.report.table import Table, tables
from kecore_bench.report.write import FIGURES, FORMATS, write_report

__all__ = ["FIGURES", "FORMATS", "Choice", "Result", "Table", "Words", "join", "results", "tables", "write_report"]
