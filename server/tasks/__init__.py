"""Tasks: what clients name. Definitions, routes, names to mixes, and running a prompt on the engine for them.

Knows the engine and the registry, never HTTP.
"""
