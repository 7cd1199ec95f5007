"""Native CPU backend: one call into the C++ kernels per step."""
