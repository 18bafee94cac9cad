"""Loading facts, scoring a model on them, and telling by which protocol."""

from kecore.evaluate.formats import record_to_json
from kecore.evaluate.generation import Generation, generate
from kecore.evaluate.metrics import METRICS, AnsweredProbe, Metric
from kecore.evaluate.protocol import METRIC_VERSION, Protocol
from kecore.evaluate.records import RecordSet, Skipped, load_records
from kecore.evaluate.result import Evaluation, RecordResult, Score, compare, merge
from kecore.evaluate.runner import evaluate
from kecore.evaluate.scoring import ContinuationScore, score_continuations

__all__ = [
    "METRICS",
    "METRIC_VERSION",
    "AnsweredProbe",
    "ContinuationScore",
    "Evaluation",
    "Generation",
    "Metric",
    "Protocol",
    "RecordResult",
    "RecordSet",
    "Score",
    "Skipped",
    "compare",
    "evaluate",
    "generate",
    "load_records",
    "merge",
    "record_to_json",
    "score_continuations",
]
