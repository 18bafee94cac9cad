"""Loading facts, scoring a model on them, and telling by which protocol."""

from kecore.evaluate.answers import AnsweredProbe, RecordResult
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.metrics import STANDARD, Metric, family, metrics_of
from kecore.evaluate.own_layout import record_to_json
from kecore.evaluate.protocol import METRIC_VERSION, Protocol
from kecore.evaluate.records import RecordSet, Skipped, load_records
from kecore.evaluate.result import Evaluation, Score, compare, merge
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
