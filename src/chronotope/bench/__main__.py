"""`python -m chronotope.bench` is the command `chronotope bench`."""

import sys

from chronotope.cli import app

app(["bench", *sys.argv[1:]], prog_name="chronotope")
