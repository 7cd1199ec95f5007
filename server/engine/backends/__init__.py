"""Backends: how each kind of device runs a step. `protocol` is what the engine calls."""
