"""Runs many adapters at once on one resident 4-bit base, and shows how well each one does."""
