"""Meta-learning: hyper-networks that turn a fine-tuning gradient into an edit, trained for one model."""
