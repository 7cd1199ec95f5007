"""The command line, `loramux`: one module for each group of commands, all of them thin.

Owns what people type and see. What is heavy (torch, the server) is imported by the command that needs it, so that
`--help` is instant.
"""

from server.cli.main import app, main

__all__ = ["app", "main"]
