"""Trackers of experiments: benches tell them what they do.

A tracker is found through the entry-point group ``kecore.trackers``: kecore's own for trackio, Weights & Biases and
MLflow, whose libraries are extras, and a stranger's alike.

    >>> from kecore_bench.trackers import open_tracker

"""

from kecore_bench.trackers.base import TrackedRun, Tracker, open_tracker

__all__ = ["TrackedRun", "Tracker", "open_tracker"]
