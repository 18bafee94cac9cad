"""``python -m kecore.cli``, for where the script ``kecore`` is not on the path."""

from kecore.cli import main

main()
