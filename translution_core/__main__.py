"""``python -m translution``."""

from translution.cli import main

main()
