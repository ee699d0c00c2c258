"""`python -m liftbyimage`."""

from liftbyimage.cli import main

main()
