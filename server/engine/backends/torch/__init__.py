"""The runner on PyTorch's CPU kernels."""
