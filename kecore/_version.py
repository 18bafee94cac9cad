"""The version, alone in a file that builds can read without importing kecore."""

__version__ = "0.1.0"
