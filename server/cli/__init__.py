"""The `loramux` command line. Commands import torch and the server when they run, so that `--help` is fast."""

from server.cli.main import app, main

__all__ = ["app", "main"]
