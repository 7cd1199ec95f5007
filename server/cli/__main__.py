"""`python -m server.cli` is `loramux`."""

from server.cli.main import main

main()
