"""`python -m chronotope` is the command `chronotope`."""

from chronotope.cli import main

main()
