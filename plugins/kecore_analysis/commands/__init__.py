"""Commands of the command line: trace and checkup."""
