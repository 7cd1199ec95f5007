"""The engine: one thread that batches requests on any mix of adapters, step by step.

Never touches the disk after start-up, and never a name: it sees digests, slots, blocks and token ids.
"""
