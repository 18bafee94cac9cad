"""Methods that change what the model reads and leave the model alone."""
