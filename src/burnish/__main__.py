"""`python -m burnish` is the `burnish` command."""

from burnish.cli.main import main

main()
