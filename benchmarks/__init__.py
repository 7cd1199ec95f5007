"""Benchmarks: the commands behind `loramux bench`, and scripts that run with `python -m benchmarks.NAME`."""
