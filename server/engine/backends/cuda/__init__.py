"""CUDA backend: Triton kernels, CUDA graphs, and adapters in one pool of device memory."""
