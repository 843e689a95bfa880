"""`python -m mrpo`: the command line."""

from mrpo.cli import main

main()
