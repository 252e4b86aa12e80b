"""``python -m tvlens`` is the command line."""

from .cli import main

main()
