"""Looking into models and edits: causal tracing, health of an edited model, harness tasks, judges."""
