"""Constrained fine-tuning of one layer, the baseline of the literature."""
