"""Keeping a model's edits current: a ledger of them, a guard over them, and a server that applies them live."""
