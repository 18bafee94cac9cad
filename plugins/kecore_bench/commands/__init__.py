"""Commands of the command line: bench, eval, compare and report."""
