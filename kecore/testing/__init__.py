"""What the tests of kecore and of third-party methods stand on: tiny models made in code, and snapshots."""

from kecore.testing.models import VOCABULARY, architectures, tiny_model, tiny_tokenizer
from kecore.testing.snapshot import Snapshot

__all__ = ["VOCABULARY", "Snapshot", "architectures", "tiny_model", "tiny_tokenizer"]
