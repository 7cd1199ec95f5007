"""The native CPU kernels, built with the package. Everything else about the package is said in pyproject.toml.

The library is a plain shared object with a C interface, loaded with ctypes. Where it cannot be built the package
installs without it, and torch's own kernels serve.
"""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup

KERNELS = "server/kernels/cpu"

setup(
    ext_modules=[
        Extension(
            "server.kernels.cpu._native",
            sources=sorted(glob(f"{KERNELS}/*.cpp")),
            depends=sorted(glob(f"{KERNELS}/*.h")),
            language="c++",
            # Contraction would fuse a product and a sum where the stored scales are defined by two roundings.
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-ignored-attributes"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
