"""Methods that keep the model's parameters and put a memory beside them."""
