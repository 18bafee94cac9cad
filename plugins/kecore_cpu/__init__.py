"""Accelerators of passes on a CPU, which entry points of the group ``kecore.accelerators`` lead to."""
