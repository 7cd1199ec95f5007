"""The base model: its config, its weights and how they are loaded, and the decoder. Knows kernels, not requests."""
