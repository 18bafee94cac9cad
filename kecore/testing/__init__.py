"""What tests of editing methods stand on: the conformance kit, tiny models made in code, and snapshots."""

from kecore.testing.bench import MODELS, NonConformance, Trial
from kecore.testing.conformance import check_method, parametrize_with_checks
from kecore.testing.models import VOCABULARY, architectures, tiny_model, tiny_tokenizer
from kecore.testing.snapshot import Snapshot

__all__ = [
    "MODELS",
    "VOCABULARY",
    "NonConformance",
    "Snapshot",
    "Trial",
    "architectures",
    "check_method",
    "parametrize_with_checks",
    "tiny_model",
    "tiny_tokenizer",
]
