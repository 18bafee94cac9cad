"""Key statistics: the second moment of a layer's keys over natural text, collected once and read by many methods."""

from kecore.statistics.collect import TOKENS_PER_WIDTH, collect_statistics, collection_need, sample_text, token_budget
from kecore.statistics.moments import KeyStatistics

__all__ = ["TOKENS_PER_WIDTH", "KeyStatistics", "collect_statistics", "collection_need", "sample_text", "token_budget"]
