"""The commands that keep a ledger and serve a model."""
