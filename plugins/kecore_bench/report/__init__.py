"""Tables and pages over stores of results: text, Markdown, LaTeX, CSV, JSON, PNG, and one HTML page."""

from kecore_bench.report.results import Result, results
from kecore_bench.report.table import Table, tables
from kecore_bench.report.write import FORMATS, write_report

__all__ = ["FORMATS", "Result", "Table", "results", "tables", "write_report"]
