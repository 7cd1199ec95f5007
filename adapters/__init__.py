"""LoRA adapters: file format, store, registry, and training. Independent of the server."""
