"""Loading facts, scoring a model on them, and telling by which protocol."""

from kecore.evaluate.formats import Layout, Published, record_to_json
from kecore.evaluate.metrics import STANDARD, AnsweredProbe, Metric, family, metrics_of
from kecore.evaluate.protocol import METRIC_VERSION, Protocol
from kecore.evaluate.records import RecordSet, Skipped, load_records
from kecore.evaluate.result import Evaluation, RecordResult, Score, compare, merge
from kecore.evaluate.runner import evaluate

__all__ = [
    "METRIC_VERSION",
    "STANDARD",
    "AnsweredProbe",
    "Evaluation",
    "Layout",
    "Metric",
    "Protocol",
    "Published",
    "RecordResult",
    "RecordSet",
    "Score",
    "Skipped",
    "compare",
    "evaluate",
    "family",
    "load_records",
    "merge",
    "metrics_of",
    "record_to_json",
]
