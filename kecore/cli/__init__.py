"""The command line, ``kecore``: everything here shows or stores what the Python interface works out.

Importing it brings typer and rich only; torch and the rest of kecore come with the command that needs them.
"""

from kecore.cli.app import app, main

__all__ = ["app", "main"]
