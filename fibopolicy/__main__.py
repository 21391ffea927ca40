"""`python -m fibopolicy` is the `fibopolicy` command."""

from fibopolicy.cli import main

main()
