"""Key statistics: the second moment of a layer's keys over natural text, collected once and read by many methods."""

from kecore.statistics.collect import TOKENS_PER_WIDTH, collect_statistics, collection_need, sample_text, token_budget
from kecore.statistics.moments import KeyStatistics
from kecore.statistics.npz import export_statistics, import_statistics
from kecore.statistics.spot import spot_check

__all__ = [
    "TOKENS_PER_WIDTH",
    "KeyStatistics",
    "collect_statistics",
    "collection_need",
    "export_statistics",
    "import_statistics",
    "sample_text",
    "spot_check",
    "token_budget",
]
