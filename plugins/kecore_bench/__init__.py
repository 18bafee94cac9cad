"""Benchmarks: methods x models x data sets into a store that survives a kill, and tables and pages over it."""
